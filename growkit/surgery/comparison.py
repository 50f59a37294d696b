"""Models on disk against each other: two sources tensor by tensor, an output against its plan.

`compare_sources` is `growkit diff`, `find_mismatch` is `growkit verify`. Never more than a block of
each side is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit.checkpoint.tensor import BLOCK, SLOTS, Contents, Recipe, Source, Tensor
from growkit.entries import MALFORMED, Growth
from growkit.errors import GrowkitError, UsageError
from growkit.growth.plan import Plan
from growkit.lineage import Lineage, unreadable_plan
from growkit.surgery.grow import prepare_growth
from growkit.surgery.upcycling import express_source

EQUAL, DIFFERS = "equal", "differs"

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
    for slot in SLOTS:
        ours, theirs = a.tensors.get(slot, {}), b.tensors.get(slot, {})
        for name in dict.fromkeys([*ours, *theirs]):
            if name in ours and name in theirs:
                yield _compare(slot, name, ours[name], theirs[name])
            else:
                yield Comparison(slot, name, "only in A" if name in ours else "only in B")
            progress(sum(side[name].size for side in (ours, theirs) if name in side))


def _compare(slot: str, name: str, ours: Tensor, theirs: Tensor) -> Comparison:
    if ours.shape != theirs.shape:
        detail = f"shape {list(ours.shape)} and {list(theirs.shape)}"
        return Comparison(slot, name, DIFFERS, None, detail)
    detail = "" if ours.dtype == theirs.dtype else f"{ours.dtype} and {theirs.dtype}"
    equal = not detail
    largest = 0.0
    # Blocks of whole stored chunks, so that no chunk is decoded twice.
    coarser = max(ours, theirs, key=lambda tensor: tensor.stride)
    for start, stop in coarser.split_rows(BLOCK):
        a, b = ours.rows(start, stop), theirs.rows(start, stop)
        if detail or count_differing(a, b)[0]:
            equal = False
            largest = float(np.maximum(largest, largest_difference(a, b)))
    return Comparison(slot, name, EQUAL if equal else DIFFERS, largest, detail)


def count_differing(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """How many numbers of two arrays of one shape and dtype have other bits, and the place of the
    first, in C order.
    """
    # As whole numbers, so that NaN equals itself and 0.0 is not -0.0.
    bits = np.dtype(f"u{a.dtype.itemsize}")
    one = np.ascontiguousarray(a).reshape(-1).view(bits)
    other = one != np.ascontiguousarray(b).reshape(-1).view(bits)
    return int(other.sum()), int(other.argmax()) if other.size else 0


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest |a - b| in float64; NaN where only one side is a number."""
    one, other = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.abs(one - other)
    # inf - inf is NaN, although the two are equal.
    gap[(one == other) | (np.isnan(one) & np.isnan(other))] = 0.0
    return float(gap.max(initial=0.0))


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
    for slot, recipes in contents.recipes.items():
        for name, recipe in recipes.items():
            wrong = _find_number_mismatch(recipe, out.tensors[slot][name])
            if wrong:
                return f"{name!r} of {slot} {wrong}"
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
    for start, block in recipe.make_blocks():
        # Blocks come in any order, so the first difference is the least place and not the first
        # seen.
        other, place = count_differing(block, tensor.read_numbers(start, start + block.size))
        if other:
            count += other
            first = min(first, start + place)
    if not count:
        return None
    at = [int(index) for index in np.unravel_index(first, tensor.shape)]
    return f"differs in {count:,} of {total:,} numbers, the first at {at}"
