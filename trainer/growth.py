"""Growth as the trainer meets it: a growth made at start, and what a lineage's growths ask of the training.

Knows the configuration's grow section, which multipliers the optimizer owes, whether a validation loss must be the
source's, and when copies stay equal. Leaves plans to growkit and training to the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growkit.depth import plan_depth
from growkit.errors import UsageError
from growkit.multipliers import Lineage, continues, growths_after, growths_owed, multipliers
from growkit.neox import NeoX
from growkit.plan import Plan, combined, plan_from, with_options
from growkit.width import plan_width
from trainer.config import Config, Dropout, Grow
from trainer.optimizer import Multipliers

# By how much a validation loss, nats a token, may differ after exact growth: what rounding explains.
ROUNDING = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-2}


def planned(settings: Grow, model: NeoX) -> Plan | None:
    """The plan of a grow section for the source's model, None when it grows nothing. Raises UsageError."""
    plans = []
    if settings.map:
        plans.append(plan_depth(model, settings.map, settings.depth_method))
    sizes = {name: getattr(settings, name) or None for name in ("embed", "heads", "mlp", "head_dim")}
    if any(sizes.values()):
        plans.append(plan_width(model, **sizes, method=settings.width_method or None, spread=settings.spread))
    if not plans:
        if settings != Grow():
            raise UsageError(
                "the grow section has options but no growth: set grow.map, or grow.embed, heads, mlp or head_dim"
            )
        return None
    plan = plans[0] if len(plans) == 1 else combined("grow", plans, model)
    return with_options(plan, moments=settings.moments, noise=settings.noise, seed=settings.seed)


def last_growths(lineage: Lineage) -> list[Mapping[str, Any]]:
    """The growths at the end of a source's lineage, which no training has followed."""
    return growths_after(lineage, lambda entry: entry.get("operation") == "train")


def owed(setting: str, lineage: Lineage, model: NeoX) -> Multipliers | None:
    """The multipliers to apply to a model of this lineage, None for none. setting: on, off or auto."""
    growths = growths_owed(lineage)
    if setting == "off" or not growths or (setting == "auto" and not continues(lineage)):
        return None
    return Multipliers(**multipliers(model, growths))


def gap_allowed(config: Config) -> float:
    """Nats a token by which exact growth may move the validation loss, in this run's arithmetic."""
    return max(ROUNDING[config.precision.params], ROUNDING[config.precision.compute])


def tied_axes(lineage: Lineage, model: NeoX, dropout: Dropout) -> tuple[str, ...]:
    """The axes whose copies, made by the last growth, will stay equal: exact copies, trained without dropout."""
    growths = last_growths(lineage)
    if not growths or dropout.hidden or dropout.attention or dropout.embedding:
        return ()
    entry = growths[-1]
    return plan_from(entry, model.resized(entry["sizes"]["before"])).tied_copies
