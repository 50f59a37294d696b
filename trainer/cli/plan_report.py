"""A plan as `growkit plan` shows it: a table, or one JSON document."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.table import Table

from growkit.quantity import format_count
from trainer.config.description import describe_batch
from trainer.devices.accelerators import GIB
from trainer.plan.compiler import Memory
from trainer.plan.plan import Plan
from trainer.plan.remedies import Trial, describe_remedy

WIDTH = 120  # columns of a table that is not shown on a terminal; rich's own default folds at 80

Rows = list[tuple[str, str]]


def show_plan(name: str, plan: Plan, mfu: float, price: float | None) -> None:
    """Print a plan as a table. name: the configuration's; price: of a chip and hour."""
    table = Table(title=f"{name} on {plan.target.name}", show_header=False, title_justify="left")
    rows = [*_build_run_rows(plan), *_build_memory_rows(plan), *_build_time_rows(plan, mfu, price)]
    for row in rows:
        table.add_row(*row)
    Console(width=None if os.isatty(1) else WIDTH).print(table)


def _build_run_rows(plan: Plan) -> Rows:
    """The model, the devices and the step."""
    model = plan.model
    config = plan.config
    target = plan.target
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    zero1 = ", ZeRO-1" if config.mesh.zero1 else ""
    model_words = (
        f"{model.layer} layers, embed {model.embed}, {model.head_count} heads, "
        f"{model.parameters:,} parameters"
    )
    step_words = (
        f"{config.batch.sequences} x {config.model.context} tokens in {config.batch.accumulation}, "
        f"remat {config.remat}"
    )
    batch_words = describe_batch(config)
    return [
        *([("batch", batch_words)] if batch_words else []),
        ("model", model_words),
        ("devices", f"{len(target.devices)} ({target.chips} chips), mesh {mesh}{zero1}"),
        ("step", step_words),
        ("attention", plan.attention.words.removeprefix("attention: ")),
    ]


def _build_memory_rows(plan: Plan) -> Rows:
    """Memory on each device, and FLOPs."""
    memory = plan.memory
    target = plan.target
    place = target.place
    least = "" if memory.exact else "at least "
    fits = "fits" if memory.fits else "does not fit"
    flops_words = (
        f"{plan.flops:.3e}, {plan.flops / len(target.devices):.3e} a {place}; with recomputation "
        f"{plan.computed:.3e}"
    )
    return [
        (f"parameters a {place}", _format_gib(memory.parameters)),
        (f"optimizer a {place}", _format_gib(memory.optimizer)),
        (f"temporaries a {place}", f"{least}{_format_gib(memory.temporaries)}"),
        (f"peak a {place}", f"{format_need(memory)}: {fits}"),
        ("FLOPs a step", flops_words),
    ]


def _build_time_rows(plan: Plan, mfu: float, price: float | None) -> Rows:
    """Time and cost, where the devices' peak FLOP/s is known."""
    target = plan.target
    seconds = plan.estimate_step_seconds(mfu)
    hours = plan.estimate_hours(mfu)
    if target.peak is None or seconds is None or hours is None:
        kind = target.devices[0].device_kind
        return [("time", f"unknown: the peak FLOP/s of {kind} is not known")]
    steps = plan.config.schedule.steps
    tokens = format_count(steps * plan.tokens_per_step)
    formula = f"FLOPs a step / (time x {target.peak / 1e12:,.0f} TFLOP/s)"
    rows = [
        ("step time", f"{seconds:.3g} s at {mfu:.0%} MFU = {formula}"),
        ("to the end", f"{hours / 24:.3g} days, {steps:,} steps, {tokens} tokens"),
    ]
    if price is not None:
        cost = plan.estimate_cost(mfu, price)
        rows.append(("cost", f"{cost:,.0f} at {price:g} a chip and hour"))
    return rows


def format_need(memory: Memory) -> str:
    """What a step needs of what there is, a device."""
    least = "" if memory.exact else "at least "
    return f"{least}{_format_gib(memory.peak)} of {_format_gib(memory.available)}"


def _format_gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def build_document(
    plan: Plan, tried: list[Trial], mfu: float, price: float | None
) -> dict[str, Any]:
    """A plan as JSON: bytes a device, FLOPs, seconds. tried: remedies for a step too large."""
    target = plan.target
    steps = plan.config.schedule.steps
    remedy = tried[-1] if tried and tried[-1].memory.fits else None
    return {
        "topology": target.name,
        "devices": len(target.devices),
        "chips": target.chips,
        "mesh": plan.mesh,
        "attention": {"name": plan.attention.name, "reason": plan.attention.reason},
        "parameters": plan.model.parameters,
        "fits": plan.memory.fits,
        "memory": _build_memory(plan.memory),
        "flops_per_step": plan.flops,
        "flops_computed_per_step": plan.computed,
        "mfu": mfu,
        "peak_flops": target.peak,
        "step_seconds": plan.estimate_step_seconds(mfu),
        "hours": plan.estimate_hours(mfu),
        "steps": steps,
        "tokens": steps * plan.tokens_per_step,
        "cost": None if price is None else plan.estimate_cost(mfu, price),
        "tried": [_build_trial(trial) for trial in tried],
        "remedy": list(remedy.changes) if remedy else None,
        "advice": None if plan.memory.fits else describe_remedy(tried),
    }


def _build_trial(trial: Trial) -> dict[str, Any]:
    return {"changes": list(trial.changes), "memory": _build_memory(trial.memory)}


def _build_memory(memory: Memory) -> dict[str, Any]:
    return {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "temporaries": memory.temporaries,
        "peak": memory.peak,
        "available": memory.available,
        "exact": memory.exact,
    }
