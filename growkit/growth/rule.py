"""Expansion: one array grown along the axes of its row, by the one rule of growth.

Values are scaled by the shares of the axes a parameter reads. Gradients, and with them Adam's moments, are
scaled by the shares of the axes it writes: mu once, nu twice, because the gradient that reaches a copy
is its share of the gradient of its source. Works on numpy and jax arrays alike, one parameter at a time.
Knows neither names in files nor which maps belong together; padding is in `growkit.growth.padding`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from growkit.growth.axes import AxisMap
from growkit.growth.noise import UNIT, centred, uniform
from growkit.growth.padding import MU, NU, VALUE, pad
from growkit.models.notation import Row

if TYPE_CHECKING:
    from growkit.growth.plan import Plan

FEW = 16
NARROW = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


def expand(
    array: Any,
    row: Row,
    sizes: Mapping[str, int],
    maps: Mapping[str, AxisMap],
    moment: int = VALUE,
    layer: int | None = None,
) -> Any:
    """Grow one layer's parameter, or its first (`moment` 1) or second (2) moment.

    array: the row's stored shape at `sizes`, taken from the source layer that new layer `layer` copies.
    Returns the stored shape at the sizes the maps make, in the array's dtype; narrow floats are multiplied
    in float32 and rounded once.
    """
    grown = multiplied(
        _copied(array.reshape(row.unfused(sizes)), row, maps), share_scale(row, maps, moment, layer)
    )
    return grown.reshape(
        row.shape({**sizes, **{name: len(axis_map) for name, axis_map in maps.items()}})
    )


def _copied(array: Any, row: Row, maps: Mapping[str, AxisMap]) -> Any:
    for place, axis in enumerate(row.axes):
        if axis.name in maps:
            array = gathered(array, maps[axis.name], place)
    return array


def gathered(array: Any, axis_map: AxisMap, place: int) -> Any:
    """The entries of an array that a map copies, along dimension `place`."""
    if not isinstance(array, np.ndarray) or len(axis_map.stretches) > FEW:
        return array.take(axis_map.index, axis=place)
    # A few stretches of neighbours are copied faster than as many single entries.
    before = (slice(None),) * place
    return np.concatenate([array[(*before, stretch)] for stretch in axis_map.stretches], axis=place)


def multiplied(array: Any, scale: np.ndarray | None) -> Any:
    """The product, rounded once to the array's dtype."""
    if scale is None:
        return array
    wide = np.float32 if array.dtype in NARROW else array.dtype
    return (array.astype(wide, copy=False) * scale.astype(wide)).astype(array.dtype, copy=False)


def share_scale(
    row: Row, maps: Mapping[str, AxisMap], moment: int = VALUE, layer: int | None = None
) -> np.ndarray | None:
    """What `expand` multiplies by: float64, broadcastable to the unfused shape, or None where all is one.

    The layer axis counts for values only: copies of layers have no exact rule for moments.
    """
    scale = np.ones([1] * len(row.axes))
    for place, axis in enumerate(row.axes):
        counts = axis.read if moment == VALUE else not axis.read
        if axis.name in maps and counts:
            scale = scale * _along(maps[axis.name].share ** max(moment, 1), place, row)
    if (
        moment == VALUE
        and row.stacked is not None
        and row.stacked.read
        and row.stacked.name in maps
    ):
        if layer is None:
            raise ValueError(f"{row.name} sums over layers: which new layer is it?")
        scale = scale * maps[row.stacked.name].share[layer]
    return None if (scale == 1.0).all() else scale


def _along(values: np.ndarray, place: int, row: Row) -> np.ndarray:
    """A vector laid along dimension `place` of the row's unfused shape."""
    return values.reshape([-1 if at == place else 1 for at in range(len(row.axes))])


def moment_fate(plan: Plan, row: Row, moment: int, layer: int | None) -> str:
    """What becomes of a moment: 'zero', 'copy' (gathered, not scaled) or 'map' (the rule)."""
    if plan.moments == "reset" or (plan.moments == "nu-only" and moment == MU):
        return "zero"
    if plan.moments == "copy":
        return "copy"
    if moment == NU:
        return "map"
    # mu is mostly the noise of the last batches: where the gradients are new ones, it starts again.
    copied = (
        row.stacked is not None and "layer" in plan.maps and plan.maps["layer"].share[layer] == 0.0
    )
    return "zero" if copied or not plan.preserved else "map"


def grow_tensor(
    array: Any, row: Row, plan: Plan, moment: int = VALUE, layer: int | None = None, xp: Any = np
) -> Any:
    """Grow one layer's parameter or moment by a plan: copies with their shares, noise, padding.

    array: the stored shape at the source's sizes, of the source layer that new layer `layer` copies. xp: numpy,
    or jax.numpy for jax arrays.
    """
    fate = "map" if moment == VALUE else moment_fate(plan, row, moment, layer)
    shape, name = row.shape(plan.grown.sizes), row.named(layer)
    if fate == "zero":
        return xp.zeros(shape, array.dtype)
    grown = _copied(array.reshape(row.unfused(plan.model.sizes)), row, plan.maps)
    if fate == "map":
        grown = multiplied(grown, share_scale(row, plan.maps, moment, layer))
    place = noise_place(row, plan) if moment == VALUE else None
    if place is not None:
        number = centred(plan.seed, f"{name} noise", grown.shape, xp)
        following = number.take(plan.maps[row.axes[place].name].next_copy, axis=place)
        grown = with_noise(grown, number, following, plan, xp)

    def free(size: tuple[int, ...], what: str) -> Any:
        return uniform(plan.seed, f"{name} {what}", size, xp, plan.model.initializer_range)

    return pad(grown, row, plan.pads, moment, plan.model.norm, free, fate == "map", xp).reshape(
        shape
    )


def noise_place(row: Row, plan: Plan) -> int | None:
    """The dimension along which a parameter gets noise: the first copied axis that the row reads; None for no noise."""
    for place, axis in enumerate(row.axes):
        axis_map = plan.maps.get(axis.name)
        if plan.noise and axis.read and axis_map is not None and (axis_map.copies > 1).any():
            return place
    return None


def with_noise(grown: Any, number: Any, following: Any, plan: Plan, xp: Any = np) -> Any:
    """Add noise that sums to zero over the copies of each source unit.

    Each copy gets its own number (see `growkit.growth.noise.centred`) less the next copy's, exactly: what reads equal copies
    finds the old sum.
    """
    wide = np.float32 if grown.dtype in NARROW else grown.dtype
    spread = np.float32(plan.noise * plan.model.initializer_range * UNIT * math.sqrt(0.5))
    noise = (number - following).astype(wide) * xp.asarray(spread, wide)
    return (_rounded(grown.astype(wide), xp) + _rounded(noise, xp)).astype(grown.dtype)


def _rounded(product: Any, xp: Any) -> Any:
    """The product itself. A compiler that multiplies and adds in one step, rounding once, cannot do so across this."""
    return xp.maximum(product, xp.finfo(product.dtype).min)


def needs_work(row: Row, plan: Plan, moment: int, layer: int | None) -> bool:
    """Whether a new tensor is more than the same bytes of a source layer again."""
    if any(axis.name in plan.maps or axis.name in plan.pads for axis in row.axes):
        return True
    return share_scale(row, plan.maps, moment, layer) is not None
