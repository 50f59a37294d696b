"""Kinds of layers: layers that attend to a window beside others that do not, each with its rotary
positions.

All layers are one scan whatever their kinds: what differs is data, chosen in each layer by the
number of its kind. A model whose layers are all of one kind has nothing to choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit.models.architecture import Architecture
from growkit.models.computation import SLIDING
from trainer.model.rotary import compute_rotary_tables

Tables = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class LayerKind:
    """window: how many positions a layer reads, its own among them; None for all of the past.

    rope: the key of its rotary parameters.
    """

    window: int | None
    rope: str


def list_kinds(model: Architecture, time: int) -> list[LayerKind]:
    """The kind of every layer for texts of T tokens: a window that holds the text is none."""
    computation = model.family.computation
    assert computation is not None
    window = model.number("window")
    has_window = computation.windows == "all"
    found = []
    for number in range(model.layer):
        attention = model.kinds[number] if model.kinds else ""
        slides = has_window or attention == SLIDING
        width = int(window) if window and slides and window < time else None
        found.append(LayerKind(width, attention if computation.rotary_by_kind else ""))
    return found


def number_kinds(kinds: list[LayerKind]) -> tuple[tuple[LayerKind, ...], np.ndarray]:
    """The different kinds, and the number [layer] of each layer's."""
    different = tuple(dict.fromkeys(kinds))
    return different, np.asarray([different.index(kind) for kind in kinds], np.int32)


def compute_tables(
    model: Architecture, kinds: tuple[LayerKind, ...], time: int, dtype: Any = np.float32
) -> Tables:
    """Cosine and sine [T, R/2], or [K, T, R/2] for K kinds that differ in them; empty for a model
    without rotary positions.
    """
    ropes = model.ropes
    if not ropes:
        return ()
    names = [kind.rope for kind in kinds]
    tables = [compute_rotary_tables(model, ropes[name], time, dtype) for name in names]
    if len(set(names)) == 1:
        return tables[0]
    return tuple(np.stack(each) for each in zip(*tables, strict=True))
