"""Causal attention with a backward pass of its own.

It takes q, k and v [B, H, T, D] and returns their mixture [B, H, T, D]. The backward pass keeps the
attention weights and computes their gradient in closed form. Left to automatic differentiation, the
same program spends more time around its matrix products than in them. On a CPU it takes one block
of queries after another.

Shapes in names: B batch, H head, T queries, S keys, D head_dim.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from trainer.model.dropout import apply_mask, draw_mask
from trainer.model.matmul import matmul_transposed
from trainer.model.precision import select_wide_dtype, widen

# Number of blocks of queries by platform, 1 where none is named. A block is multiplied with the
# keys of its past only, so N blocks do (N + 1) / 2N of the work: 62.5 % for 4.
BLOCKS = {"cpu": 4}
# The fewest queries in a block; shorter blocks cost more compile time than they save.
SHORTEST = 64


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def causal_attention(
    q_BxHxTxD: jax.Array,
    k_BxHxSxD: jax.Array,
    v_BxHxSxD: jax.Array,
    key: jax.Array | None,
    dropout: float,
    platform: str = "cpu",
) -> jax.Array:
    """softmax(q k / sqrt(D)) v over the past.

    Scores and softmax are computed in at least float32; the weights are then rounded to q's dtype.
    With a key, each weight is dropped with probability `dropout` and the others are scaled by 1 /
    (1 - dropout). platform: what the program is compiled for; it changes how the result is
    computed, not the result.
    """
    return _forward(q_BxHxTxD, k_BxHxSxD, v_BxHxSxD, key, dropout, platform)[0]


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
    q_BxHxTxD: jax.Array,
    k_BxHxSxD: jax.Array,
    v_BxHxSxD: jax.Array,
    key: jax.Array | None,
    dropout: float,
    platform: str,
) -> tuple[jax.Array, tuple[Any, ...]]:
    batch, heads, time, _ = q_BxHxTxD.shape
    mask = None
    if key is not None:
        mask = draw_mask(jax.random.key_data(key), dropout, (batch, heads, time, time))
    mixed, weights = [], []
    for first, last in split_queries(time, platform):
        weights_BxHxTxS = _weigh(q_BxHxTxD[:, :, first:last], k_BxHxSxD[:, :, :last])
        dropped = _drop(weights_BxHxTxS, _slice_mask(mask, first, last), dropout, platform)
        mixed.append(jnp.einsum("bhts,bhsd->bhtd", dropped, v_BxHxSxD[:, :, :last]))
        weights.append(weights_BxHxTxS)
    return jnp.concatenate(mixed, 2), (q_BxHxTxD, k_BxHxSxD, v_BxHxSxD, weights, mask)


def _weigh(q_BxHxTxD: jax.Array, k_BxHxSxD: jax.Array) -> jax.Array:
    """The attention weights [B, H, T, S] of the last T of S positions."""
    time, depth = q_BxHxTxD.shape[-2:]
    keys = k_BxHxSxD.shape[-2]
    wide = select_wide_dtype(q_BxHxTxD.dtype)
    scores_BxHxTxS = jnp.einsum(
        "bhtd,bhsd->bhts", q_BxHxTxD, k_BxHxSxD, preferred_element_type=wide
    )
    # The queries are the last T of S positions, so the diagonal lies S - T to the right.
    causal_TxS = jnp.tril(jnp.ones((time, keys), bool), keys - time)
    scaled_BxHxTxS = scores_BxHxTxS / math.sqrt(depth)
    # -inf and not a large number: its exponential is exactly 0, and so is its gradient.
    scores_BxHxTxS = jnp.where(causal_TxS[None, None], scaled_BxHxTxS, -jnp.inf)
    return jax.nn.softmax(scores_BxHxTxS, axis=-1).astype(q_BxHxTxD.dtype)


def _backward(
    dropout: float, platform: str, saved: tuple[Any, ...], gradient_BxHxTxD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BxHxTxD, k_BxHxSxD, v_BxHxSxD, weights, mask = saved
    blocks = split_queries(q_BxHxTxD.shape[2], platform)
    to_q, to_k, to_v = [], [], []
    for (first, last), weights_BxHxTxS in zip(blocks, weights, strict=True):
        drop = partial(
            _drop, mask=_slice_mask(mask, first, last), dropout=dropout, platform=platform
        )
        gradient = gradient_BxHxTxD[:, :, first:last]
        to_v.append(matmul_transposed(drop(weights_BxHxTxS), gradient, platform))
        to_weights = drop(jnp.einsum("bhtd,bhsd->bhts", gradient, v_BxHxSxD[:, :, :last]))
        to_scores = _differentiate_softmax(weights_BxHxTxS, to_weights)
        to_scores = (to_scores / math.sqrt(q_BxHxTxD.shape[-1])).astype(q_BxHxTxD.dtype)
        to_q.append(jnp.einsum("bhts,bhsd->bhtd", to_scores, k_BxHxSxD[:, :, :last]))
        to_k.append(matmul_transposed(to_scores, q_BxHxTxD[:, :, first:last], platform))
    return jnp.concatenate(to_q, 2), _sum_prefixes(to_k), _sum_prefixes(to_v), None


def _differentiate_softmax(weights_BxHxTxS: jax.Array, to_weights: jax.Array) -> jax.Array:
    """The gradient for the scores, from softmax's result and the gradient for that, in float32."""
    wide_BxHxTxS = widen(weights_BxHxTxS)
    to_weights = to_weights.astype(wide_BxHxTxS.dtype)
    # d softmax: w * (g - sum(w g)), row by row; no Jacobian of S x S is made.
    mean_BxHxTx1 = (to_weights * wide_BxHxTxS).sum(-1, keepdims=True)
    return wide_BxHxTxS * (to_weights - mean_BxHxTx1)


def _slice_mask(mask: jax.Array | None, first: int, last: int) -> jax.Array | None:
    return None if mask is None else mask[:, :, first:last, :last]


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
