"""Growth of one tensor on disk, a block at a time: what is read, made, and where it is written.

The axes of a parameter's first stored dimension, flattened, count its units; a block is a few of them. Each
block of source units is grown once and written wherever its copies belong, so that memory does not depend on
the size of the tensor. Gives bit for bit what `growkit.growth.rule.grow_tensor`, whose rules these are, makes of
the whole. Knows only how to cut.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np

from growkit.checkpoint.tensor import BLOCK, Recipe, Tensor
from growkit.growth.noise import centred, uniform
from growkit.growth.padding import (
    PADDED,
    PARTS,
    VALUE,
    Free,
    Rule,
    extended,
    fill_name,
    filled,
    rule_of,
    scaled,
    summed,
)
from growkit.growth.plan import Plan
from growkit.growth.rule import (
    gathered,
    grow_tensor,
    moment_fate,
    multiplied,
    noise_place,
    share_scale,
    with_noise,
)
from growkit.models.notation import Row

Piece = tuple[int, np.ndarray]
# First source unit, first new unit, how many.
Stretch = tuple[int, int, int]


def grown_recipe(tensor: Tensor, row: Row, plan: Plan, moment: int, layer: int | None) -> Recipe:
    """The recipe of a tensor grown by a plan.

    tensor: the stored shape at the source's sizes, of the source layer that new layer `layer` copies.
    """
    shape = row.shape(plan.grown.sizes)
    size = math.prod(shape) * tensor.dtype.itemsize

    def pieces() -> Iterator[Piece]:
        if len(shape) == 1 or size <= BLOCK:
            yield 0, grow_tensor(tensor.read(), row, plan, moment, layer)
        else:
            yield from Blocks(tensor, row, plan, moment, layer).pieces()

    return Recipe(shape, tensor.dtype, pieces=pieces)


class Blocks:
    """One parameter, or moment of one, that grows.

    lead: how many axes count the units: those of the first stored dimension, or of them those before a padded
    head_dim. before, copied, after: the unfused shapes of the source, with its copies, and with its padding too.
    """

    def __init__(self, tensor: Tensor, row: Row, plan: Plan, moment: int, layer: int | None):
        self.tensor, self.row, self.plan, self.moment = tensor, row, plan, moment
        self.name, self.names = row.named(layer), [axis.name for axis in row.axes]
        first = [axis.name for axis in row.dimensions[0]]
        padded_within = "head_dim" in plan.pads and "head_dim" in first
        self.lead = first.index("head_dim") if padded_within else len(first)
        # Queries, keys and values are padded by rules of their own: then a block is one unit, of one kind.
        self.apart = padded_within and "qkv" in first
        self.before = row.unfused(plan.model.sizes)
        self.copied = tuple(
            len(plan.maps[name]) if name in plan.maps else size
            for name, size in zip(self.names, self.before, strict=True)
        )
        self.after = row.unfused(plan.grown.sizes)
        self.by_rule = moment == VALUE or moment_fate(plan, row, moment, layer) == "map"
        scale = share_scale(row, plan.maps, moment, layer) if self.by_rule else None
        self.scale = None if scale is None else _narrowed(scale)
        # The scale of every unit, where it is the same.
        alike = self.scale is not None and max(self.scale.shape[: self.lead]) == 1
        self.uniform = self.scale[(0,) * self.lead][None] if alike else None
        self.noise_place = noise_place(row, plan) if moment == VALUE else None
        self.unit_bytes = math.prod(self.after[self.lead :]) * tensor.dtype.itemsize
        self.rows_per_unit = math.prod(self.before[self.lead : len(first)])
        self.stretches = self._stretches()
        padded = [name for name in self.names if name in plan.pads]
        # Whether equal copies differ by where they lie.
        self.placed = self.noise_place is not None or bool(padded)
        self.outer = self._rule("embed") if "embed" in padded and self.names[0] == "embed" else None
        self.sum: np.ndarray | None = None

    def _stretches(self) -> list[list[Stretch]]:
        """All first copies, then all second ones, and so on: by source unit, as stretches that go up by one."""
        origin = np.zeros((), np.int64)
        for name, size in zip(self.names[: self.lead], self.before, strict=False):
            axis_map = self.plan.maps.get(name)
            origin = origin[..., None] * size + (
                np.arange(size) if axis_map is None else axis_map.index
            )
        order = np.argsort(origin.reshape(-1), kind="stable")
        count = np.bincount(origin.reshape(-1), minlength=math.prod(self.before[: self.lead]))
        begin, found = np.cumsum(count) - count, []
        for number in range(count.max(initial=0)):
            sources = np.flatnonzero(count > number)
            units = order[begin[sources] + number]
            cuts = np.flatnonzero((np.diff(units) != 1) | (np.diff(sources) != 1)) + 1
            borders = pairwise([0, *cuts.tolist(), len(units)])
            found.append(
                [(int(sources[first]), int(units[first]), last - first) for first, last in borders]
            )
        return found

    def pieces(self) -> Iterator[Piece]:
        """(byte offset, array) of every block, once for each of its places."""
        for start, stop in self._source_blocks():
            block, made, before = self._read(start, stop), None, None
            for first, last, unit in self._runs(start, stop):
                units = np.arange(unit, unit + last - first)
                factor = self._factor(units)
                if made != (first, last) or self.placed or not _same(factor, before):
                    array = self._finished(
                        self._copied(block[first - start : last - start], units, factor), units
                    )
                made, before = (first, last), factor
                yield unit * self.unit_bytes, array
        yield from self._added()

    def _source_blocks(self) -> Iterator[tuple[int, int]]:
        """(first, last) source units of each block."""
        step = max(1, BLOCK // self.unit_bytes, self.tensor.stride // self.rows_per_unit)
        step = 1 if self.apart else step
        units = math.prod(self.before[: self.lead])
        yield from ((start, min(start + step, units)) for start in range(0, units, step))

    def _read(self, start: int, stop: int) -> np.ndarray:
        array = self.tensor.rows(start * self.rows_per_unit, stop * self.rows_per_unit)
        return array.reshape(stop - start, *self.before[self.lead :])

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(first and last source unit, first new unit) of every stretch of copies of a block."""
        for stretches in self.stretches:
            at = max(0, bisect_right(stretches, start, key=lambda stretch: stretch[0]) - 1)
            while at < len(stretches) and stretches[at][0] < stop:
                source, unit, length = stretches[at]
                first, last = max(source, start), min(source + length, stop)
                if first < last:
                    yield first, last, unit + first - source
                at += 1

    def _factor(self, units: np.ndarray) -> np.ndarray | None:
        """The part of the scale that is these units', [units or 1, ...]."""
        if self.scale is None or self.uniform is not None:
            return self.uniform
        at = np.unravel_index(units, self.copied[: self.lead])
        return self.scale[
            tuple(i * (size > 1) for i, size in zip(at, self.scale.shape, strict=False))
        ]

    def _copied(
        self, array: np.ndarray, units: np.ndarray, factor: np.ndarray | None
    ) -> np.ndarray:
        """Copies of source units, with their shares and noise, before padding."""
        # Equal shares are multiplied by once, before there are copies.
        equal = factor is None or math.prod(factor.shape[1:]) == 1
        array = multiplied(array, factor) if equal else array
        for place, name in enumerate(self.names[self.lead :], 1):
            if name in self.plan.maps:
                array = gathered(array, self.plan.maps[name], place)
        array = array if equal else multiplied(array, factor)
        if self.noise_place is None:
            return array
        number, following = self._numbers(units), self._following(units)
        return with_noise(array, number, following, self.plan)

    def _numbers(self, units: np.ndarray) -> np.ndarray:
        """The random numbers of consecutive units."""
        shape = (len(units), *self.copied[self.lead :])
        first = int(units[0]) * math.prod(shape[1:])
        return centred(self.plan.seed, f"{self.name} noise", shape, first=first)

    def _following(self, units: np.ndarray) -> np.ndarray:
        """The random numbers of the next copies along the axis that noise goes along."""
        next_copy = self.plan.maps[self.names[self.noise_place]].next_copy
        if self.noise_place >= self.lead:
            return self._numbers(units).take(next_copy, axis=self.noise_place - self.lead + 1)
        at = list(np.unravel_index(units, self.copied[: self.lead]))
        at[self.noise_place] = next_copy[at[self.noise_place]]
        following = np.ravel_multi_index(at, self.copied[: self.lead])
        return np.concatenate([self._numbers(following[i : i + 1]) for i in range(len(following))])

    def _finished(self, array: np.ndarray, units: np.ndarray) -> np.ndarray:
        """Copied units, padded: old entries scaled by the rules, new ones added within the units."""
        if self.outer is not None:
            wide = scaled(array, self.outer)
            if self.outer.fill == "mean":
                self.sum = summed(wide if self.sum is None else np.concatenate([self.sum, wide]), 0)
            array = wide.astype(array.dtype)
        return self._padded_within(array, units)

    def _padded_within(self, array: np.ndarray, units: np.ndarray) -> np.ndarray:
        for axis in PADDED:
            if axis in self.plan.pads and axis in self.names[self.lead :]:
                split = axis == "head_dim" and self.apart
                part = PARTS[units[0] % len(PARTS)] if split else self.row.part
                place = self.names.index(axis) - self.lead + 1
                free = self._free(int(units[0]) // (len(PARTS) if split else 1))
                what = fill_name(axis, part, split)
                array = extended(
                    array, place, self.plan.pads[axis], self._rule(axis, part), free, what
                )
        return array

    def _added(self) -> Iterator[Piece]:
        """The units that padding adds, after the old ones."""
        old, new = (math.prod(sizes[: self.lead]) for sizes in (self.copied, self.after))
        step = max(1, BLOCK // self.unit_bytes)
        for start in range(old, new, step):
            units = np.arange(start, min(start + step, new))
            mean = None if self.sum is None else self.sum / old
            shape = (len(units), *self.copied[self.lead :])
            wide = np.float64 if self.tensor.dtype == np.float64 else np.float32
            array = filled(self.outer, shape, mean, self._free(start - old), "embed", wide).astype(
                self.tensor.dtype
            )
            yield start * self.unit_bytes, self._padded_within(array, units)

    def _rule(self, axis: str, part: str | None = None) -> Rule:
        growth = self.plan.pads[axis] / self.plan.model.sizes[axis]
        rule = rule_of(axis, self.row, part, self.moment, growth, self.plan.model.norm)
        return rule if self.by_rule else replace(rule, scale=1.0)

    def _free(self, first: int) -> Free:
        """What makes the random fill of some units, of which `first` come before."""
        seed, spread = self.plan.seed, self.plan.model.initializer_range
        return lambda shape, what: uniform(
            seed, f"{self.name} {what}", shape, np, spread, first * math.prod(shape[1:])
        )


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def _narrowed(scale: np.ndarray) -> np.ndarray:
    """A scale with one entry along every dimension that it is the same along."""
    for place in range(scale.ndim):
        first = scale.take([0], axis=place)
        scale = first if (scale == first).all() else scale
    return scale
