"""`growkit inspect --new`: which parameters, and which parts of which, growth made new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Source
    from growkit.growth.new import NewParameter

NOTHING = (
    "new          nothing: every growth in the lineage was followed by a training of all "
    "parameters, or there is none"
)


def collect_new(source: Source) -> dict[str, Any]:
    """The new units by axis, and what is new of each parameter, for JSON.

    Parameters that are not listed are old.
    """
    from growkit.growth.new import count_new, describe_new

    units, parameters = _find_new(source)
    named = {
        each.name: {"new": "whole" if each.whole else list(each.axes), "elements": each.elements}
        for each in parameters
    }
    counts = dict(count_new(parameters))
    return {"new": {"units": describe_new(units), "counts": counts, "parameters": named}}


def format_new(source: Source) -> str:
    """The same for a reader: a line for each axis, then one for each parameter."""
    from growkit.growth.new import count_new, describe_units

    units, parameters = _find_new(source)
    if not parameters:
        return NOTHING
    counts = count_new(parameters)
    share = counts["elements"] / source.model.parameters
    lines = [
        f"new          {counts['elements']:,} of {source.model.parameters:,} numbers "
        f"({share:.1%}): {counts['whole']} whole parameters, parts of {counts['part']}; all "
        "others are old"
    ]
    lines += [
        f"             {axis}: {describe_units(mask)} of {len(mask)}"
        for axis, mask in units.items()
    ]
    lines += [f"             {_describe(each)}" for each in parameters]
    return "\n".join(lines)


def _find_new(source: Source) -> tuple[dict[str, Any], Sequence[NewParameter]]:
    """The new units of a model on disk, and what is new of its parameters."""
    from growkit.growth.new import find_new_units, list_new_parameters
    from growkit.lineage import Lineage

    growths = Lineage.read(source.lineage).growths_new()
    units = find_new_units([growth.plan_within(source.model) for growth in growths])
    return units, list_new_parameters(source.model, units)


def _describe(each: NewParameter) -> str:
    what = "whole" if each.whole else f"new units of {', '.join(each.axes)}"
    return f"{each.name}: {what}, {each.elements:,} numbers"
