"""Growth as the trainer meets it: made at start or on the way, and what a lineage's growths ask of the training.

Knows the configuration's grow section, which multipliers the optimizer owes, whether a validation loss must be the
source's, where a re-warm-up begins, and when copies stay equal. Leaves plans to growkit and training to the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from growkit.entries import Growth
from growkit.errors import GrowkitError, UsageError
from growkit.growth.depth import plan_depth
from growkit.growth.multipliers import multipliers
from growkit.growth.plan import Plan, combine_plans, set_options
from growkit.growth.width import plan_width
from growkit.lineage import Lineage
from growkit.models.architecture import Architecture
from trainer.config.sections import Config, Dropout, Grow, build_architecture, build_section
from trainer.log.history import GROWN
from trainer.step.optimizer import Multipliers
from trainer.step.plateau import find_plateaus

# By how much a validation loss, nats a token, may differ after exact growth: what rounding explains.
ROUNDING = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-2}


def plan_growth(settings: Grow, model: Architecture) -> Plan | None:
    """The plan of a grow section for the source's model, None when it grows nothing. Raises UsageError."""
    plans = []
    if settings.map:
        plans.append(plan_depth(model, settings.map, settings.depth_method))
    sizes = {
        name: getattr(settings, name) or None for name in ("embed", "heads", "mlp", "head_dim")
    }
    if any(sizes.values()):
        plans.append(
            plan_width(model, **sizes, method=settings.width_method or None, spread=settings.spread)
        )
    if not plans:
        if settings != Grow():
            raise UsageError(
                "the grow section has options but no growth: set grow.map, or grow.embed, heads, mlp or head_dim"
            )
        return None
    plan = plans[0] if len(plans) == 1 else combine_plans("grow", plans, model)
    return set_options(plan, moments=settings.moments, noise=settings.noise, seed=settings.seed)


def plan_later_growth(config: Config) -> Plan | None:
    """The plan of the growth that comes on the way, None when there is none. Raises UsageError."""
    return plan_growth(config.grow, build_architecture(config.model)) if config.grow.at else None


def is_growth_due(config: Config, step: int, losses: Sequence[float]) -> bool:
    """Whether the growth on the way comes at this step, by its number or by the validation losses so far."""
    if config.grow.at == "plateau":
        return bool(find_plateaus(losses, config.schedule.plateau))
    return step >= int(config.grow.at)


def grow_config(config: Config, plan: Plan) -> Config:
    """The configuration that a run goes by once that growth is made: the grown model, the schedule going on."""
    return replace(
        config, model=build_section(plan.grown), schedule=replace(config.schedule, continued=True)
    )


def select_multipliers(setting: str, lineage: Lineage, model: Architecture) -> Multipliers | None:
    """The multipliers to apply to a model of this lineage, None for none. setting: on, off or auto."""
    growths = lineage.growths_owed()
    if setting == "off" or not growths or (setting == "auto" and not lineage.continues):
        return None
    return Multipliers(**multipliers(model, [growth.plan_within(model) for growth in growths]))


def compute_allowed_gap(config: Config) -> float:
    """Nats a token by which exact growth may move the validation loss, in this run's arithmetic."""
    return max(ROUNDING[config.precision.params], ROUNDING[config.precision.compute])


def describe_beginning(lineage: Lineage, step: int) -> str:
    """The first event of a run, or of what follows a growth at a step of it: which sizes grew, where any did."""
    growth = lineage.before_last.last_as(Growth)
    if growth is None:
        return "start"
    changed = ", ".join(f"{axis} {old} to {new}" for axis, (old, new) in growth.changes.items())
    return f"{GROWN}: {changed}" if step else f"start, {GROWN}: {changed}"


def describe_growths(lineage: Lineage, model: Architecture, dropout: Dropout) -> Iterator[str]:
    """What the growths before this training mean for it, in sentences."""
    if lineage.last_training.multipliers:
        yield "exact growth in width: learning rates, eps and clip weights are multiplied for each parameter"
    if tied := find_tied_axes(lineage.before_last, model, dropout):
        yield (
            f"warning: the copies of {', '.join(tied)} have equal gradients and dropout is 0, so they stay equal; "
            f"grow with --noise or --spread, or train with dropout"
        )


def compare_with_source(
    lineage: Lineage, loss: float, source: Mapping[str, Any], windows: str, allowed: float
) -> str | None:
    """What the first validation loss after exact growth is beside the source's last one; None without such growth.

    source: the source's record. windows: what the validation ran on. Raises GrowkitError where the two losses differ
    by more than `allowed`.
    """
    growths = lineage.last_growths()
    if not growths or not all(growth.preserved for growth in growths):
        return None
    before = source.get("validation_loss")
    if before is None or source.get("validation_windows") != windows:
        return (
            "growth was exact; the source has no validation loss on these windows to compare with"
        )
    if abs(loss - before) > allowed:
        raise GrowkitError(
            f"growth was exact, but the validation loss went from {before:.6f} to {loss:.6f}, by more than the "
            f"{allowed:g} that rounding explains; --allow-gap trains on all the same"
        )
    return (
        f"growth was exact: the source's validation loss was {before:.6f}, this one's is {loss:.6f}"
    )


def find_tied_axes(lineage: Lineage, model: Architecture, dropout: Dropout) -> tuple[str, ...]:
    """The axes whose copies, made by the last growth, will stay equal: exact copies, trained without dropout."""
    growths = lineage.last_growths()
    if not growths or dropout.hidden or dropout.attention or dropout.embedding:
        return ()
    return growths[-1].plan_within(model).tied_copies
