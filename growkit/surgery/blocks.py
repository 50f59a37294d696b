"""Growth of one tensor on disk, a block at a time: what is read, when it is grown, where it is
written.

The axes of a parameter's first stored dimension, flattened, count its units; a block is a few of
them. Each block of source units is grown once, by `growkit.growth.rule`, and written to all places
of its copies. So memory does not depend on the size of the tensor. This file only cuts.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from growkit.checkpoint.tensor import BLOCK, Recipe, Tensor
from growkit.growth.plan import Plan
from growkit.growth.rule import PartGrowth, UnitGrowth, grow_array
from growkit.models.notation import Part, Position, Row

# (byte offset, array)
Piece = tuple[int, np.ndarray]


@dataclass(frozen=True)
class Stretch:
    """Neighbouring source units with the neighbouring new units that copy them."""

    source: int
    unit: int
    length: int


def grown_recipe(tensor: Tensor, row: Row, plan: Plan, moment: int, position: Position) -> Recipe:
    """The recipe of a tensor grown by a plan.

    tensor: the stored shape at the source's sizes, of the source unit that new unit `position`
    copies. One of more than BLOCK bytes is made in blocks of about so many.
    """
    shape = row.shape(plan.grown.sizes)
    size = math.prod(shape) * tensor.dtype.itemsize

    # A recipe is followed when the writer asks, perhaps twice: nothing is computed before.
    def pieces() -> Iterator[Piece]:
        if len(shape) < 2 or size <= BLOCK:
            yield 0, grow_array(tensor.read(), row, plan, moment, position)
            return
        offset = 0
        first_rows = 0
        for term in _terms(row):
            part = row.parts[term or 0]
            blocks = Blocks(tensor, row, plan, moment, position, term, first_rows)
            for start, array in blocks.pieces():
                yield offset + start, array
            first_rows += part.shape(plan.model.sizes)[0]
            offset += part.shape(plan.grown.sizes)[0] * math.prod(shape[1:]) * tensor.dtype.itemsize

    return Recipe(shape, tensor.dtype, pieces=pieces)


def _terms(row: Row) -> list[int | None]:
    """The terms of a first dimension that is a sum, one after another; else all at once."""
    return list(range(len(row.parts))) if row.summed == 0 else [None]


class Blocks:
    """One parameter, or moment of one, or one term of its first dimension, cut into blocks.

    first_row: the first stored row of the source that belongs to the term. lead: how many axes
    count the units.
    """

    def __init__(
        self,
        tensor: Tensor,
        row: Row,
        plan: Plan,
        moment: int,
        position: Position,
        term: int | None = None,
        first_row: int = 0,
    ):
        self.tensor = tensor
        self.plan = plan
        self.first_row = first_row

        # The axes of the first stored dimension, slowest first: the leading ones count units, the
        # others lie within a unit.
        part = row.parts[term or 0]
        self.names = [axis.name for axis in part.dimensions[0]]
        self.lead = count_leading(part, plan)
        self.before = tuple(plan.model.sizes[name] for name in self.names)
        self.growth = UnitGrowth(row, plan, moment, position, self.lead, term)
        self.copied = self._leading.copied[: self.lead]

        # Units of the source, in rows of the stored array.
        self.units = math.prod(self.before[: self.lead])
        self.rows_per_unit = math.prod(self.before[self.lead :])

        # A unit of the output, in bytes.
        rows_per_new_unit = math.prod(plan.grown.sizes[name] for name in self.names[self.lead :])
        row_bytes = math.prod(row.shape(plan.grown.sizes)[1:]) * tensor.dtype.itemsize
        self.unit_bytes = rows_per_new_unit * row_bytes

    @property
    def _leading(self) -> PartGrowth:
        """Any of the parts: all have the same leading axes."""
        return self.growth.growths[0]

    @cached_property
    def stretches(self) -> list[list[Stretch]]:
        """All first copies, then all second ones, and so on: by source unit, as stretches."""
        origin = np.zeros((), np.int64)
        for name, size in zip(self.names[: self.lead], self.before, strict=False):
            axis_map = self.plan.maps.get(name)
            index = np.arange(size) if axis_map is None else axis_map.index
            origin = origin[..., None] * size + index
        # `order` lists new units by source unit, each group ascending; `begin` is where a group
        # starts. The n-th copies of all sources are then found at once, without a Python loop over
        # units.
        order = np.argsort(origin.reshape(-1), kind="stable")
        count = np.bincount(origin.reshape(-1), minlength=self.units)
        begin = np.cumsum(count) - count
        found = []
        for number in range(count.max(initial=0)):
            sources = np.flatnonzero(count > number)
            found.append(_find_stretches(sources, order[begin[sources] + number]))
        return found

    def pieces(self) -> Iterator[Piece]:
        """(byte offset, array) of every block, once for each of its places."""
        reused = not any(growth.depends_on_place for growth in self.growth.growths)
        if self.growth.measures:
            for start, stop in self._cut_source():
                self.growth.measure(self._read(start, stop))
        for start, stop in self._cut_source():
            block = self._read(start, stop)
            # Most stretches of a block are the same source units with the same factors, at another
            # place: the array of the last stretch is then written again and not grown again.
            last_place: tuple[int, int] | None = None
            last_factors: list[np.ndarray | None] = []
            for stretch in self._find_copies(start, stop):
                units = np.arange(stretch.unit, stretch.unit + stretch.length)
                factors = [growth.factor_at(units) for growth in self.growth.growths]
                place = (stretch.source, stretch.length)
                if not (reused and last_place == place and _same(factors, last_factors)):
                    first = stretch.source - start
                    array = self.growth.grow(block[first : first + stretch.length], units)
                last_place = place
                last_factors = factors
                yield stretch.unit * self.unit_bytes, array
        yield from self._add_units()

    def _cut_source(self) -> Iterator[tuple[int, int]]:
        """(first, last) source units of each block.

        Where head_dim is padded, fused queries, keys and values grow by rules of their own and are
        not mixed.
        """
        # At least a unit, about BLOCK bytes of output, and no less than a stored chunk, which is
        # decoded whole for any part of it.
        step = max(1, BLOCK // self.unit_bytes, self.tensor.stride // self.rows_per_unit)
        # A block may not cross from queries to keys where those are padded differently.
        run = self.units
        if "qkv" in self.names[: self.lead] and "head_dim" in self.plan.pads:
            after = self.names.index("qkv") + 1
            run = math.prod(self.before[after : self.lead])
        for begin in range(0, self.units, run):
            for start in range(begin, begin + run, step):
                yield start, min(start + step, begin + run)

    def _read(self, start: int, stop: int) -> np.ndarray:
        first = self.first_row + start * self.rows_per_unit
        last = self.first_row + stop * self.rows_per_unit
        array = self.tensor.rows(first, last)
        return array.reshape(stop - start, self.rows_per_unit, *array.shape[1:])

    def _find_copies(self, start: int, stop: int) -> Iterator[Stretch]:
        """Every stretch of copies of a block's source units."""
        for stretches in self.stretches:
            # The first stretch that may reach into the block: stretches are in order of their
            # source.
            at = max(0, bisect_right(stretches, start, key=lambda stretch: stretch.source) - 1)
            while at < len(stretches) and stretches[at].source < stop:
                stretch = stretches[at]
                first = max(stretch.source, start)
                last = min(stretch.source + stretch.length, stop)
                if first < last:
                    yield Stretch(first, stretch.unit + first - stretch.source, last - first)
                at += 1

    def _add_units(self) -> Iterator[Piece]:
        """The units that padding of the first axis adds, after the old ones."""
        if self._leading.outer is None:
            return
        # New units are numbered after the copies; their number is also their place in the output.
        old = math.prod(self.copied)
        new = math.prod(self.plan.grown.sizes[name] for name in self.names[: self.lead])
        step = max(1, BLOCK // self.unit_bytes)
        for start in range(old, new, step):
            units = np.arange(start, min(start + step, new))
            yield start * self.unit_bytes, self.growth.add(units, self.tensor.dtype)


def count_leading(part: Part, plan: Plan) -> int:
    """How many axes of the first dimension count units: those before the first that is padded.

    Where that stands first, it counts them itself, alone; but not one that queries, keys and values
    share.
    """
    names = [axis.name for axis in part.dimensions[0]]
    before = next((place for place, name in enumerate(names) if name in plan.pads), len(names))
    if before > 0:
        return before
    return 0 if names[0] == "head_dim" and part.role == "qkv" else 1


def _find_stretches(sources: np.ndarray, units: np.ndarray) -> list[Stretch]:
    """Ascending source units and the new units that copy them, as stretches that go up by one."""
    breaks = (np.diff(units) != 1) | (np.diff(sources) != 1)
    borders = pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), len(units)])
    return [
        Stretch(int(sources[first]), int(units[first]), last - first) for first, last in borders
    ]


def _same(some: list[np.ndarray | None], others: list[np.ndarray | None]) -> bool:
    """Whether two lists of factors are equal."""
    if len(some) != len(others):
        return False
    return all(
        one is other or (one is not None and other is not None and np.array_equal(one, other))
        for one, other in zip(some, others, strict=True)
    )
