"""The short form of growth in memory: a model, and what shall grow of it, in place of a plan."""

from __future__ import annotations

from collections.abc import Mapping

from growkit.errors import UsageError, require_type
from growkit.growth.depth import plan_depth
from growkit.growth.plan import Plan, combine_plans
from growkit.growth.width import plan_width
from growkit.models.architecture import Architecture

HINT = "as growkit.plan_depth(model, '18:24') returns, or a model with map='18:24' or embed='2x'"


def plan_short(
    plan: Plan | Architecture,
    layers: str | None,
    method: str | None,
    sizes: Mapping[str, str | int | None],
) -> Plan:
    """The plan given, or that of a model with a map of layers or sizes or both.

    layers, method: as `plan_depth` takes them. sizes: arguments of `plan_width` by name. Raises
    TypeError for anything else, UsageError where nothing shall grow and for a plan with sizes.
    """
    require_type("plan", plan, (Plan, Architecture), HINT)
    if layers is not None:
        require_type("map", layers, str, "as '18:24'")
    asked = {name: size for name, size in sizes.items() if size is not None}
    options = {"map": layers, "method": method, **asked}
    given = [name for name, value in options.items() if value is not None]
    if isinstance(plan, Plan):
        if given:
            raise UsageError(
                f"a plan says itself what grows, and {given[0]} is given as well; give a model "
                f"with {given[0]}, or the plan alone"
            )
        return plan
    if layers is None and method is not None:
        raise UsageError(f"method={method!r} is of layers, and goes with map, as map='18:24'")
    plans = []
    if layers is not None:
        plans.append(plan_depth(plan, layers, method))
    if asked:
        plans.append(plan_width(plan, **asked))  # type: ignore[arg-type]
    if not plans:
        raise UsageError("say what shall grow of the model: map='18:24', embed='2x' or both")
    return plans[0] if len(plans) == 1 else combine_plans("grow", plans, plan)
