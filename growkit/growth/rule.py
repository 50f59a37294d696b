"""The one rule of growth, for an array or a part of it.

Values are scaled by the shares of the axes that a parameter reads. Gradients, and with them Adam's
moments, are scaled by the shares of the axes that it writes: mu once, nu twice, because the
gradient that reaches a copy is its share of the gradient of its source. Then come noise and
padding.

`PartGrowth.grow` is the only place where numbers change. It takes all of a parameter, or some of
its leading units (see `lead`), and works on numpy and jax arrays alike, under jit too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from growkit.growth.axes import gather
from growkit.growth.noise import uniform
from growkit.growth.padding import (
    MU,
    NU,
    PADDED,
    VALUE,
    Rule,
    extend,
    fill_new,
    rule_along,
    scale_old,
    scale_with_offset,
    sum_along,
)
from growkit.growth.precision import wide_dtype
from growkit.growth.routers import draw_rows, draws_rows
from growkit.growth.separation import Separation, find_place
from growkit.growth.shares import is_added, keep_first, narrow, scale_of
from growkit.growth.vocabulary import rule_of_tokens
from growkit.models.notation import ATTENTION, Part, Position, Row

if TYPE_CHECKING:
    from growkit.growth.plan import Plan


def grow_array(
    array: Any, row: Row, plan: Plan, moment: int = VALUE, position: Position = (), xp: Any = np
) -> Any:
    """Grow one unit's parameter, or its first (`moment` 1) or second (2) moment.

    array: the row's stored shape at the source's sizes, of the source unit that the new unit
    `position` of the stacked axes copies. xp: numpy, or jax.numpy for jax arrays. Returns the
    stored shape at the grown sizes in the array's dtype; narrow floats are computed in float32 and
    rounded once a step.
    Raises ValueError for a position that is not of the row's stacked axes.
    """
    if len(position) != len(row.stacked):
        stacked = ", ".join(axis.name for axis in row.stacked) or "nothing"
        raise ValueError(f"{row.name} is stacked by {stacked}: which new unit is {position}?")
    plan = plan.at(row, position)
    if moment_fate(plan, row, moment, position) == "zero":
        return xp.zeros(row.shape(plan.grown.sizes), array.dtype)
    growth = UnitGrowth(row, plan, moment, position)
    if growth.measures:
        growth.measure(array[None], xp)
    return growth.grow(array[None], np.zeros(1, np.int64), xp)[0, ...]


def moment_fate(plan: Plan, row: Row, moment: int, position: Position) -> str:
    """What becomes of an array: 'zero', 'copy' (gathered, not scaled) or 'map' (the rule).

    Moments of first copies alone are zero where all of the array is another copy's; where some
    units of its own axes are, `PartGrowth` makes them zero.
    """
    if moment == VALUE:
        return "map"
    if plan.keeps_first and is_added(plan, row, position):
        return "zero"
    if plan.keeps_first:
        return "map" if plan.moments == "first" else "copy"
    if plan.moments == "reset" or (plan.moments == "nu-only" and moment == MU):
        return "zero"
    if plan.moments == "copy":
        return "copy"
    if moment == NU:
        return "map"
    # mu is mostly the noise of the last batches: where the gradients are new ones, it starts again.
    inserted = any(
        axis.name == "layer" and "layer" in plan.maps and plan.maps["layer"].share[unit] == 0.0
        for axis, unit in zip(row.stacked, position, strict=True)
    )
    return "zero" if inserted or not plan.preserved else "map"


def needs_work(row: Row, plan: Plan, moment: int, position: Position) -> bool:
    """Whether a new tensor is more than the same bytes of a source unit again."""
    # Most tensors of a growth in depth are copies: their bytes are then written without a look.
    if row.axes & (plan.maps.keys() | plan.pads.keys()):
        return True
    scales = (scale_of(part, row, plan, moment, position) for part in row.parts)
    return any(scale is not None for scale in scales)


def find_source(plan: Plan, row: Row, position: Position) -> Position:
    """The source unit of the stacked axes that a new unit copies."""
    plan = plan.at(row, position)
    return tuple(
        int(plan.maps[axis.name].index[unit]) if axis.name in plan.maps else unit
        for axis, unit in zip(row.stacked, position, strict=True)
    )


def multiply(array: Any, scale: np.ndarray | None, offset: float = 0.0, xp: Any = np) -> Any:
    """The product, rounded once to the array's dtype; with an offset that of offset + array."""
    if scale is None:
        return array
    wide = wide_dtype(array.dtype)
    scaled = scale_with_offset(array.astype(wide, copy=False), scale.astype(wide), offset, xp)
    return scaled.astype(array.dtype, copy=False)


class UnitGrowth:
    """Growth of some leading units of a parameter: of each block of a summed dimension by itself.

    lead: how many axes of the first stored dimension count the units; with 0 there is one unit, the
    whole. term: of a first dimension that is a sum, the one block that the units are of.
    """

    def __init__(
        self,
        row: Row,
        plan: Plan,
        moment: int = VALUE,
        position: Position = (),
        lead: int = 0,
        term: int | None = None,
    ):
        self.parts = row.parts if term is None else row.parts[term : term + 1]
        self.growths = [PartGrowth(part, row, plan, moment, position, lead) for part in self.parts]
        self.sum_axis = None if term is not None or row.summed is None else row.summed + 1
        self.sizes = plan.model.sizes

    def grow(self, array: Any, units: np.ndarray, xp: Any = np) -> Any:
        """The grown units.

        array: [unit, rest of the first dimension, other stored dimensions] of the source. units:
        which new unit each is, in ascending order and one after another.
        """
        pieces = self._split(array, xp)
        grown = [
            growth.grow_stored(piece, units, xp)
            for growth, piece in zip(self.growths, pieces, strict=True)
        ]
        return grown[0] if self.sum_axis is None else xp.concatenate(grown, axis=self.sum_axis)

    def _split(self, array: Any, xp: Any) -> Any:
        """The pieces of an array that each growth is of."""
        if self.sum_axis is None:
            return [array]
        lengths = [part.shape(self.sizes)[self.sum_axis - 1] for part in self.parts]
        return xp.split(array, np.cumsum(lengths)[:-1], axis=self.sum_axis)

    @property
    def measures(self) -> bool:
        """Whether `measure` must see all of the source's units before any of them grows."""
        found = [growth.separation for growth in self.growths]
        return any(noise is not None and noise.measures for noise in found)

    def measure(self, array: Any, xp: Any = np) -> None:
        """Take in some of the source's units, as `grow` takes them, each once."""
        for growth, piece in zip(self.growths, self._split(array, xp), strict=True):
            if growth.separation is not None:
                growth.separation.measure(piece, xp)

    def add(self, units: np.ndarray, dtype: Any) -> np.ndarray:
        """Units that padding of the first axis adds; after all old ones were grown, which give the
        mean.
        """
        added = [growth.add_stored(units, dtype) for growth in self.growths]
        return added[0] if self.sum_axis is None else np.concatenate(added, axis=self.sum_axis)


class PartGrowth:
    """Growth of one block of a parameter: copies with their shares, noise, padding.

    before, copied, after: the unfused shapes of the source, with its copies, and with its padding
    too. The first `lead` axes count units; the others, inner ones, lie within a unit.
    """

    def __init__(
        self, part: Part, row: Row, plan: Plan, moment: int, position: Position, lead: int
    ):
        self.part = part
        self.row = row
        self.plan = plan
        self.moment = moment
        self.lead = lead
        label = "" if part.label is None else f" {part.label}"
        self.name = row.name_at(position) + label
        self.before = part.unfused(plan.model.sizes)
        self.after = part.unfused(plan.grown.sizes)
        self.copied = tuple(
            len(plan.maps[name]) if name in plan.maps else size
            for name, size in zip(part.names, self.before, strict=True)
        )
        # Moments that are copied as they are (--moments copy) take no shares.
        self.by_rule = moment_fate(plan, row, moment, position) == "map"
        scale = scale_of(part, row, plan, moment, position) if self.by_rule else None
        if moment != VALUE and plan.keeps_first:
            scale = keep_first(part.axes, plan.maps, scale)
        self.scale = None if scale is None else narrow(scale)
        self.offset = row.offset if moment == VALUE else 0.0
        # The sum of old units so far, where new ones are their mean.
        self.sum: np.ndarray | None = None
        self.separation: Separation | None = None
        place = find_place(part, plan, moment)
        if place is not None:
            separation = Separation(plan, part, place, self.name, self.copied, lead, self.scale)
            self.separation = separation

    @cached_property
    def padded(self) -> list[int]:
        """The places of the axes that are padded, in the order in which they are."""
        names = self.part.names
        axes = [axis for axis in PADDED if axis in self.plan.pads]
        return [place for axis in axes for place, name in enumerate(names) if name == axis]

    @cached_property
    def outer(self) -> Rule | None:
        """The rule of padding where the axis that counts units is itself padded."""
        counts = self.lead > 0 and 0 in self.padded
        return self._rule(0, self.part.role) if counts else None

    @cached_property
    def depends_on_place(self) -> bool:
        """Whether equal copies differ by where they lie."""
        return self.separation is not None or bool(self.padded)

    def factor_at(self, units: np.ndarray) -> np.ndarray | None:
        """The part of the scale that is these units', [units or 1, inner axes]."""
        if self.scale is None:
            return None
        outer = self.scale.shape[: self.lead]
        if math.prod(outer) == 1:
            return self.scale.reshape(1, *self.scale.shape[self.lead :])
        # `units` are flat numbers over the leading axes; the scale has a dimension for each axis.
        at = np.unravel_index(units, self.copied[: self.lead])
        # A dimension of one entry holds for every unit.
        place = tuple(i * (size > 1) for i, size in zip(at, outer, strict=True))
        return np.asarray(self.scale[place])

    def grow_stored(self, array: Any, units: np.ndarray, xp: Any = np) -> Any:
        """As `UnitGrowth.grow`."""
        inner = array.reshape(len(units), *self.before[self.lead :])
        return self._merge_dimensions(self._pad(self._copy(inner, units, xp), units, xp))

    def add_stored(self, units: np.ndarray, dtype: Any) -> np.ndarray:
        """As `UnitGrowth.add`."""
        assert self.outer is not None
        # Padding goes axis by axis, and a later axis pads what an earlier one added: so new units
        # are made between those two, as in the whole array.
        begun = self.padded.index(0)
        # Axes that are padded before this one have their new size already.
        inner = list(self.copied)
        for place in self.padded[:begun]:
            inner[place] = self.after[place]
        mean = None if self.sum is None else self.sum / self.copied[0]
        free = self._random_from(int(units[0]) - self.copied[0])
        shape = (len(units), *inner[1:])
        new = fill_new(self.outer, shape, mean, free, self.part.names[0], wide_dtype(dtype))
        new = new.astype(dtype)
        for place in self.padded[begun + 1 :]:
            new = self._extend(new, place, units, np)
        return np.asarray(self._merge_dimensions(new))

    def _merge_dimensions(self, array: Any) -> Any:
        """[unit, inner axes] as [unit, rest of the first dimension, other stored dimensions]."""
        if not self.part.dimensions:
            return array
        first, *others = self.part.dimensions
        place = 1 + len(first) - self.lead
        shape = [array.shape[0], math.prod(array.shape[1:place])]
        for dimension in others:
            shape.append(math.prod(array.shape[place : place + len(dimension)]))
            place += len(dimension)
        return array.reshape(shape)

    def _copy(self, array: Any, units: np.ndarray, xp: Any) -> Any:
        """Copies of source units, with their shares and noise, before padding."""
        factor = self.factor_at(units)
        # A factor that is the same within each unit multiplies once, before there are copies.
        equal = factor is None or math.prod(factor.shape[1:]) == 1
        if equal:
            array = multiply(array, factor, self.offset, xp)
        for place, name in enumerate(self.part.names[self.lead :], 1):
            if name in self.plan.maps:
                array = gather(array, self.plan.maps[name], place)
        if not equal:
            array = multiply(array, factor, self.offset, xp)
        if self.moment == VALUE and draws_rows(self.part, self.plan):
            array = draw_rows(array, self.name, self.plan, units if self.lead else None, xp)
        return array if self.separation is None else self.separation.add(array, units, xp)

    def _pad(self, array: Any, units: np.ndarray, xp: Any) -> Any:
        """Copied units, padded: old entries scaled, new ones added within the units."""
        for place in self.padded:
            if place < self.lead:
                array = self._pad_outer(array, xp)
            else:
                array = self._extend(array, place, units, xp)
        return array

    def _pad_outer(self, array: Any, xp: Any) -> Any:
        """Old units by the rule of the axis that counts them; `add_stored` makes the new ones."""
        assert self.outer is not None
        wide = scale_old(array, self.outer, xp)
        if self.outer.fill == "mean":
            begun = wide if self.sum is None else xp.concatenate([self.sum, wide])
            self.sum = sum_along(begun, 0, xp)
        return wide.astype(array.dtype)

    def _extend(self, array: Any, place: int, units: np.ndarray, xp: Any) -> Any:
        """Pad one axis within the units."""
        axis, role = self.part.names[place], self.part.role
        if axis == "head_dim" and role == "qkv":
            return self._extend_heads(array, place, units, xp)
        return self._extend_as(array, place, role, axis, int(units[0]), xp)

    def _extend_heads(self, array: Any, place: int, units: np.ndarray, xp: Any) -> Any:
        """Pad head_dim of fused queries, keys and values, each kind by its own rule.

        The fill of a kind is numbered as if the kind lay alone.
        """
        kind = self.part.names.index("qkv")
        if kind >= self.lead:
            across = kind - self.lead + 1
            pieces = xp.split(array, len(ATTENTION), axis=across)
            padded = [
                self._extend_as(piece, place, role, f"head_dim {role}", int(units[0]), xp)
                for role, piece in zip(ATTENTION, pieces, strict=True)
            ]
            return xp.concatenate(padded, axis=across)
        at = [int(each) for each in np.unravel_index(int(units[0]), self.copied[: self.lead])]
        role = ATTENTION[at.pop(kind)]
        others = [size for n, size in enumerate(self.copied[: self.lead]) if n != kind]
        first = int(np.ravel_multi_index(at, others)) if at else 0
        return self._extend_as(array, place, role, f"head_dim {role}", first, xp)

    def _extend_as(self, array: Any, place: int, role: str, what: str, first: int, xp: Any) -> Any:
        """Pad one axis by the rule of a role. what: the fill's name; first: its first unit's
        number.
        """
        size, along = self.after[place], place - self.lead + 1
        free = self._random_from(first, xp)
        return extend(array, along, size, self._rule(place, role), free, what, xp)

    def _rule(self, place: int, role: str) -> Rule:
        axis, model = self.part.axes[place], self.plan.model
        if axis.name == "vocab":
            rule = rule_of_tokens(self.row, self.moment, self.plan)
            return replace(rule, given=self._copy_row()) if rule.fill == "given" else rule
        growth = self.plan.pads[axis.name] / model.sizes[axis.name]
        rule = rule_along(axis, self.row, role, self.moment, growth, model.norm)
        return rule if self.by_rule else replace(rule, scale=1.0)

    def _copy_row(self) -> np.ndarray:
        """The row of new tokens that was measured, copied in width as old rows are."""
        assert self.plan.vocab_row is not None
        # A dimension of one token stands first, as in a block of one unit.
        row = np.asarray(self.plan.vocab_row.numbers).reshape(self.before[1:])
        for place, name in enumerate(self.part.names[1:]):
            if name in self.plan.maps:
                row = gather(row, self.plan.maps[name], place)
        return row if self.scale is None else row * self.scale[0]

    def _random_from(self, first: int, xp: Any = np) -> Any:
        """What makes the random fill of some units, of which `first` come before."""
        seed, spread = self.plan.seed, self.plan.model.initializer_range

        def random(shape: Sequence[int], what: str) -> Any:
            begin = first * math.prod(shape[1:])
            return uniform(seed, f"{self.name} {what}", tuple(shape), xp, spread, begin)

        return random
