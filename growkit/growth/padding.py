"""Padding: new units without a source, on the two axes where copies alone cannot reach every size.

embed, any width ('mean-pad'): the residual stream's new entries are the mean of the old ones, so that
LayerNorm's mean stays, its variance shrinks by d/d', and the normalised new entries are exactly zero, which
readers do not see. head_dim, under rotary positions ('keep-rotary'): the new dimensions pass through
unrotated, keys there are zero, and queries make up for the larger root. Both leave the function as it was,
not the training that follows.

Knows, for each row, axis and moment, the scale of what is old and the fill of what is new; leaves which axes
are padded to the plan and copies to `growkit.growth.rule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from growkit.models.notation import Row

# The order matters: a key's new head_dim rows must be zero in the new embed columns too.
PADDED = ("embed", "head_dim")
VALUE, MU, NU = 0, 1, 2


@dataclass(frozen=True)
class Rule:
    """What padding does to one parameter along one axis.

    scale multiplies what is old. fill says what the new units hold: 'zero'; 'one'; 'mean', the mean of the
    old ones along the axis; 'free', random numbers of the model's initial spread.
    """

    scale: float
    fill: str


def is_norm(row: Row) -> bool:
    """Whether the row belongs to a norm: it has the embed axis alone and does not write into the residual stream."""
    return [axis.name for axis in row.axes] == ["embed"] and not (
        row.stacked is not None and row.stacked.read
    )


def embed_rule(row: Row, moment: int, growth: float, norm: str) -> Rule:
    """The rule on the embed axis; growth = d'/d. norm: 'layer' or 'rms', which sees no mean and so pads with zeros."""
    root = math.sqrt(growth)
    if is_norm(row):
        weight = row.initialisation == "ones"
        scale = {VALUE: 1 / root, MU: root, NU: growth}[moment] if weight else 1.0
        return Rule(scale, {VALUE: "one" if weight else "zero", MU: "zero", NU: "mean"}[moment])
    if moment != VALUE:
        return Rule(1.0, {MU: "zero", NU: "mean"}[moment])
    reads = any(axis.name == "embed" and axis.read for axis in row.axes)
    return Rule(1.0, "free" if reads else {"layer": "mean", "rms": "zero"}[norm])


def head_dim_rule(part: str | None, reads: bool, moment: int, growth: float) -> Rule:
    """The rule on the head_dim axis; growth = head_dim'/head_dim. part: 'query', 'key' or 'value' where there is one.

    Scores are divided by sqrt(head_dim'), so queries are scaled up by what that root grew by.
    """
    scale = 1.0
    if part == "query":
        root = math.sqrt(growth)
        scale = {VALUE: root, MU: 1 / root, NU: 1 / growth}[moment]
    if moment != VALUE:
        return Rule(scale, {MU: "zero", NU: "mean"}[moment])
    return Rule(scale, "zero" if reads or part == "key" else "free")


PARTS = ("query", "key", "value")


def rule_of(axis: str, row: Row, part: str | None, moment: int, growth: float, norm: str) -> Rule:
    """The rule for a parameter along a padded axis; part as in `head_dim_rule`, growth the new size over the old."""
    if axis == "embed":
        return embed_rule(row, moment, growth, norm)
    reads = any(each.name == axis and each.read for each in row.axes)
    return head_dim_rule(part, reads, moment, growth)


# (shape, what) -> random numbers of that shape, for the fill of that name
Free = Callable[[tuple[int, ...], str], Any]


def pad(
    array: Any,
    row: Row,
    pads: Mapping[str, int],
    moment: int,
    norm: str,
    free: Free,
    by_rule: bool = True,
    xp: Any = np,
) -> Any:
    """Pad one parameter or moment, one dimension an axis, along every axis of `pads` {axis: new size}.

    by_rule: whether what is old is scaled by the rules. Returns the array in its own dtype.
    """
    names = [axis.name for axis in row.axes]
    for axis in PADDED:
        if axis not in pads or axis not in names:
            continue
        place = names.index(axis)
        growth = pads[axis] / array.shape[place]
        parts = PARTS if axis == "head_dim" and "qkv" in names else (row.part,)
        across = names.index("qkv") if len(parts) > 1 else 0
        padded = []
        for piece, part in zip(xp.split(array, len(parts), axis=across), parts, strict=True):
            rule = rule_of(axis, row, part, moment, growth, norm)
            rule = rule if by_rule else replace(rule, scale=1.0)
            padded.append(
                extended(
                    piece, place, pads[axis], rule, free, fill_name(axis, part, len(parts) > 1), xp
                )
            )
        array = padded[0] if len(padded) == 1 else xp.concatenate(padded, axis=across)
    return array


def fill_name(axis: str, part: str | None, apart: bool) -> str:
    """What a random fill is called: parts that lie in one parameter have fills of their own."""
    return f"{axis} {part}" if apart else axis


def extended(
    array: Any, place: int, size: int, rule: Rule, free: Free, what: str, xp: Any = np
) -> Any:
    """`array` scaled by the rule, and filled up to `size` along dimension `place`."""
    old = scaled(array, rule, xp)
    shape = tuple(size - length if at == place else length for at, length in enumerate(array.shape))
    mean = summed(old, place, xp) / array.shape[place] if rule.fill == "mean" else None
    return xp.concatenate(
        [old, filled(rule, shape, mean, free, what, old.dtype, xp)], axis=place
    ).astype(array.dtype)


def summed(array: Any, place: int, xp: Any = np) -> Any:
    """The sum along a dimension, kept as one of size 1; in numpy from first to last, so that parts add up alike."""
    if xp is np:
        return np.add.accumulate(array, axis=place).take([-1], axis=place)
    return array.sum(place, keepdims=True)


def scaled(array: Any, rule: Rule, xp: Any = np) -> Any:
    """What is old, by the rule, in at least float32."""
    wide = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
    return wide * xp.asarray(rule.scale, wide.dtype) if rule.scale != 1.0 else wide


def filled(
    rule: Rule, shape: tuple[int, ...], mean: Any, free: Free, what: str, dtype: Any, xp: Any = np
) -> Any:
    """What is new, by the rule. mean: of what is old, where the rule asks for it, broadcastable to `shape`."""
    if rule.fill == "mean":
        return xp.broadcast_to(mean, shape)
    if rule.fill == "free":
        return xp.asarray(free(shape, what), dtype)
    return xp.full(shape, {"zero": 0.0, "one": rule.scale}[rule.fill], dtype)
