"""Axis maps: which old unit each new unit copies, and what share of it the new unit carries.

`AxisMap(index, share)`: new unit i is a copy of old unit index[i] and carries share[i] of it. Where
the shares of every old unit sum to 1, whoever sums over the axis finds the old sum again. Maps
compose, and maps of different axes act independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# Up to so many stretches of neighbours are copied faster than as many single entries.
MOST_STRETCHES = 16


@dataclass(frozen=True, eq=False)
class AxisMap:
    """A map from `source` old units to len(index) new ones.

    index: int [new], the old unit that each new unit copies.
    share: float64 [new], the part of it that the new unit carries.

    >>> twice = tile(2, 4)
    >>> twice.index.tolist(), twice.share.tolist(), twice.preserves_sums
    ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5], True)
    >>> twice.then(make_map([0, 0, 1, 2, 3], 4)).index.tolist()
    [0, 0, 1, 0, 1]
    """

    index: np.ndarray
    share: np.ndarray
    source: int

    def __post_init__(self) -> None:
        if len(self.index) != len(self.share):
            raise ValueError(f"{len(self.index)} indices but {len(self.share)} shares")
        if not len(self.index):
            return
        low, high = int(self.index.min()), int(self.index.max())
        if low < 0 or high >= self.source:
            raise ValueError(f"indices run from {low} to {high}, source has {self.source} units")

    def __len__(self) -> int:
        return len(self.index)

    @property
    def copies(self) -> np.ndarray:
        """int [source]: how many new units copy each old one."""
        return np.bincount(self.index, minlength=self.source)

    @cached_property
    def stretches(self) -> list[slice]:
        """The old units that new ones copy one after another, in the order of the new ones."""
        # A stretch ends where the next new unit does not copy the next old one.
        cuts = np.flatnonzero(np.diff(self.index) != 1) + 1
        parts = np.split(self.index, cuts)
        return [slice(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]

    @property
    def preserves_sums(self) -> bool:
        """Whether the shares of every old unit sum to 1."""
        sums = np.bincount(self.index, weights=self.share, minlength=self.source)
        # Shares are quotients of small numbers in float64: their sums are off by some 1e-16.
        return bool(np.allclose(sums, 1.0, rtol=0, atol=1e-12))

    @property
    def next_copy(self) -> np.ndarray:
        """int [new]: the next new unit with the same source; after the last one the first."""
        # New units sorted by source: the copies of a source stand side by side, in ascending order.
        # Each is followed by its right neighbour, the last one of a group by the group's first.
        order = np.argsort(self.index, kind="stable")
        ends = np.cumsum(self.copies)
        copied = self.copies > 0
        following = np.arange(1, len(self) + 1)
        following[ends[copied] - 1] = (ends - self.copies)[copied]
        result = np.empty(len(self), np.int64)
        result[order] = order[following]
        return result

    @cached_property
    def added(self) -> np.ndarray:
        """bool [new]: the units that add nothing, and copies after the first that adds something.

        All others keep what their old units were.
        """
        added: np.ndarray = np.equal(self.share, 0.0)
        seen: set[int] = set()
        for unit, source in enumerate(self.index.tolist()):
            if source in seen:
                added[unit] = True
            elif not added[unit]:
                seen.add(source)
        return added

    def then(self, after: AxisMap) -> AxisMap:
        """This map followed by `after`: one map that does both."""
        if after.source != len(self):
            raise ValueError(
                f"maps do not meet: the first makes {len(self)} units, the second takes "
                f"{after.source}"
            )
        return AxisMap(self.index[after.index], self.share[after.index] * after.share, self.source)

    def extend(self, size: int) -> AxisMap:
        """This map with new units up to `size` that copy nothing: each is its own source."""
        added = size - len(self)
        # Units that copy nothing become sources, numbered after the old ones; so later copies of
        # them are counted as copies of one source.
        index = np.concatenate([self.index, self.source + np.arange(added)])
        share = np.concatenate([self.share, np.ones(added)])
        return AxisMap(index, share, self.source + added)


def gather(array: Any, axis_map: AxisMap, place: int) -> Any:
    """The entries of an array that a map copies, along dimension `place`."""
    if not isinstance(array, np.ndarray) or len(axis_map.stretches) > MOST_STRETCHES:
        return array.take(axis_map.index, axis=place)
    # Slices copy each stretch at once; take goes entry by entry.
    before = (slice(None),) * place
    parts = [array[(*before, stretch)] for stretch in axis_map.stretches]
    return np.concatenate(parts, axis=place)


def make_map(index: ArrayLike, source: int, share: Sequence[float] | None = None) -> AxisMap:
    """The map that an explicit list of old units gives; every share is 1 unless told."""
    units = np.asarray(index, np.int64)
    shares = np.ones(len(units)) if share is None else np.asarray(share, np.float64)
    return AxisMap(units, shares, source)


def replicate(source: int, target: int) -> AxisMap:
    """Each unit replicated in place, 0,0,1,1,...: floor(i * source / target), share 1.

    Gopher (arXiv 2112.11446), section G.3.3, gives round(i / target * source) for layers. To
    nearest it runs out of range when doubling, so the floor is taken, in integers.
    """
    return make_map(np.arange(target) * source // target, source)


def replicate_nearest(source: int, target: int) -> AxisMap:
    """Each unit replicated in place: i * source / target to nearest, half up, clipped; share 1."""
    # round(i * source / target) in whole numbers: (2 i source + target) / (2 target), rounded down.
    # In floats a tie could round either way.
    index = (2 * np.arange(target) * source + target) // (2 * target)
    return make_map(np.minimum(index, source - 1), source)


def stack(source: int, target: int) -> AxisMap:
    """Units 0..source-1 repeated as a whole, 0,1,2,0,1,2: i mod source, share 1.

    G_stack (arXiv 2405.15319).
    """
    return make_map(np.arange(target) % source, source)


def insert(source: int, target: int) -> AxisMap:
    """Copies inserted after their originals: originals have share 1, copies 0.

    LLaMA-Pro (arXiv 2401.02415), section 3.1: whoever sums over the axis finds the old sum.
    """
    index = np.arange(target) * source // target
    # Copies of a unit stand side by side, so a unit is an original where the index changes.
    first = np.concatenate([[True], index[1:] != index[:-1]])
    return AxisMap(index, first.astype(np.float64), source)


def tile(source: int, target: int) -> AxisMap:
    """Units 0..source-1 repeated as a whole; the copies of a unit have equal shares, which sum to
    1.
    """
    index = np.arange(target) % source
    return AxisMap(index, 1.0 / np.bincount(index, minlength=source)[index], source)


def repeat(source: int, target: int) -> AxisMap:
    """Each unit repeated in place; the copies of a unit have equal shares, which sum to 1."""
    index = np.arange(target) * source // target
    return AxisMap(index, 1.0 / np.bincount(index, minlength=source)[index], source)


def spread_shares(even: AxisMap, spread: float) -> AxisMap:
    """The same copies with shares that differ by up to `spread` (below 1) of themselves.

    Their sums stay. Copies that carry different shares have different gradients, so training tells
    them apart.
    """
    number = np.zeros(len(even))
    seen = np.zeros(even.source, np.int64)
    for unit, source in enumerate(even.index):
        number[unit] = seen[source]
        seen[source] += 1
    # Evenly spaced weights around 1 for the copies 0..c-1 of a source; their mean is 1.
    count = seen[even.index]
    place = 2.0 * number / np.maximum(count - 1, 1) - 1.0
    weight = 1.0 + spread * np.where(count > 1, place, 0.0)
    return AxisMap(even.index, even.share * weight, even.source)
