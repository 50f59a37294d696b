"""Causal attention, with a backward pass of its own.

q, k, v [B, H, T, D] in, their mixture [B, H, T, D] out. The backward pass keeps the attention weights and
computes their gradient in closed form; left to automatic differentiation, the same program spends more time
around its matrix products than in them. On a CPU it goes by blocks of queries. Knows softmax and dropout of weights;
leaves projections, heads and rotary positions to the model.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from trainer.model.dropout import apply_mask, draw_mask
from trainer.model.matmul import matmul_transposed

# Blocks of queries, each taken with no keys but those of its past: N of them leave (N + 1) / 2N of the work. On a
# CPU, where each operation does what it is told to and no more.
BLOCKS = {"cpu": 4}
SHORTEST = 64  # queries of a block; shorter ones cost more to compile than they save


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def causal_attention(
    q_BxHxTxD: jax.Array,
    k_BxHxSxD: jax.Array,
    v_BxHxSxD: jax.Array,
    key: jax.Array | None,
    dropout: float,
    platform: str = "cpu",
) -> jax.Array:
    """softmax(q k / sqrt(D)) v over the past, in at least float32 up to the weights, which take q's dtype.

    With a key, each weight is dropped with probability `dropout` and the rest scaled up by 1 / (1 - dropout).
    platform: what the program is for; it changes the form and not the function.
    """
    return _forward(q_BxHxTxD, k_BxHxSxD, v_BxHxSxD, key, dropout, platform)[0]


def split_queries(time: int, platform: str) -> list[tuple[int, int]]:
    """The first and last query of each block, the last not included; one block where they would be short or unequal."""
    count = BLOCKS.get(platform, 1)
    size = time // count if time % count == 0 and time >= count * SHORTEST else time
    return [(first, first + size) for first in range(0, time, size)]


def _forward(q_BxHxTxD, k_BxHxSxD, v_BxHxSxD, key, dropout, platform):
    batch, heads, time, _ = q_BxHxTxD.shape
    mask = (
        None
        if key is None
        else draw_mask(jax.random.key_data(key), dropout, (batch, heads, time, time))
    )
    mixed, weights = [], []
    for first, last in split_queries(time, platform):
        weights.append(_weights(q_BxHxTxD[:, :, first:last], k_BxHxSxD[:, :, :last]))
        dropped = _dropped(weights[-1], _part(mask, first, last), dropout, platform)
        mixed.append(jnp.einsum("bhts,bhsd->bhtd", dropped, v_BxHxSxD[:, :, :last]))
    return jnp.concatenate(mixed, 2), (q_BxHxTxD, k_BxHxSxD, v_BxHxSxD, weights, mask)


def _weights(q_BxHxTxD, k_BxHxSxD):
    """The attention weights of the last T of S positions."""
    (time, depth), keys = q_BxHxTxD.shape[-2:], k_BxHxSxD.shape[-2]
    wide = jnp.promote_types(q_BxHxTxD.dtype, jnp.float32)
    scores_BxHxTxS = jnp.einsum(
        "bhtd,bhsd->bhts", q_BxHxTxD, k_BxHxSxD, preferred_element_type=wide
    )
    causal_TxS = jnp.tril(jnp.ones((time, keys), bool), keys - time)
    scores_BxHxTxS = jnp.where(causal_TxS, scores_BxHxTxS / math.sqrt(depth), -jnp.inf)
    return jax.nn.softmax(scores_BxHxTxS, axis=-1).astype(q_BxHxTxD.dtype)


def _backward(dropout, platform, saved, gradient_BxHxTxD):
    q_BxHxTxD, k_BxHxSxD, v_BxHxSxD, weights, mask = saved
    to_q, to_k, to_v = [], [], []
    for (first, last), weights_BxHxTxS in zip(
        split_queries(q_BxHxTxD.shape[2], platform), weights, strict=True
    ):
        part, gradient = _part(mask, first, last), gradient_BxHxTxD[:, :, first:last]
        dropped_BxHxTxS = _dropped(weights_BxHxTxS, part, dropout, platform)
        to_v.append(matmul_transposed(dropped_BxHxTxS, gradient, platform))
        to_weights = jnp.einsum("bhtd,bhsd->bhts", gradient, v_BxHxSxD[:, :, :last])
        to_weights = _dropped(to_weights, part, dropout, platform)
        wide = weights_BxHxTxS.astype(jnp.promote_types(weights_BxHxTxS.dtype, jnp.float32))
        to_scores = wide * (to_weights - (to_weights * wide).sum(-1, keepdims=True))
        to_scores = (to_scores / math.sqrt(q_BxHxTxD.shape[-1])).astype(q_BxHxTxD.dtype)
        to_q.append(jnp.einsum("bhts,bhsd->bhtd", to_scores, k_BxHxSxD[:, :, :last]))
        to_k.append(matmul_transposed(to_scores, q_BxHxTxD[:, :, first:last], platform))
    return jnp.concatenate(to_q, 2), _sum(to_k), _sum(to_v), None


def _part(mask: jax.Array | None, first: int, last: int) -> jax.Array | None:
    return None if mask is None else mask[:, :, first:last, :last]


def _sum(parts: list[jax.Array]) -> jax.Array:
    """The sum of gradients of the first positions, the last one being of all of them."""
    *shorter, total = parts
    for part in shorter:
        total = total.at[:, :, : part.shape[2]].add(part)
    return total


def _dropped(
    weights: jax.Array, mask: jax.Array | None, dropout: float, platform: str
) -> jax.Array:
    if mask is None:
        return weights
    dropped = apply_mask(weights, mask, dropout)
    # Without the barrier the compiler for v4 and v5p (libtpu 0.0.42) ends in a stack overflow on large steps.
    return jax.lax.optimization_barrier(dropped) if platform == "tpu" else dropped


causal_attention.defvjp(_forward, _backward)
