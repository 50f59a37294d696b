"""The verb that says what a run would need: plan."""

from __future__ import annotations

import os
from typing import Any

import click


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--topology",
    required=True,
    metavar="NAME",
    help="A slice of TPUs (v3-32, v3:4x4, v5e-16), cpu or gpu.",
)
@click.option(
    "--mfu",
    default=0.4,
    show_default=True,
    metavar="M",
    help="The model FLOPs utilization to assume.",
)
@click.option(
    "--price", type=float, metavar="P", help="What a chip costs an hour, for the cost to the end."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def plan(
    config: str,
    overrides: tuple[str, ...],
    topology: str,
    mfu: float,
    price: float | None,
    as_json: bool,
) -> int:
    """Compile the train step of CONFIG, a YAML file or a preset, for --topology and say what it needs.

    No TPU is needed for a slice of TPUs: their compiler, libtpu, runs anywhere (pip install 'growkit[tpu]'). Exit
    code 1 when the step does not fit; the changes that could make it fit are then tried, in this order: remat,
    ZeRO-1 and FSDP, more accumulation, a shorter context; each alone, then together.
    """
    from growkit.errors import GrowkitError, UsageError

    if not 0 < mfu <= 1:
        raise UsageError(f"--mfu lies in (0, 1], got {mfu:g}")
    if topology not in ("cpu", "gpu"):
        # Set before jax is imported: a plan takes no TPU of this machine, and asks no cloud about one.
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    from growkit.cli.terminal import format_json
    from trainer.config.sections import resolve
    from trainer.config.values import read_values
    from trainer.plan.plan import describe_remedy, describe_shortage, find_target, make_plan

    values = read_values(config, list(overrides))
    if not values.get("model"):
        raise UsageError(f"there is no model to plan for: {config} has no model section")
    settings = resolve(values)
    on = find_target(topology)
    made = make_plan(settings, on)
    tried = [] if made.memory.fits else _tried(made)
    if as_json:
        click.echo(format_json(_document(made, tried, mfu, price)))
    else:
        _show(config, made, mfu, price)
    if made.memory.fits:
        return 0
    raise GrowkitError(f"{describe_shortage(made.memory, on.place)}; {describe_remedy(tried)}")


def _tried(made) -> list:
    """The remedies tried, each told as it is."""
    from trainer.plan.plan import make_plan, try_remedies

    tried = []
    for trial in try_remedies(made.config, made.mesh, lambda config: make_plan(config, made.target).memory):
        click.echo(f"tried {' '.join(trial.changes)}: {_need(trial.memory)}", err=True)
        tried.append(trial)
    return tried


def _need(memory) -> str:
    return f"{'' if memory.exact else 'at least '}{_gib(memory.peak)} of {_gib(memory.available)}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _show(name: str, made, mfu: float, price: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name} on {made.target.name}", show_header=False, title_justify="left")
    for row in _rows(made, mfu, price):
        table.add_row(*row)
    # To a file or a pipe rich would fold lines at 80 columns.
    Console(width=None if os.isatty(1) else 120).print(table)


def _rows(made, mfu: float, price: float | None) -> list[tuple[str, str]]:
    from growkit.quantity import format_count

    model, config, memory, on = made.model, made.config, made.memory, made.target
    batch = config.batch
    mesh = " x ".join(f"{axis} {size}" for axis, size in made.mesh.items())
    rows = [
        ("model", f"{model.layer} layers, embed {model.embed}, {model.head_count} heads, {model.parameters:,} parameters"),
        ("devices", f"{len(on.devices)} ({on.chips} chips), mesh {mesh}{', ZeRO-1' if config.mesh.zero1 else ''}"),
        ("step", f"{batch.sequences} x {config.model.context} tokens in {batch.accumulation}, remat {config.remat}"),
        ("attention", made.attention.words.removeprefix("attention: ")),
        (f"parameters a {on.place}", _gib(memory.parameters)),
        (f"optimizer a {on.place}", _gib(memory.optimizer)),
        (f"temporaries a {on.place}", f"{'' if memory.exact else 'at least '}{_gib(memory.temporaries)}"),
        (f"peak a {on.place}", f"{_need(memory)}: {'fits' if memory.fits else 'does not fit'}"),
        ("FLOPs a step", f"{made.flops:.3e}, {made.flops / len(on.devices):.3e} a {on.place}; with what is computed "
         f"again {made.computed:.3e}"),
    ]  # fmt: skip
    if on.peak is None:
        return [
            *rows,
            ("time", f"unknown: the peak FLOP/s of {on.devices[0].device_kind} is not known"),
        ]
    seconds, hours = made.estimate_step_seconds(mfu), made.estimate_hours(mfu)
    rows += [
        ("step time", f"{seconds:.3g} s at {mfu:.0%} MFU = FLOPs a step / (time x {on.peak / 1e12:,.0f} TFLOP/s)"),
        ("to the end", f"{hours / 24:.3g} days, {config.schedule.steps:,} steps, "
         f"{format_count(config.schedule.steps * made.tokens_per_step)} tokens"),
    ]  # fmt: skip
    if price is not None:
        rows.append(("cost", f"{made.estimate_cost(mfu, price):,.0f} at {price:g} a chip and hour"))
    return rows


def _document(made, tried: list, mfu: float, price: float | None) -> dict[str, Any]:
    """The plan as JSON: bytes a device, FLOPs, seconds."""
    from trainer.plan.plan import describe_remedy

    on, steps = made.target, made.config.schedule.steps
    fitting = tried[-1] if tried and tried[-1].memory.fits else None
    return {
        "topology": on.name,
        "devices": len(on.devices),
        "chips": on.chips,
        "mesh": made.mesh,
        "attention": {"name": made.attention.name, "reason": made.attention.reason},
        "parameters": made.model.parameters,
        "fits": made.memory.fits,
        "memory": _memory(made.memory),
        "flops_per_step": made.flops,
        "flops_computed_per_step": made.computed,
        "mfu": mfu,
        "peak_flops": on.peak,
        "step_seconds": made.estimate_step_seconds(mfu),
        "hours": made.estimate_hours(mfu),
        "steps": steps,
        "tokens": steps * made.tokens_per_step,
        "cost": None if price is None else made.estimate_cost(mfu, price),
        "tried": [
            {"changes": list(trial.changes), "memory": _memory(trial.memory)} for trial in tried
        ],
        "remedy": list(fitting.changes) if fitting else None,
        "advice": None if made.memory.fits else describe_remedy(tried),
    }


def _memory(memory) -> dict[str, Any]:
    return {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "temporaries": memory.temporaries,
        "peak": memory.peak,
        "available": memory.available,
        "exact": memory.exact,
    }


COMMANDS = {"plan": plan}
