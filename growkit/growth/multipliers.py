"""What an optimizer must multiply so that an exactly widened model goes on as the small one would.

A copy that carries a share of its source's value must move by that share (learning rate: the value's scale);
its gradients are smaller by the shares it writes (Adam's eps: mu's scale); and a global norm must count every
source's gradient once (clip: 1 / (mu's scale squared x copies)). Width by copies alone is exact, see
`Plan.continues`. Which growths of a lineage ask for multipliers, `growkit.lineage` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit.growth.plan import Plan
from growkit.models.architecture import Architecture
from growkit.models.notation import Row


@dataclass(frozen=True)
class Copied:
    """An axis of a grown model against its origin: each unit's share of its source, and the source's copies."""

    share: np.ndarray
    copies: np.ndarray


def copied_axes(growths: Sequence[Plan]) -> dict[str, Copied]:
    """Every axis that the growths, one after the other, copied. New units of a padding are nobody's copies."""
    axes: dict[str, Copied] = {}
    for plan in growths:
        for axis, size in plan.model.sizes.items():
            before = axes.get(axis, Copied(np.ones(size), np.ones(size)))
            if axis in plan.maps:
                axis_map = plan.maps[axis]
                index = axis_map.index
                share = before.share[index] * axis_map.share
                axes[axis] = Copied(share, before.copies[index] * axis_map.copies[index])
            elif axis in axes and axis in plan.pads:
                new = np.ones(plan.pads[axis] - size)
                axes[axis] = Copied(
                    *(np.concatenate([old, new]) for old in (before.share, before.copies))
                )
    axes.pop("layer", None)
    return axes


def multipliers(model: Architecture, growths: Sequence[Plan]) -> dict[str, dict[str, Any]]:
    """{'learning_rate' | 'eps' | 'clip': the trainer's tree of factors}, each a number, or an array where units differ.

    Arrays have the row's stored shape, with a leading dimension of 1 for stacked rows.
    """
    axes = copied_axes(growths)
    trees: dict[str, dict[str, Any]] = {"learning_rate": {}, "eps": {}, "clip": {}}
    for row in model.table.rows:
        for name, factor in _factors(row, axes).items():
            node = trees[name]
            for key in row.path[:-1]:
                node = node.setdefault(key, {})
            node[row.path[-1]] = _stored(factor, row, model)
    return trees


def _factors(row: Row, axes: Mapping[str, Copied]) -> dict[str, np.ndarray]:
    """The three factors of a row, broadcastable to its unfused shape."""
    read, written, copies = (np.ones([1] * len(row.axes)) for _ in range(3))
    for place, axis in enumerate(row.axes):
        if axis.name in axes:
            along = [-1 if at == place else 1 for at in range(len(row.axes))]
            share, count = (
                _once(each).reshape(along)
                for each in (axes[axis.name].share, axes[axis.name].copies)
            )
            read, written = (read * share, written) if axis.read else (read, written * share)
            copies = copies * count
    return {"learning_rate": read, "eps": written, "clip": 1.0 / (written**2 * copies)}


def _once(values: np.ndarray) -> np.ndarray:
    """A vector, or what it holds once if that is one number: factors of two axes would fill a whole parameter."""
    return values[:1] if (values == values[0]).all() else values


def _stored(factor: np.ndarray, row: Row, model: Architecture) -> float | np.ndarray:
    if (factor == factor.flat[0]).all():
        return float(factor.flat[0])
    whole = np.broadcast_to(factor, row.unfused(model.sizes)).reshape(row.shape(model.sizes))
    return whole[None] if row.stacked is not None else whole


def describe_multipliers(plan: Plan) -> dict[str, dict[str, float | str]]:
    """For a lineage: row -> its three factors, 'per element' where units differ; rows with all factors 1 left out."""
    model, axes, rows = plan.grown, copied_axes([plan]), {}
    for row in model.table.rows:
        factors = {
            name: _stored(factor, row, model) for name, factor in _factors(row, axes).items()
        }
        if any(not isinstance(factor, float) or factor != 1.0 for factor in factors.values()):
            rows[row.name] = {
                n: f if isinstance(f, float) else "per element" for n, f in factors.items()
            }
    return rows
