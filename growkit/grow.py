"""Expansion: one array grown along the axes of its row, by the one rule of growth.

Values are scaled by the shares of the axes a parameter reads. Gradients, and with them Adam's moments, are
scaled by the shares of the axes it writes: mu once, nu twice, because the gradient that reaches a copy
is its share of the gradient of its source. Works on numpy and jax arrays alike, one parameter at a time.
Knows neither names in files nor which maps belong together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from growkit.axes import AxisMap
from growkit.spec import Row

VALUE, MU, NU = 0, 1, 2
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
    grown = array.reshape(row.unfused(sizes))
    for place, axis in enumerate(row.axes):
        if axis.name in maps:
            grown = grown.take(maps[axis.name].index, axis=place)
    scale = share_scale(row, maps, moment, layer)
    if scale is not None:
        wide = np.float32 if grown.dtype in NARROW else grown.dtype
        grown = (grown.astype(wide) * scale.astype(wide)).astype(grown.dtype)
    return grown.reshape(row.shape({**sizes, **{name: len(axis_map) for name, axis_map in maps.items()}}))


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
            factor = maps[axis.name].share ** max(moment, 1)
            scale = scale * factor.reshape([-1 if other == place else 1 for other in range(len(row.axes))])
    if moment == VALUE and row.stacked is not None and row.stacked.read and row.stacked.name in maps:
        if layer is None:
            raise ValueError(f"{row.name} sums over layers: which new layer is it?")
        scale = scale * maps[row.stacked.name].share[layer]
    return None if (scale == 1.0).all() else scale
