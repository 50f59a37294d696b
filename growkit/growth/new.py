"""What growth made new: whole layers, and units of the axes that grew in width.

New are the copies after the first of a unit, copies that add nothing yet (a share of 0), and what
padding added. All of it follows from the maps of a plan or of a lineage's entry. A parameter is new
where it belongs to a new layer (or another new stacked unit), and in part where some units of its
own axes are new.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from growkit.growth.axes import AxisMap
from growkit.growth.plan import Plan
from growkit.growth.shares import place_along
from growkit.models.architecture import Architecture
from growkit.models.notation import Part, Position, Product, Row

# Axis -> bool [size]: which units are new. Axes without new units are left out.
NewUnits = dict[str, np.ndarray]


@dataclass(frozen=True)
class NewParameter:
    """What is new of one parameter.

    whole: whether it belongs to a new layer or expert. axes: else the axes of which it has new
    units. elements: how many of its numbers are new.
    """

    name: str
    whole: bool
    axes: tuple[str, ...]
    elements: int


def find_new_units(growths: Sequence[Plan]) -> NewUnits:
    """Which units are new after growths, one after the other, beside the model before the first."""
    new: NewUnits = {}
    for plan in growths:
        for axis, size in plan.grown.sizes.items():
            before = new.get(axis, np.zeros(plan.model.sizes[axis], bool))
            after = _grow_units(before, plan.maps.get(axis), size)
            if after.any():
                new[axis] = after
    return new


def _grow_units(before: np.ndarray, axis_map: AxisMap | None, size: int) -> np.ndarray:
    """Which units of an axis are new after one growth."""
    if axis_map is not None:
        kept: np.ndarray = before[axis_map.index]
        after: np.ndarray = kept | axis_map.added
        return after
    # Padding puts new units after the old ones.
    return np.concatenate([before, np.ones(size - len(before), bool)])


def find_new_layers(growths: Sequence[Plan]) -> frozenset[int]:
    """The layers that growths added: copies after the first, and those with a share of 0."""
    new = find_new_units(growths).get("layer", np.zeros(0, bool))
    return frozenset(np.flatnonzero(new).tolist())


def list_new_parameters(model: Architecture, new: NewUnits) -> list[NewParameter]:
    """The parameters of a model of which something is new, in the order of files."""
    found = []
    for name, row, position in model.table.names(model.sizes):
        whole = is_new(row, position, new)
        total = math.prod(row.shape(model.sizes))
        axes = () if whole else tuple(axis for axis in model.sizes if axis in row.axes & new.keys())
        old = 0 if whole else sum(_count_old(part, model, new) for part in row.parts)
        if old < total:
            found.append(NewParameter(name, whole, axes, total - old))
    return found


def is_new(row: Row, position: Position, new: NewUnits) -> bool:
    """Whether a parameter as a whole belongs to a new unit of a stacked axis."""
    return any(
        bool(new[axis.name][unit])
        for axis, unit in zip(row.stacked, position, strict=True)
        if axis.name in new
    )


def _count_old(part: Part, model: Architecture, new: NewUnits) -> int:
    """How many numbers of a part are of old units along all of its axes."""
    old = [
        model.sizes[name] - int(new[name].sum()) if name in new else model.sizes[name]
        for name in part.names
    ]
    return math.prod(old)


def mark_new(row: Row, model: Architecture, new: NewUnits) -> tuple[np.ndarray, ...]:
    """What is new of a row's parameter, stacked axes first: bool arrays that broadcast to it.

    Each goes along one dimension and has size 1 along the others. A number is new where any of them
    is true. Dimensions without new units are left out.
    """
    dimensions = [((axis,),) for axis in row.stacked] + list(row.blocks)
    marks = []
    for place, terms in enumerate(dimensions):
        along = np.concatenate([_mark_product(axes, model, new) for axes in terms])
        if along.any():
            marks.append(place_along(along, place, len(dimensions)))
    return tuple(marks)


def _mark_product(axes: Product, model: Architecture, new: NewUnits) -> np.ndarray:
    """bool [product of the sizes]: where any of fused axes has a new unit."""
    shape = [model.sizes[axis.name] for axis in axes]
    marked = np.zeros(shape, bool)
    for place, axis in enumerate(axes):
        if axis.name in new:
            marked = marked | place_along(new[axis.name], place, len(axes))
    return marked.reshape(-1)


def describe_new(new: NewUnits) -> dict[str, str]:
    """The new units by axis, in words: {'layer': '1,3', 'mlp': '32-63'}."""
    return {axis: describe_units(units) for axis, units in new.items()}


def describe_units(units: np.ndarray) -> str:
    """The numbers of the units that are true, both ends of ranges included: '1,3,8-11'.

    >>> describe_units(np.array([False, True, False, True, True]))
    '1,3-4'
    """
    numbers = np.flatnonzero(units)
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ",".join(
        f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs if len(run)
    )


def parse_units(text: str, size: int) -> np.ndarray:
    """The inverse of `describe_units`, for an axis of so many units.

    >>> parse_units("1,3-4", 5).tolist()
    [False, True, False, True, True]
    """
    units = np.zeros(size, bool)
    for run in text.split(","):
        first, _, last = run.partition("-")
        units[int(first) : int(last or first) + 1] = True
    return units


def count_new(parameters: Sequence[NewParameter]) -> Mapping[str, int]:
    """How many parameters are new as a whole and in part, and how many numbers those are."""
    return {
        "whole": sum(each.whole for each in parameters),
        "part": sum(not each.whole for each in parameters),
        "elements": sum(each.elements for each in parameters),
    }
