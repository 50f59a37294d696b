"""The cross-entropy of the next token, without ever holding all logits.

The hidden states are taken a piece of time at a time; where a gradient is asked for, it is taken in the same
pass, while a piece's logits are at hand, so that they are computed once and kept never. Over several devices each
adds up the head's gradient of its own sequences, and what they have is added up once, after all pieces. Knows
hidden states, a head and targets; leaves how they come about to the model.

Shapes in names: G groups of sequences, one for each device that has its own, B sequences of a group, T time,
E embed, V vocab.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from trainer.devices.sharding import BATCH_AXES, COMPUTE_RULES, Layout, target_platform

# Rows (sequences x time) whose logits are held at once. On a CPU a piece should stay in the caches.
ROWS = {"cpu": 256}
ROWS_ELSEWHERE = 2048


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss of every token, nats [...], of logits [..., V] and targets [...], in the logits' precision."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def sum_token_losses(
    hidden_BxTxE: jax.Array,
    head_VxE: jax.Array,
    targets_BxT: jax.Array,
    mask_B: jax.Array,
    layout: Layout | None = None,
) -> jax.Array:
    """The summed loss, nats, over the tokens of the sequences whose mask is 1; in at least float32."""
    groups = layout.batch_shards if layout else 1

    def group(array):
        return array.reshape(groups, len(array) // groups, *array.shape[1:])

    return _grouped_sum(group(hidden_BxTxE), head_VxE, group(targets_BxT), group(mask_B), layout)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped_sum(hidden_GxBxTxE, head_VxE, targets_GxBxT, mask_GxB, layout):
    def add(total, piece):
        hidden, targets = piece
        losses = cross_entropy(_logits(hidden, head_VxE), targets)
        return total + (losses * mask_GxB[..., None]).sum((1, 2)), None

    return jax.lax.scan(
        add, _zeros(hidden_GxBxTxE), _pieces(hidden_GxBxTxE, targets_GxBxT, layout)
    )[0].sum()


def _forward(hidden_GxBxTxE, head_VxE, targets_GxBxT, mask_GxB, layout):
    wide = _zeros(hidden_GxBxTxE).dtype
    # The order of the head's gradient. On a CPU a product's left operand is first laid out by what it is summed
    # over: the narrow hidden states are, and not the logits.
    narrow_left = target_platform(layout) == "cpu"

    def add(carry, piece):
        total, to_head = carry
        hidden, targets = piece
        logits = _logits(hidden, head_VxE)
        losses = cross_entropy(logits, targets)
        # The gradient of a token's loss to its logits: the probabilities, less one at the target.
        probability = jax.nn.softmax(logits, axis=-1) - jax.nn.one_hot(
            targets, logits.shape[-1], dtype=wide
        )
        to_logits = (probability * mask_GxB[..., None, None]).astype(hidden.dtype)
        operands = (
            ("gbte,gbtv->gev", hidden, to_logits)
            if narrow_left
            else ("gbtv,gbte->gve", to_logits, hidden)
        )
        to_head = to_head + jnp.einsum(*operands, preferred_element_type=wide)
        to_hidden = jnp.einsum("gbtv,ve->gbte", to_logits, head_VxE)
        return (total + (losses * mask_GxB[..., None]).sum((1, 2)), to_head), to_hidden

    sides = [(head_VxE.shape[0], *COMPUTE_RULES["vocab"]), (head_VxE.shape[1], None)][
        :: -1 if narrow_left else 1
    ]
    to_head = jnp.zeros((len(hidden_GxBxTxE), *(size for size, _ in sides)), wide)
    if layout:
        to_head = layout.constrain(to_head, layout.make_sharding(BATCH_AXES, *(axis for _, axis in sides)))
    start = (_zeros(hidden_GxBxTxE), to_head)
    (total, to_head), to_hidden = jax.lax.scan(
        add, start, _pieces(hidden_GxBxTxE, targets_GxBxT, layout)
    )
    to_hidden = jnp.moveaxis(to_hidden, 0, 2).reshape(hidden_GxBxTxE.shape)
    to_head = to_head.sum(0).astype(head_VxE.dtype)
    to_head = to_head.T if narrow_left else to_head
    if layout:
        to_head = layout.constrain(
            to_head, layout.make_sharding(layout.moment_rules["vocab"], layout.moment_rules["embed"])
        )
    return total.sum(), (to_hidden, to_head)


def _backward(layout, saved, gradient):
    to_hidden, to_head = saved
    return (
        (to_hidden * gradient).astype(to_hidden.dtype),
        (to_head * gradient).astype(to_head.dtype),
        None,
        None,
    )


_grouped_sum.defvjp(_forward, _backward)


def _logits(hidden_GxBxTxE: jax.Array, head_VxE: jax.Array) -> jax.Array:
    wide = jnp.promote_types(hidden_GxBxTxE.dtype, jnp.float32)
    return jnp.einsum("gbte,ve->gbtv", hidden_GxBxTxE, head_VxE, preferred_element_type=wide)


def _zeros(hidden_GxBxTxE: jax.Array) -> jax.Array:
    return jnp.zeros(len(hidden_GxBxTxE), jnp.promote_types(hidden_GxBxTxE.dtype, jnp.float32))


def _pieces(
    hidden_GxBxTxE: jax.Array, targets_GxBxT: jax.Array, layout: Layout | None
) -> tuple[jax.Array, jax.Array]:
    """Hidden states [N, G, B, T/N, E] and targets [N, G, B, T/N]: time in N equal pieces, sequences kept together."""
    groups, batch, time = targets_GxBxT.shape
    limit = max(1, ROWS.get(target_platform(layout), ROWS_ELSEWHERE) // batch)
    length = max(size for size in range(1, time + 1) if time % size == 0 and size <= limit)

    def cut(array):
        return jnp.moveaxis(
            array.reshape(groups, batch, time // length, length, *array.shape[3:]), 2, 0
        )

    return cut(hidden_GxBxTxE), cut(targets_GxBxT)
