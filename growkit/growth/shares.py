"""What growth multiplies a parameter or a moment by.

That is a product: the shares of the axes that it reads (values) or writes (moments), the shares of
the stacked axes, and the ratio of a factor of the model that follows a size (see
`Architecture.scalar_growth`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from growkit.growth.axes import AxisMap
from growkit.growth.padding import VALUE
from growkit.models.notation import Part, Position, Product, Row

if TYPE_CHECKING:
    from growkit.growth.plan import Plan


def share_scale(axes: Product, maps: Mapping[str, AxisMap], moment: int = VALUE) -> np.ndarray:
    """The product of shares that scales a value or a moment: float64, a dimension for each axis.

    Of the axes that are read for values; of those that are written for moments, once for mu, twice
    for nu. Dimensions along which it does not differ have one entry.
    """
    scale = np.ones([1] * len(axes))
    for place, axis in enumerate(axes):
        counts = axis.read if moment == VALUE else not axis.read
        if axis.name in maps and counts:
            share = narrow(maps[axis.name].share)
            # A gradient that a unit writes is `share` times its source's: mu is of first order in
            # it, nu of second, so its share is squared. Values carry it once.
            scale = scale * place_along(share ** max(moment, 1), place, len(axes))
    return scale


def place_along(values: np.ndarray, place: int, axes: int) -> np.ndarray:
    """A vector as an array of `axes` dimensions, of size 1 but for the dimension `place`."""
    return values.reshape([-1 if at == place else 1 for at in range(axes)])


def stacked_share(row: Row, maps: Mapping[str, AxisMap], moment: int, position: Position) -> float:
    """The share that a unit of the stacked axes carries.

    Layers count for values only: copies of layers have no exact rule for moments.
    """
    share = 1.0
    for axis, unit in zip(row.stacked, position, strict=True):
        if axis.name not in maps:
            continue
        if moment == VALUE and axis.read:
            share *= maps[axis.name].share[unit]
        # A layer's gradient depends on what lies above and below, so copies of layers have no share
        # that would hold for moments.
        if moment != VALUE and not axis.read and axis.name != "layer":
            share *= maps[axis.name].share[unit] ** moment
    return share


def scale_of(
    part: Part, row: Row, plan: Plan, moment: int, position: Position
) -> np.ndarray | None:
    """What growth multiplies by: float64, broadcastable to the unfused shape, None where all is
    one.
    """
    scale = share_scale(part.axes, plan.maps, moment)
    scale = scale * stacked_share(row, plan.maps, moment, position)
    ratio = plan.model.scalar_growth(row, plan.grown)
    if ratio != 1.0:
        # The model multiplies the parameter by f: the value takes 1/f, so its gradient takes f.
        scale = scale * ratio ** (1 if moment == VALUE else -moment)
    if "embed" in plan.pads and plan.model.table.normalises_queries:
        scale = scale * _eps_scale(part, plan, moment)
    return None if (scale == 1.0).all() else scale


def _eps_scale(part: Part, plan: Plan, moment: int) -> np.ndarray:
    """What queries and keys are scaled by so that their own norms, which share eps, see its new
    value.

    Padding embed multiplies the configuration's one eps by d/d', so queries and keys shrink by its
    root.
    """
    root = math.sqrt(plan.model.embed / plan.pads["embed"])
    factor = root ** (1 if moment == VALUE else -moment)
    if part.role in ("query", "key"):
        return np.full([1] * len(part.axes), factor)
    if part.role == "qkv":
        return place_along(np.array([factor, factor, 1.0]), part.names.index("qkv"), len(part.axes))
    return np.ones([1] * len(part.axes))


def is_added(plan: Plan, row: Row, position: Position) -> bool:
    """Whether a unit of the stacked axes adds nothing, or is a copy after the first."""
    return any(
        bool(plan.maps[axis.name].added[unit])
        for axis, unit in zip(row.stacked, position, strict=True)
        if axis.name in plan.maps
    )


def keep_first(
    axes: Product, maps: Mapping[str, AxisMap], scale: np.ndarray | None
) -> np.ndarray | None:
    """A scale of moments that is zero for all but the first copy of each unit.

    An element is of a first copy where it is along all of the axes, read or written. scale: None
    for ones. Returns None where no axis is copied and `scale` is None.
    """
    for place, axis in enumerate(axes):
        if axis.name in maps:
            first = place_along(~maps[axis.name].added * 1.0, place, len(axes))
            scale = first if scale is None else scale * first
    return scale


def narrow(scale: np.ndarray) -> np.ndarray:
    """A scale with one entry along every dimension that it is the same along."""
    for place in range(scale.ndim):
        # One entry is broadcast later: a scale that is equal along an axis of millions costs
        # nothing.
        first = scale.take([0], axis=place)
        scale = first if (scale == first).all() else scale
    return scale
