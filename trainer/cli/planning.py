"""The verb that says what a run would need: plan."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from growkit.cli.output import remark, show_result
from growkit.cli.signals import leave_on_signal
from trainer.plan.cost import MFU, require_mfu

if TYPE_CHECKING:
    from trainer.plan.plan import Plan
    from trainer.plan.remedies import Trial


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--topology",
    required=True,
    metavar="NAME",
    help="A TPU slice (v3-32, v3:4x4, v5e-16), cpu or gpu.",
)
@click.option(
    "--mfu",
    default=MFU,
    show_default=True,
    metavar="M",
    help="The model FLOPs utilization to assume.",
)
@click.option(
    "--price", type=float, metavar="P", help="Price of a chip for an hour; adds the cost."
)
@leave_on_signal()
def plan(
    config: str,
    overrides: tuple[str, ...],
    topology: str,
    mfu: float,
    price: float | None,
) -> int:
    """Compile the training step of CONFIG for --topology, and say what it needs.

    CONFIG is a YAML file or a preset. A plan for a TPU slice needs no TPU, only its compiler,
    libtpu, on any Linux machine (pip install 'growkit[tpu]'). Exit code 1 when the step does not
    fit in memory: then changes that could make it fit are tried, in the order of remat, ZeRO-1 and
    FSDP, more accumulation, a shorter context; each alone, then together.
    """
    require_mfu(mfu)
    _prepare_jax(topology)
    from growkit.errors import GrowkitError
    from trainer.cli.plan_report import build_document, show_plan
    from trainer.plan.remedies import describe_remedy, describe_shortage

    plan = _make_plan(config, overrides, topology)
    fits = plan.memory.fits
    tried = [] if fits else _try_remedies(plan)
    show_result(
        lambda: show_plan(config, plan, mfu, price),
        lambda: build_document(plan, tried, mfu, price),
    )
    if fits:
        return 0
    shortage = describe_shortage(plan.memory, plan.target.place)
    raise GrowkitError(f"{shortage}; {describe_remedy(tried)}")


def _prepare_jax(topology: str) -> None:
    """A plan for TPUs uses no TPU of this machine, and asks no cloud service about one."""
    if topology not in ("cpu", "gpu"):
        # Read when jax is imported, so not later than this.
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"


def _make_plan(config: str, overrides: tuple[str, ...], topology: str) -> Plan:
    from growkit.errors import UsageError
    from trainer.config.sections import resolve
    from trainer.config.values import read_values
    from trainer.plan.plan import make_plan
    from trainer.plan.topology import find_target

    values = read_values(config, list(overrides))
    if not values.get("model"):
        raise UsageError(f"{config} has no model section, so there is no model to plan for")
    settings = resolve(values)
    return make_plan(settings, find_target(topology))


def _try_remedies(plan: Plan) -> list[Trial]:
    """The remedies tried, each reported on standard error as it is tried."""
    from trainer.cli.plan_report import format_need
    from trainer.config.sections import Config
    from trainer.plan.compiler import Memory
    from trainer.plan.plan import make_plan
    from trainer.plan.remedies import try_remedies

    def measure(config: Config) -> Memory:
        return make_plan(config, plan.target).memory

    tried = []
    for trial in try_remedies(plan.config, plan.mesh, measure):
        remark(f"tried {' '.join(trial.changes)}: {format_need(trial.memory)}")
        tried.append(trial)
    return tried


COMMANDS = {"plan": plan}
