"""Causal attention with a backward pass of its own.

It takes q [B, Q, T, D], k and v [B, H, T, D] and returns their mixture [B, Q, T, D]. Q is H or a
multiple of it: then each key and value head is read by a group of query heads. Their queries are
laid one after another, as more queries of the same head, so that no key is repeated. The backward
pass keeps the attention weights and computes their gradient in closed form. Left to automatic
differentiation, the same program spends more time around its matrix products than in them. On a CPU
it takes one block of queries after another.

`attend_to_past` is for generating text: its queries also read keys and values that were kept.

Shapes in names: B batch, Q query head, H key and value head, T queries of all heads of a group, S
keys, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from trainer.model.dropout import apply_mask, draw_mask
from trainer.model.matmul import matmul_transposed
from trainer.model.precision import cap, select_wide_dtype, widen

# The name by which a remat policy may keep attention's result.
MIXED = "attention"
# Number of blocks of queries by platform, 1 where none is named. A block is multiplied with the
# keys of its past only, so N blocks do (N + 1) / 2N of the work: 62.5 % for 4.
BLOCKS = {"cpu": 4}
# The fewest queries in a block; shorter blocks cost more compile time than they save.
SHORTEST = 64


@dataclass(frozen=True)
class Scores:
    """How products of queries and keys become scores: divided, then bounded by cap tanh(x / cap).

    divisor: None for sqrt(D). cap: None for no bound.
    """

    divisor: float | None = None
    cap: float | None = None


PLAIN = Scores()


class Past(NamedTuple):
    """Keys and values [B, H, S, D] before a text; the decoder takes [layer, B, H, S, D].

    length: how many of the S positions are filled; the text that follows begins there.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 7))
def causal_attention(
    q_BxQxTxD: jax.Array,
    k_BxHxSxD: jax.Array,
    v_BxHxSxD: jax.Array,
    key: jax.Array | None,
    dropout: float,
    platform: str = "cpu",
    window: jax.Array | None = None,
    scores: Scores = PLAIN,
) -> jax.Array:
    """softmax(scores of q and k) v over the past.

    Scores and softmax are computed in at least float32; the weights are then rounded to q's dtype.
    With a key, each weight is dropped with probability `dropout` and the others are scaled by 1 /
    (1 - dropout). platform: what the program is compiled for; it changes how the result is
    computed, not the result. window: how many positions a query reads, its own among them; None for
    all of the past.
    """
    return _forward(q_BxQxTxD, k_BxHxSxD, v_BxHxSxD, key, dropout, platform, window, scores)[0]


def split_queries(time: int, platform: str) -> list[tuple[int, int]]:
    """Split T queries into blocks: the first query of each and the one after its last.

    One block where several would be short or of unequal length.
    """
    count = BLOCKS.get(platform, 1)
    size = time
    if time % count == 0 and time >= count * SHORTEST:
        size = time // count
    return [(first, first + size) for first in range(0, time, size)]


def _forward(
    q_BxQxTxD: jax.Array,
    k_BxHxSxD: jax.Array,
    v_BxHxSxD: jax.Array,
    key: jax.Array | None,
    dropout: float,
    platform: str,
    window: jax.Array | None,
    scores: Scores,
) -> tuple[jax.Array, tuple[Any, ...]]:
    batch, heads, time, _ = q_BxQxTxD.shape
    mask = None
    if key is not None:
        mask = draw_mask(jax.random.key_data(key), dropout, (batch, heads, time, time))
    kv = k_BxHxSxD.shape[1]
    mixed, weights = [], []
    for first, last in split_queries(time, platform):
        q_BxHxTxD = _fold(q_BxQxTxD[:, :, first:last], kv)
        scores_BxHxTxS = _score(q_BxHxTxD, k_BxHxSxD[:, :, :last], scores)
        weights_BxHxTxS = _weigh(scores_BxHxTxS, last - first, window).astype(q_BxHxTxD.dtype)
        part = _slice_mask(mask, first, last, kv)
        dropped = _drop(weights_BxHxTxS, part, dropout, platform)
        mixed_BxHxTxD = jnp.einsum("bhts,bhsd->bhtd", dropped, v_BxHxSxD[:, :, :last])
        mixed.append(_unfold(mixed_BxHxTxD, heads))
        weights.append(weights_BxHxTxS)
    mixed_BxQxTxD = checkpoint_name(jnp.concatenate(mixed, 2), MIXED)
    return mixed_BxQxTxD, (q_BxQxTxD, k_BxHxSxD, v_BxHxSxD, weights, mask, window)


def _fold(x_BxQxTxN: jax.Array, kv: int) -> jax.Array:
    """Lay the queries of each group of heads one after another: [B, H, Q / H * T, N]."""
    batch, heads, time, size = x_BxQxTxN.shape
    if heads == kv:
        return x_BxQxTxN
    return x_BxQxTxN.reshape(batch, kv, heads // kv * time, size)


def _unfold(x_BxHxTxN: jax.Array, heads: int) -> jax.Array:
    """The inverse of `_fold`."""
    batch, kv, time, size = x_BxHxTxN.shape
    if heads == kv:
        return x_BxHxTxN
    return x_BxHxTxN.reshape(batch, heads, kv * time // heads, size)


def _score(q_BxHxTxD: jax.Array, k_BxHxSxD: jax.Array, scores: Scores) -> jax.Array:
    """The scores [B, H, T, S] of all pairs, in at least float32."""
    wide = select_wide_dtype(q_BxHxTxD.dtype)
    products = jnp.einsum("bhtd,bhsd->bhts", q_BxHxTxD, k_BxHxSxD, preferred_element_type=wide)
    return cap(products / _find_divisor(q_BxHxTxD, scores), scores.cap)


def _find_divisor(q_BxHxTxD: jax.Array, scores: Scores) -> float:
    return scores.divisor or math.sqrt(q_BxHxTxD.shape[-1])


def _weigh(scores_BxHxTxS: jax.Array, block: int, window: jax.Array | None) -> jax.Array:
    """The attention weights [B, H, T, S] of the last `block` of S positions, of each head of a
    group.
    """
    keys = scores_BxHxTxS.shape[-1]
    # The queries are the last T of S positions, so the diagonal lies S - T to the right.
    read_TxS = jnp.tril(jnp.ones((block, keys), bool), keys - block)
    if window is not None:
        place_T = keys - block + jnp.arange(block, dtype=jnp.int32)
        distance_TxS = place_T[:, None] - jnp.arange(keys, dtype=jnp.int32)[None]
        read_TxS = read_TxS & (distance_TxS < window)
    return _soften(scores_BxHxTxS, read_TxS)


def _soften(scores_BxHxTxS: jax.Array, read_TxS: jax.Array) -> jax.Array:
    """The softmax over the positions that are read, the same for each head of a group."""
    total, block = scores_BxHxTxS.shape[-2], read_TxS.shape[0]
    if total != block:
        read_TxS = jnp.tile(read_TxS, (total // block, 1))
    # -inf and not a large number: its exponential is exactly 0, and so is its gradient.
    return jax.nn.softmax(jnp.where(read_TxS[None, None], scores_BxHxTxS, -jnp.inf), axis=-1)


def _backward(
    dropout: float,
    platform: str,
    scores: Scores,
    saved: tuple[Any, ...],
    gradient_BxQxTxD: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q_BxQxTxD, k_BxHxSxD, v_BxHxSxD, weights, mask, _ = saved
    heads, kv = q_BxQxTxD.shape[1], k_BxHxSxD.shape[1]
    blocks = split_queries(q_BxQxTxD.shape[2], platform)
    to_q, to_k, to_v = [], [], []
    for (first, last), weights_BxHxTxS in zip(blocks, weights, strict=True):
        part = _slice_mask(mask, first, last, kv)
        drop = partial(_drop, mask=part, dropout=dropout, platform=platform)
        gradient = _fold(gradient_BxQxTxD[:, :, first:last], kv)
        q_BxHxTxD = _fold(q_BxQxTxD[:, :, first:last], kv)
        k_past = k_BxHxSxD[:, :, :last]
        to_v.append(matmul_transposed(drop(weights_BxHxTxS), gradient, platform))
        to_weights = drop(jnp.einsum("bhtd,bhsd->bhts", gradient, v_BxHxSxD[:, :, :last]))
        to_scores = _differentiate_softmax(weights_BxHxTxS, to_weights)
        if scores.cap is not None:
            # The scores are computed again: keeping them would double what a layer keeps.
            capped = _score(q_BxHxTxD, k_past, scores)
            to_scores = to_scores * (1.0 - jnp.square(capped / scores.cap))
        to_scores = (to_scores / _find_divisor(q_BxQxTxD, scores)).astype(q_BxQxTxD.dtype)
        to_q.append(_unfold(jnp.einsum("bhts,bhsd->bhtd", to_scores, k_past), heads))
        to_k.append(matmul_transposed(to_scores, q_BxHxTxD, platform))
    return jnp.concatenate(to_q, 2), _sum_prefixes(to_k), _sum_prefixes(to_v), None, None


def _differentiate_softmax(weights_BxHxTxS: jax.Array, to_weights: jax.Array) -> jax.Array:
    """The gradient for the scores, from softmax's result and the gradient for that, in float32."""
    wide_BxHxTxS = widen(weights_BxHxTxS)
    to_weights = to_weights.astype(wide_BxHxTxS.dtype)
    # d softmax: w * (g - sum(w g)), row by row; no Jacobian of S x S is made.
    mean_BxHxTx1 = (to_weights * wide_BxHxTxS).sum(-1, keepdims=True)
    return wide_BxHxTxS * (to_weights - mean_BxHxTx1)


def _slice_mask(mask: jax.Array | None, first: int, last: int, kv: int) -> jax.Array | None:
    return None if mask is None else _fold(mask[:, :, first:last, :last], kv)


def _sum_prefixes(parts: list[jax.Array]) -> jax.Array:
    """Sum gradients of the first S positions, of which the last one has all positions."""
    # Block n saw the keys up to its own end: its gradient is that of the first positions only.
    *shorter, total = parts
    for part in shorter:
        total = total.at[:, :, : part.shape[2]].add(part)
    return total


def _drop(weights: jax.Array, mask: jax.Array | None, dropout: float, platform: str) -> jax.Array:
    if mask is None:
        return weights
    dropped = apply_mask(weights, mask, dropout)
    if platform == "tpu":
        # Without the barrier the compiler for v4 and v5p (libtpu 0.0.42) overflows its stack on
        # large steps.
        return jax.lax.optimization_barrier(dropped)
    return dropped


causal_attention.defvjp(_forward, _backward)


def attend_to_past(
    q_BxQxTxD: jax.Array,
    k_BxHxTxD: jax.Array,
    v_BxHxTxD: jax.Array,
    past: Past,
    window: jax.Array | None = None,
    scores: Scores = PLAIN,
) -> jax.Array:
    """`causal_attention` [B, Q, T, D] of T positions that follow those of `past`.

    The keys of the past are not joined with the new ones: that would copy them.
    """
    heads, time = q_BxQxTxD.shape[1:3]
    q_BxHxTxD = _fold(q_BxQxTxD, k_BxHxTxD.shape[1])
    size = past.keys.shape[2]
    to_past = _score(q_BxHxTxD, past.keys, scores)
    to_own = _score(q_BxHxTxD, k_BxHxTxD, scores)
    read_TxS = _list_read(size, time, past.length, window)
    both = jnp.concatenate([to_past, to_own], -1)
    weights = _soften(both, read_TxS).astype(q_BxHxTxD.dtype)
    mixed_past = jnp.einsum("bhts,bhsd->bhtd", weights[..., :size], past.values)
    mixed_own = jnp.einsum("bhts,bhsd->bhtd", weights[..., size:], v_BxHxTxD)
    return _unfold(mixed_past + mixed_own, heads)


def _list_read(size: int, time: int, length: jax.Array, window: jax.Array | None) -> jax.Array:
    """Which of S kept and T own positions each of T queries reads: [T, S + T]."""
    own_T = jnp.arange(time, dtype=jnp.int32)
    kept_S = jnp.arange(size, dtype=jnp.int32)
    place_K = jnp.concatenate([kept_S, length + own_T])
    filled_K = jnp.concatenate([kept_S < length, jnp.ones(time, bool)])
    distance_TxK = (length + own_T)[:, None] - place_K[None]
    read_TxK = filled_K[None] & (distance_TxK >= 0)
    return read_TxK if window is None else read_TxK & (distance_TxK < window)
