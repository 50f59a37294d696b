"""Models on disk against each other: two sources tensor by tensor, an output against its plan.

`compare_sources` is `growkit diff`, `find_mismatch` is `growkit verify`. Two threads take a tensor
each; never more than a block of both its sides is in memory for either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit.checkpoint.abreast import map_abreast
from growkit.checkpoint.reading import Reader, split_numbers
from growkit.checkpoint.tensor import BLOCK, SLOTS, Contents, Recipe, Source, Tensor
from growkit.entries import MALFORMED, Growth
from growkit.errors import GrowkitError, UsageError
from growkit.growth.plan import Plan
from growkit.lineage import Lineage, unreadable_plan
from growkit.surgery.grow import prepare_growth
from growkit.surgery.upcycling import express_source

EQUAL, DIFFERS = "equal", "differs"
# Bytes, and numbers, that are compared at once.
WORD, TILE = 8, 1 << 14

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Comparison:
    """One tensor of two models: 'equal' (the same bits), 'differs', 'only in A' or 'only in B'.

    largest: the largest difference of two numbers, NaN where one of them is none; None for other
    shapes or one side only. detail: what else differs, in words.
    """

    slot: str
    name: str
    verdict: str
    largest: float | None = None
    detail: str = ""


def compare_sources(
    a: Source, b: Source, progress: Progress = lambda done: None
) -> Iterator[Comparison]:
    """Every tensor of either model, read when its turn comes; progress is told the bytes of both
    that are done.
    """
    pairs = [
        _Pair(slot, name, a.tensors.get(slot, {}).get(name), b.tensors.get(slot, {}).get(name))
        for slot in SLOTS
        for name in dict.fromkeys([*a.tensors.get(slot, ()), *b.tensors.get(slot, ())])
    ]
    for pair, found in zip(pairs, map_abreast(_Pair.compare, pairs), strict=True):
        yield found
        progress(pair.size)


@dataclass(frozen=True)
class _Pair:
    """A tensor of two models; None where one of them has none."""

    slot: str
    name: str
    ours: Tensor | None
    theirs: Tensor | None

    @property
    def size(self) -> int:
        """Bytes of both."""
        return sum(tensor.size for tensor in (self.ours, self.theirs) if tensor is not None)

    def compare(self) -> Comparison:
        if self.theirs is None:
            return Comparison(self.slot, self.name, "only in A")
        if self.ours is None:
            return Comparison(self.slot, self.name, "only in B")
        return _compare(self.slot, self.name, self.ours, self.theirs)


def _compare(slot: str, name: str, ours: Tensor, theirs: Tensor) -> Comparison:
    if ours.shape != theirs.shape:
        detail = f"shape {list(ours.shape)} and {list(theirs.shape)}"
        return Comparison(slot, name, DIFFERS, None, detail)
    detail = "" if ours.dtype == theirs.dtype else f"{ours.dtype} and {theirs.dtype}"
    equal = not detail
    largest = 0.0
    with Reader(ours) as one, Reader(theirs) as other:
        for start, stop in split_numbers([ours, theirs], BLOCK):
            a = one.read(start, stop)
            b = other.read(start, stop)
            if detail or not has_same_bits(a, b):
                equal = False
                largest = float(np.maximum(largest, largest_difference(a, b)))
    return Comparison(slot, name, EQUAL if equal else DIFFERS, largest, detail)


def has_same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one shape and dtype have the same bytes: NaN equals itself here, and
    0.0 is not -0.0.
    """
    one, other = (np.ascontiguousarray(each).reshape(-1).view(np.uint8) for each in (a, b))
    # As words of 8 bytes: an eighth of the comparisons, and of the answers to look through.
    words = one.size // WORD * WORD
    same = one[:words].view(np.uint64) == other[:words].view(np.uint64)
    return bool(same.all()) and np.array_equal(one[words:], other[words:])


def count_differing(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """How many numbers of two arrays of one shape and dtype have other bits, and the place of the
    first, in C order.
    """
    if has_same_bits(a, b):
        return 0, 0
    bits = np.dtype(f"u{a.dtype.itemsize}")
    one = np.ascontiguousarray(a).reshape(-1).view(bits)
    other = one != np.ascontiguousarray(b).reshape(-1).view(bits)
    return int(other.sum()), int(other.argmax())


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest |a - b| in float64; NaN where only one side is a number."""
    largest = 0.0
    one, other = a.reshape(-1), b.reshape(-1)
    # In parts whose float64 fit in a core's own cache.
    for start in range(0, one.size, TILE):
        tile = slice(start, start + TILE)
        largest = float(np.maximum(largest, _find_gap(one[tile], other[tile])))
    return largest


def _find_gap(a: np.ndarray, b: np.ndarray) -> float:
    one, other = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.abs(one - other)
    largest = float(gap.max())
    if np.isnan(largest):
        # inf - inf is NaN, although the two are equal.
        gap[(one == other) | (np.isnan(one) & np.isnan(other))] = 0.0
        largest = float(gap.max())
    return largest


def find_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (A's, B's)} of the keys whose values differ; None stands for one that is absent."""
    keys = dict.fromkeys([*a, *b])
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def model_of(source: Source) -> dict[str, Any]:
    """Architecture, sizes and options of a source: what of its configuration says which function it
    computes.
    """
    return {"architecture": source.model.kind} | source.model.values


def recorded_growth(out: Source) -> Growth:
    """The growth that made `out`. Raises as `growkit.lineage.Lineage.last_growth` does."""
    return Lineage.read(out.lineage).last_growth(out.path)


def recorded_plan(source: Source, out: Source) -> Plan:
    """The plan in the lineage of `out`, for `source`.

    Raises UsageError for a source of other sizes, GrowkitError for an entry that cannot be read.
    """
    growth = recorded_growth(out)
    try:
        model = express_source(source, growth.experts)
        if growth.before == model.sizes:
            _check_sizes(growth, out)
            return growth.plan(model)
        different = find_differences(model.sizes, dict(growth.before))
    except (*MALFORMED, OverflowError) as problem:
        raise GrowkitError(f"{out.path}: {unreadable_plan(repr(problem))}") from None
    axis, (ours, theirs) = next(iter(different.items()))
    raise UsageError(
        f"{out.path} was grown from another model than {source.path}: "
        f"{_describe_size(axis, theirs)} there, {_describe_size(axis, ours)} here"
    )


def _describe_size(axis: str, size: int | None) -> str:
    """'layer 18', or 'no axis head' for an axis that the model does not have."""
    return f"no axis {axis}" if size is None else f"{axis} {size}"


def _check_sizes(growth: Growth, out: Source) -> None:
    """Raise GrowkitError for a plan of other sizes than the output's, before it is made.

    A plan is as long as its maps, and a lineage is data from strangers.
    """
    lengths = {axis: len(copies.index) for axis, copies in growth.maps.items()}
    for axis, size in {**lengths, **growth.pads}.items():
        found = out.model.sizes.get(axis)
        if size != found:
            problem = f"it makes {axis} {size}, and here it is {found}"
            raise GrowkitError(f"{out.path}: {unreadable_plan(problem)}")


def find_mismatch(
    source: Source, out: Source, plan: Plan, progress: Progress = lambda done: None
) -> str | None:
    """The first difference of `out` from what `plan` makes of `source`, in words, or None."""
    groups = str(recorded_growth(out).more.get("groups", "keep"))
    contents = prepare_growth(source, plan, groups)
    wrong = _find_config_mismatch(contents, out) or _find_slot_mismatch(contents, out)
    if wrong:
        return wrong
    pairs = [
        (recipe, out.tensors[slot][name], f"{name!r} of {slot}")
        for slot, recipes in contents.recipes.items()
        for name, recipe in recipes.items()
    ]
    found = map_abreast(lambda pair: _find_number_mismatch(pair[0], pair[1]), pairs)
    # Closed at the first difference, so that the tensors after it are not read.
    with closing(found):
        for (recipe, _, name), wrong in zip(pairs, found, strict=False):
            if wrong:
                return f"{name} {wrong}"
            progress(recipe.size)
    return None


def _find_config_mismatch(contents: Contents, out: Source) -> str | None:
    # The writer states the dtype anew; fields that others added are not part of the model.
    stated = sorted(contents.config.keys() - {"dtype", "torch_dtype"})
    wanted = {field: contents.config.get(field) for field in stated}
    found = {field: out.config.get(field) for field in stated}
    for field, (right, wrong) in find_differences(wanted, found).items():
        return f"the configuration's {field} is {wrong!r}, growth makes it {right!r}"
    return None


def _find_slot_mismatch(contents: Contents, out: Source) -> str | None:
    if contents.recipes.keys() != out.tensors.keys():
        return f"it holds {', '.join(out.tensors)}, growth makes {', '.join(contents.recipes)}"
    wanted, found = contents.record.get("count"), out.record.get("count")
    if "mu" in out.tensors and wanted != found:
        return f"Adam's count is {found}, growth makes it {wanted}"
    made, stored = contents.torch_optimizer, out.torch_optimizer
    if made is not None and stored is not None and made.groups != stored.groups:
        return "its parameter groups are not those that growth makes"
    return None


def _find_number_mismatch(recipe: Recipe, tensor: Tensor) -> str | None:
    """How a tensor differs from what its recipe makes, in words."""
    if recipe.dtype != tensor.dtype:
        return f"is {tensor.dtype}, growth makes it {recipe.dtype}"
    total = math.prod(tensor.shape)
    count, first = 0, total
    with Reader(tensor) as reader:
        for start, block in recipe.make_blocks():
            other, place = count_differing(block, reader.read(start, start + block.size))
            # Blocks come in any order, so the first difference is the least place and not the
            # first seen.
            if other:
                count += other
                first = min(first, start + place)
    if not count:
        return None
    at = [int(index) for index in np.unravel_index(first, tensor.shape)]
    return f"differs in {count:,} of {total:,} numbers, the first at {at}"
