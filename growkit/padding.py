"""Padding: new units without a source, on the two axes where copies alone cannot reach every size.

embed, any width ('mean-pad'): the residual stream's new entries are the mean of the old ones, so that
LayerNorm's mean stays, its variance shrinks by d/d', and the normalised new entries are exactly zero, which
readers do not see. head_dim, under rotary positions ('keep-rotary'): the new dimensions pass through
unrotated, keys there are zero, and queries make up for the larger root. Both leave the function as it was,
not the training that follows.

Knows, for each row, axis and moment, the scale of what is old and the fill of what is new; leaves which axes
are padded to the plan and copies to `growkit.expansion`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from growkit.spec import Row

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
    return [axis.name for axis in row.axes] == ["embed"] and not (row.stacked is not None and row.stacked.read)


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


def pad(
    array: Any,
    row: Row,
    pads: Mapping[str, int],
    moment: int,
    norm: str,
    free: Callable[[tuple[int, ...], str], Any],
    scaled: bool = True,
    xp: Any = np,
) -> Any:
    """Pad one parameter or moment, one dimension an axis, along every axis of `pads` {axis: new size}.

    free(shape, what) gives the random fill. scaled: whether what is old is scaled by the rules. Returns the
    array in its own dtype.
    """
    names = [axis.name for axis in row.axes]
    for axis in PADDED:
        if axis not in pads or axis not in names:
            continue
        place = names.index(axis)
        growth, read = pads[axis] / array.shape[place], row.axes[place].read
        if axis == "embed":
            rules = {axis: embed_rule(row, moment, growth, norm)}
        elif "qkv" in names:
            rules = {f"{axis} {part}": head_dim_rule(part, read, moment, growth) for part in PARTS}
        else:
            rules = {axis: head_dim_rule(row.part, read, moment, growth)}
        across = names.index("qkv") if len(rules) > 1 else 0
        pieces = xp.split(array, len(rules), axis=across)
        padded = [
            _extended(piece, place, pads[axis], rule if scaled else replace(rule, scale=1.0), free, what, xp)
            for piece, (what, rule) in zip(pieces, rules.items(), strict=True)
        ]
        array = padded[0] if len(padded) == 1 else xp.concatenate(padded, axis=across)
    return array


def _extended(array: Any, place: int, size: int, rule: Rule, free: Any, what: str, xp: Any) -> Any:
    """`array` scaled by the rule, and filled up to `size` along dimension `place`."""
    wide = np.float64 if array.dtype == np.float64 else np.float32
    old = array.astype(wide) * xp.asarray(rule.scale, wide) if rule.scale != 1.0 else array.astype(wide)
    shape = tuple(size - length if at == place else length for at, length in enumerate(array.shape))
    if rule.fill == "mean":
        new = xp.broadcast_to(old.mean(place, keepdims=True), shape)
    elif rule.fill == "free":
        new = xp.asarray(free(shape, what), wide)
    else:
        new = xp.full(shape, {"zero": 0.0, "one": rule.scale}[rule.fill], wide)
    return xp.concatenate([old, new], axis=place).astype(array.dtype)
