"""Padding: new units without a source, on the two axes where copies alone do not reach every size.

embed, any width. Under LayerNorm ('mean-pad') the new entries of the residual stream are the mean
of the old ones: the mean stays, the variance shrinks by d/d', and the normalised new entries are
exactly zero. Under RMSNorm ('zero-pad') they are zero. Readers do not see them either way.
head_dim, under rotary positions ('keep-rotary'). The new dimensions are not rotated, keys are zero
there, and queries make up for the larger root. Both keep the function, and not the training that
follows. New units of a third axis, vocab, are new tokens: see `growkit.growth.vocabulary`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit.growth.precision import wide_dtype
from growkit.models.notation import Axis, Row

# The order matters: rows of new tokens grow in width as old ones do, and a key's new head_dim rows
# must be zero in the new embed columns too.
PADDED = ("vocab", "embed", "head_dim")
VALUE, MU, NU = 0, 1, 2
# From so many numbers on, rows are added one at a time.
MANY = 64

# (shape, what) -> random numbers of that shape, for the fill of that name
Free = Callable[[tuple[int, ...], str], Any]


@dataclass(frozen=True)
class Rule:
    """What padding does to one parameter along one axis.

    scale multiplies the old units. fill says what the new ones hold: 'zero'; 'one', the scale;
    'mean', the mean of the old ones along the axis; 'free', random numbers of the model's initial
    spread; 'given', the array `given`, which broadcasts to them. offset is what the model adds to
    the parameter: scale and 'one' hold for the sum. shift is added to a mean.
    """

    scale: float
    fill: str
    offset: float = 0.0
    shift: float = 0.0
    given: Any = None


def rule_along(axis: Axis, row: Row, role: str, moment: int, growth: float, norm: str) -> Rule:
    """The rule for a parameter along a padded axis.

    role: the part's, or of one slice of a qkv part: query, key or value. growth: the new size over
    the old. norm: 'layer' or 'rms'.
    """
    if axis.name == "embed":
        return _embed_rule(row, axis.read, moment, growth, norm)
    return _head_dim_rule(role, axis.read, moment, growth)


def _embed_rule(row: Row, reads: bool, moment: int, growth: float, norm: str) -> Rule:
    """The rule on the embed axis; growth = d'/d. An RMSNorm sees no mean, so zeros do for it."""
    root = math.sqrt(growth)
    if row.role == "norm":
        # The variance of a padded stream is d/d' of the old one (the sum of squares stays, or with
        # it the sum of squared deviations; the count grows): the normalised old entries grow by
        # sqrt(d'/d), and the norm's weight makes up for that. Gradients change the other way.
        scale = {VALUE: 1 / root, MU: root, NU: growth}[moment]
        offset = row.offset if moment == VALUE else 0.0
        return Rule(scale, {VALUE: "one", MU: "zero", NU: "mean"}[moment], offset)
    if moment != VALUE:
        return Rule(1.0, {MU: "zero", NU: "mean"}[moment])
    # A norm's bias is seen by readers, whose new columns are free: it must be zero there.
    if row.role == "bias" and not row.writes_stream:
        return Rule(1.0, "zero")
    # Readers multiply new entries of the stream by zero, so their new columns can be anything:
    # random ones let the new width learn.
    if reads:
        return Rule(1.0, "free")
    # What writes the stream: the mean of its old entries, which LayerNorm takes off again; for
    # RMSNorm, which takes nothing off, zero.
    return Rule(1.0, {"layer": "mean", "rms": "zero"}[norm])


def _head_dim_rule(role: str, reads: bool, moment: int, growth: float) -> Rule:
    """The rule on the head_dim axis; growth = head_dim'/head_dim.

    Scores are divided by sqrt(head_dim'), so queries are scaled up by what that root grew by.
    """
    scale = 1.0
    if role == "query":
        # q . k keeps its value because new keys are zero, and is then divided by sqrt(head_dim').
        root = math.sqrt(growth)
        scale = {VALUE: root, MU: 1 / root, NU: 1 / growth}[moment]
    if moment != VALUE:
        return Rule(scale, {MU: "zero", NU: "mean"}[moment])
    return Rule(scale, "zero" if reads or role == "key" else "free")


def extend(
    array: Any, place: int, size: int, rule: Rule, free: Free, what: str, xp: Any = np
) -> Any:
    """`array` scaled by the rule, and filled up to `size` along dimension `place`, in its own
    dtype.
    """
    old = scale_old(array, rule, xp)
    added = size - array.shape[place]
    shape = (*array.shape[:place], added, *array.shape[place + 1 :])
    mean = sum_along(old, place, xp) / array.shape[place] if rule.fill == "mean" else None
    new = fill_new(rule, shape, mean, free, what, old.dtype, xp)
    return xp.concatenate([old, new], axis=place).astype(array.dtype)


def sum_along(array: Any, place: int, xp: Any = np) -> Any:
    """The sum along a dimension, kept as one of size 1.

    In numpy from first to last, so that sums of parts add up to the same bits.
    """
    if xp is not np:
        # np.sum adds in pairs, in an order that depends on the shape; accumulate adds from first to
        # last, so a sum can be carried from block to block.
        return array.sum(place, keepdims=True)
    if math.prod(array.shape[place + 1 :]) < MANY:
        return np.add.accumulate(array, axis=place).take([-1], axis=place)
    # The same order, and 27 times as fast for 256 rows of 1,024.
    units = np.moveaxis(array, place, 0)
    total = units[0].copy()
    for unit in units[1:]:
        total += unit
    return np.expand_dims(total, place)


def scale_old(array: Any, rule: Rule, xp: Any = np) -> Any:
    """The old units, multiplied by the rule's scale; in float64 or float32 (see `wide_dtype`)."""
    wide = array.astype(wide_dtype(array.dtype))
    if rule.scale == 1.0:
        return wide
    return scale_with_offset(wide, xp.asarray(rule.scale, wide.dtype), rule.offset, xp)


def scale_with_offset(wide: Any, scale: Any, offset: float, xp: Any = np) -> Any:
    """scale x (offset + w) - offset: what scales a parameter that the model adds an offset to."""
    if not offset:
        return round_here(wide * scale, xp)
    added = wide.dtype.type(offset)
    return round_here(round_here((wide + added) * scale, xp) - added, xp)


def round_here(result: Any, xp: Any) -> Any:
    """The same numbers, rounded before anything else is done with them, as numpy does.

    Under jit a compiler may take two operations as one (x * a + b, or x * a * b as x * (a * b)),
    which rounds once. A maximum that changes nothing stands between them.
    """
    return result if xp is np else xp.maximum(result, xp.finfo(result.dtype).min)


def fill_new(
    rule: Rule, shape: tuple[int, ...], mean: Any, free: Free, what: str, dtype: Any, xp: Any = np
) -> Any:
    """The units that padding adds, of `shape` and `dtype`, filled as the rule says.

    mean: of the old units, broadcastable to `shape`; only a rule with the fill 'mean' reads it.
    free: makes random numbers for the fill 'free', named `what`.
    """
    if rule.fill == "mean":
        shifted = mean + mean.dtype.type(rule.shift) if rule.shift else mean
        return xp.broadcast_to(shifted, shape)
    if rule.fill == "given":
        return xp.broadcast_to(xp.asarray(rule.given, dtype), shape)
    if rule.fill == "free":
        return xp.asarray(free(shape, what), dtype)
    value = rule.scale - rule.offset if rule.fill == "one" else 0.0
    return xp.full(shape, value, dtype)
