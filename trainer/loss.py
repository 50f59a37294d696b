"""The cross-entropy of the next token, without ever holding all logits.

The hidden states are taken a piece of time at a time; where a gradient is asked for, it is taken in the same
pass, while a piece's logits are at hand, so that they are computed once and kept never. Knows hidden states,
a head and targets; leaves how they come about to the model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Rows (sequences x time) whose logits are held at once. On a CPU a piece should stay in the caches.
ROWS = {"cpu": 256}
ROWS_ELSEWHERE = 2048


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss of every token, nats [...], of logits [..., V] and targets [...], in the logits' precision."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


@jax.custom_vjp
def token_losses_sum(
    hidden_BxTxE: jax.Array, head_VxE: jax.Array, targets_BxT: jax.Array, mask_B: jax.Array
) -> jax.Array:
    """The summed loss, nats, over the tokens of the sequences whose mask is 1; in at least float32."""

    def add(total, piece):
        hidden, targets = piece
        losses = cross_entropy(_logits(hidden, head_VxE), targets)
        return total + (losses * mask_B[:, None]).sum(), None

    return jax.lax.scan(add, _zero(hidden_BxTxE), _pieces(hidden_BxTxE, targets_BxT))[0]


def _forward(hidden_BxTxE, head_VxE, targets_BxT, mask_B):
    wide = _zero(hidden_BxTxE).dtype

    def add(carry, piece):
        total, to_head = carry
        hidden, targets = piece
        logits = _logits(hidden, head_VxE)
        losses = cross_entropy(logits, targets)
        # The gradient of a token's loss to its logits: the probabilities, less one at the target.
        probability = jax.nn.softmax(logits, axis=-1) - jax.nn.one_hot(targets, logits.shape[-1], dtype=wide)
        to_logits = (probability * mask_B[:, None, None]).astype(hidden.dtype)
        to_head = to_head + jnp.einsum("btv,bte->ve", to_logits, hidden, preferred_element_type=wide)
        to_hidden = jnp.einsum("btv,ve->bte", to_logits, head_VxE)
        return (total + (losses * mask_B[:, None]).sum(), to_head), to_hidden

    start = (_zero(hidden_BxTxE), jnp.zeros(head_VxE.shape, wide))
    (total, to_head), to_hidden = jax.lax.scan(add, start, _pieces(hidden_BxTxE, targets_BxT))
    to_hidden = jnp.moveaxis(to_hidden, 0, 1).reshape(hidden_BxTxE.shape)
    return total, (to_hidden, to_head.astype(head_VxE.dtype))


def _backward(saved, gradient):
    to_hidden, to_head = saved
    return (to_hidden * gradient).astype(to_hidden.dtype), (to_head * gradient).astype(to_head.dtype), None, None


def _logits(hidden_BxTxE: jax.Array, head_VxE: jax.Array) -> jax.Array:
    wide = jnp.promote_types(hidden_BxTxE.dtype, jnp.float32)
    return jnp.einsum("bte,ve->btv", hidden_BxTxE, head_VxE, preferred_element_type=wide)


def _zero(hidden: jax.Array) -> jax.Array:
    return jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))


def _pieces(hidden_BxTxE: jax.Array, targets_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden states [N, B, T/N, E] and targets [N, B, T/N]: time in N equal pieces, sequences kept together."""
    batch, time = targets_BxT.shape
    limit = max(1, ROWS.get(jax.default_backend(), ROWS_ELSEWHERE) // batch)
    length = max(size for size in range(1, time + 1) if time % size == 0 and size <= limit)

    def cut(array):
        return jnp.moveaxis(array.reshape(batch, time // length, length, *array.shape[2:]), 1, 0)

    return cut(hidden_BxTxE), cut(targets_BxT)


token_losses_sum.defvjp(_forward, _backward)
