"""Causal attention, with a backward pass of its own.

q, k, v [B, H, T, D] in, their mixture [B, H, T, D] out. The backward pass keeps the attention weights and
computes their gradient in closed form; left to automatic differentiation, the same program spends more time
around its matrix products than in them. Knows softmax and dropout of weights; leaves projections, heads and
rotary positions to the model.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp


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


def _forward(q_BxHxTxD, k_BxHxSxD, v_BxHxSxD, key, dropout, platform):
    time, depth = q_BxHxTxD.shape[-2:]
    wide = jnp.promote_types(q_BxHxTxD.dtype, jnp.float32)
    scores_BxHxTxS = jnp.einsum("bhtd,bhsd->bhts", q_BxHxTxD, k_BxHxSxD, preferred_element_type=wide)
    causal_TxS = jnp.tril(jnp.ones((time, time), bool))
    scores_BxHxTxS = jnp.where(causal_TxS, scores_BxHxTxS / math.sqrt(depth), -jnp.inf)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1).astype(q_BxHxTxD.dtype)
    kept = None if key is None else jax.random.bernoulli(key, 1.0 - dropout, weights_BxHxTxS.shape)
    mixed = jnp.einsum("bhts,bhsd->bhtd", _dropped(weights_BxHxTxS, kept, dropout, platform), v_BxHxSxD)
    return mixed, (q_BxHxTxD, k_BxHxSxD, v_BxHxSxD, weights_BxHxTxS, kept)


def _backward(dropout, platform, saved, gradient_BxHxTxD):
    q_BxHxTxD, k_BxHxSxD, v_BxHxSxD, weights_BxHxTxS, kept = saved
    dropped_BxHxTxS = _dropped(weights_BxHxTxS, kept, dropout, platform)
    to_v = jnp.einsum("bhts,bhtd->bhsd", dropped_BxHxTxS, gradient_BxHxTxD)
    to_weights = jnp.einsum("bhtd,bhsd->bhts", gradient_BxHxTxD, v_BxHxSxD)
    to_weights = _dropped(to_weights, kept, dropout, platform)
    wide = weights_BxHxTxS.astype(jnp.promote_types(weights_BxHxTxS.dtype, jnp.float32))
    to_scores = wide * (to_weights - (to_weights * wide).sum(-1, keepdims=True))
    to_scores = (to_scores / math.sqrt(q_BxHxTxD.shape[-1])).astype(q_BxHxTxD.dtype)
    to_q = jnp.einsum("bhts,bhsd->bhtd", to_scores, k_BxHxSxD)
    to_k = jnp.einsum("bhts,bhtd->bhsd", to_scores, q_BxHxTxD)
    return to_q, to_k, to_v, None


def _dropped(weights: jax.Array, kept: jax.Array | None, dropout: float, platform: str) -> jax.Array:
    if kept is None:
        return weights
    dropped = jnp.where(kept, weights / (1.0 - dropout), 0).astype(weights.dtype)
    # Without the barrier the compiler for v4 and v5p (libtpu 0.0.42) ends in a stack overflow on large steps.
    return jax.lax.optimization_barrier(dropped) if platform == "tpu" else dropped


causal_attention.defvjp(_forward, _backward)
