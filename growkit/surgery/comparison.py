"""Models on disk against each other: two sources tensor by tensor, an output against its source and its plan.

Never more than a block of each side is in memory. Knows what equal means and finds where it ends; leaves
printing, and what a model computes, to others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit.checkpoint.tensor import BLOCK, SLOTS, Recipe, Source, Tensor
from growkit.entries import MALFORMED, Growth
from growkit.errors import GrowkitError, UsageError
from growkit.growth.plan import Plan
from growkit.lineage import Lineage, unreadable_plan
from growkit.surgery.grow import prepare_growth

EQUAL, DIFFERS = "equal", "differs"

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Comparison:
    """One tensor of two models: 'equal' (the same bits), 'differs', 'only in A' or 'only in B'.

    largest: the largest difference of two numbers, NaN where one of them is none; None for other shapes or one
    side only. detail: what else differs, in words.
    """

    slot: str
    name: str
    verdict: str
    largest: float | None = None
    detail: str = ""


def compare_sources(
    a: Source, b: Source, progress: Progress = lambda done: None
) -> Iterator[Comparison]:
    """Every tensor of either model, read when its turn comes; progress is told the bytes of both that are done."""
    for slot in SLOTS:
        ours, theirs = a.tensors.get(slot, {}), b.tensors.get(slot, {})
        for name in dict.fromkeys([*ours, *theirs]):
            if name in ours and name in theirs:
                yield _compared(slot, name, ours[name], theirs[name])
            else:
                yield Comparison(slot, name, "only in A" if name in ours else "only in B")
            progress(sum(side[name].size for side in (ours, theirs) if name in side))


def _compared(slot: str, name: str, ours: Tensor, theirs: Tensor) -> Comparison:
    if ours.shape != theirs.shape:
        return Comparison(
            slot, name, DIFFERS, None, f"shape {list(ours.shape)} and {list(theirs.shape)}"
        )
    detail = "" if ours.dtype == theirs.dtype else f"{ours.dtype} and {theirs.dtype}"
    same, largest = not detail, 0.0
    for start, stop in max(ours, theirs, key=lambda tensor: tensor.stride).split_rows(BLOCK):
        a, b = ours.rows(start, stop), theirs.rows(start, stop)
        if detail or count_differing(a, b)[0]:
            same, largest = False, float(np.maximum(largest, largest_difference(a, b)))
    return Comparison(slot, name, EQUAL if same else DIFFERS, largest, detail)


def count_differing(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """How many numbers of two arrays of one shape and dtype have other bits, and the place of the first, in C order."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    other = np.ascontiguousarray(a).reshape(-1).view(bits) != np.ascontiguousarray(b).reshape(
        -1
    ).view(bits)
    return int(other.sum()), int(other.argmax()) if other.size else 0


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest |a - b| in float64; NaN where only one side is a number."""
    one, other = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.abs(one - other)
    gap[(one == other) | (np.isnan(one) & np.isnan(other))] = 0.0
    return float(gap.max(initial=0.0))


def fields_differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (A's, B's)} of the keys whose values differ, None standing for one that is absent."""
    return {
        key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)
    }


def model_of(source: Source) -> dict[str, Any]:
    """Architecture, sizes and options of a source: what of its configuration says which function it computes."""
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
        if growth.before == source.model.sizes:
            return growth.plan(source.model)
        different = fields_differing(source.model.sizes, dict(growth.before))
    except MALFORMED as problem:
        raise GrowkitError(f"{out.path}: {unreadable_plan(repr(problem))}") from None
    axis, (ours, theirs) = next(iter(different.items()))
    raise UsageError(
        f"{out.path} was grown from another model than {source.path}: {axis} was {theirs}, here it is {ours}"
    )


def first_mismatch(
    source: Source, out: Source, plan: Plan, progress: Progress = lambda done: None
) -> str | None:
    """What first differs in `out` from that which `plan` makes of `source`, in words; None when nothing does."""
    contents = prepare_growth(source, plan)
    # The writer states the dtype anew, and what others wrote beside the model's fields is no part of it.
    stated = sorted(contents.config.keys() - {"dtype", "torch_dtype"})
    wanted, found = (
        {field: config.get(field) for field in stated} for config in (contents.config, out.config)
    )
    fields = fields_differing(wanted, found)
    if fields:
        field, (wanted, found) = next(iter(fields.items()))
        return f"the configuration's {field} is {found!r}, growth makes it {wanted!r}"
    if contents.recipes.keys() != out.tensors.keys():
        return f"it holds {', '.join(out.tensors)}, growth makes {', '.join(contents.recipes)}"
    if "mu" in out.tensors and contents.record.get("count") != out.record.get("count"):
        return f"Adam's count is {out.record.get('count')}, growth makes it {contents.record.get('count')}"
    for slot, recipes in contents.recipes.items():
        for name, recipe in recipes.items():
            wrong = _mismatch(recipe, out.tensors[slot][name])
            if wrong:
                return f"{name!r} of {slot} {wrong}"
            progress(recipe.size)
    return None


def _mismatch(recipe: Recipe, tensor: Tensor) -> str | None:
    """How a tensor differs from what its recipe makes, in words."""
    if recipe.dtype != tensor.dtype:
        return f"is {tensor.dtype}, growth makes it {recipe.dtype}"
    count, first = 0, math.prod(tensor.shape)
    for start, block in recipe.make_blocks():
        other, place = count_differing(block, tensor.read_numbers(start, start + block.size))
        count, first = count + other, min(first, start + place) if other else first
    if not count:
        return None
    place = [int(index) for index in np.unravel_index(first, tensor.shape)]
    return f"differs in {count:,} of {math.prod(tensor.shape):,} numbers, the first at {place}"
