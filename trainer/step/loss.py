"""The cross-entropy of the next token, without holding the logits of all tokens at once.

The hidden states are cut along time, and one piece is taken after another. Where a gradient is
wanted, it is computed in the same pass: a piece's logits are computed once and never kept. Over
several devices, each sums the head's gradient of its own sequences; the devices' sums are added
once, after the last piece.

Shapes in names: G groups of sequences, one for each device that has its own; B sequences of a
group, T time, E embed, V vocab.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from trainer.devices.sharding import BATCH_AXES, COMPUTE_RULES, Layout, target_platform
from trainer.model.precision import cap, select_wide_dtype, widen

# How many logits rows (sequences x time) are held at once. On a CPU a piece should stay in the
# caches.
ROWS = {"cpu": 256}
ROWS_ELSEWHERE = 2048
# More rows than any batch has: all logits at once.
ALL_ROWS = 2**62

Pair = tuple[jax.Array, jax.Array]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss of every token, nats [...], from logits [..., V] and targets [...].

    It has the logits' dtype.
    """
    # -log p(target) = logsumexp(logits) - logits[target], without a softmax that could round to 0.
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def sum_token_losses(
    hidden_BxTxE: jax.Array,
    head_VxE: jax.Array,
    targets_BxT: jax.Array,
    mask_B: jax.Array,
    layout: Layout | None = None,
    bound: float | None = None,
    rows: int | None = None,
) -> jax.Array:
    """Sum the loss, nats, of all tokens of the sequences whose mask is 1; in at least float32.

    bound: c where logits are capped by c tanh(logits / c). rows: the most tokens whose logits a
    device holds at once; None for the platform's own number.
    """
    groups = layout.batch_shards if layout else 1

    def group(array: jax.Array) -> jax.Array:
        return array.reshape(groups, len(array) // groups, *array.shape[1:])

    wide_mask_B = mask_B.astype(select_wide_dtype(hidden_BxTxE.dtype))
    limit = rows or ROWS.get(target_platform(layout), ROWS_ELSEWHERE)
    arrays = (group(hidden_BxTxE), head_VxE, group(targets_BxT), group(wide_mask_B))
    return _sum_groups(*arrays, layout, bound, limit)


def read_rows(chunk: str) -> int | None:
    """The `rows` of `sum_token_losses` that a configuration's `loss_chunk` asks for."""
    if chunk == "auto":
        return None
    return ALL_ROWS if chunk == "none" else int(chunk)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sum_groups(
    hidden_GxBxTxE: jax.Array,
    head_VxE: jax.Array,
    targets_GxBxT: jax.Array,
    mask_GxB: jax.Array,
    layout: Layout | None,
    bound: float | None,
    rows: int,
) -> jax.Array:
    def add(total_G: jax.Array, piece: Pair) -> tuple[jax.Array, None]:
        hidden, targets = piece
        losses = cross_entropy(cap(_logits(hidden, head_VxE), bound), targets)
        return total_G + (losses * mask_GxB[..., None]).sum((1, 2)), None

    pieces = _cut_time(hidden_GxBxTxE, targets_GxBxT, rows)
    total_G, _ = jax.lax.scan(add, _zeros(hidden_GxBxTxE), pieces)
    return total_G.sum()


def _forward(
    hidden_GxBxTxE: jax.Array,
    head_VxE: jax.Array,
    targets_GxBxT: jax.Array,
    mask_GxB: jax.Array,
    layout: Layout | None,
    bound: float | None,
    rows: int,
) -> tuple[jax.Array, Pair]:
    """The sum of losses, and its gradient for hidden states and head."""
    # How the head's gradient is summed: [E, V] or [V, E]. A CPU's compiler copies a product's left
    # operand (see trainer.model.matmul), so there the narrow hidden states go left, and not the
    # logits.
    as_ExV = target_platform(layout) == "cpu"

    def add(carry: Pair, piece: Pair) -> tuple[Pair, jax.Array]:
        total_G, to_head = carry
        losses, piece_to_head, to_hidden = _differentiate_piece(
            *piece, head_VxE, mask_GxB, as_ExV, bound
        )
        total_G = total_G + (losses * mask_GxB[..., None]).sum((1, 2))
        return (total_G, to_head + piece_to_head), to_hidden

    start = (_zeros(hidden_GxBxTxE), _start_head_gradient(hidden_GxBxTxE, head_VxE, as_ExV, layout))
    pieces = _cut_time(hidden_GxBxTxE, targets_GxBxT, rows)
    (total_G, to_head), to_hidden = jax.lax.scan(add, start, pieces)
    to_hidden = jnp.moveaxis(to_hidden, 0, 2).reshape(hidden_GxBxTxE.shape)
    # The one sum over devices: until here each has added up its own.
    to_head = to_head.sum(0).astype(head_VxE.dtype)
    to_head_VxE = to_head.T if as_ExV else to_head
    if layout:
        rules = layout.moment_rules
        sharding = layout.make_sharding(rules["vocab"], rules["embed"])
        to_head_VxE = layout.constrain(to_head_VxE, sharding)
    return total_G.sum(), (to_hidden, to_head_VxE)


def _differentiate_piece(
    hidden_GxBxTxE: jax.Array,
    targets_GxBxT: jax.Array,
    head_VxE: jax.Array,
    mask_GxB: jax.Array,
    as_ExV: bool,
    bound: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The losses [G, B, T] of a piece, and the gradients of their masked sum.

    The gradients are for the head, [G, E, V] or [G, V, E], and for the hidden states.
    """
    logits_GxBxTxV = cap(_logits(hidden_GxBxTxE, head_VxE), bound)
    losses_GxBxT = cross_entropy(logits_GxBxTxV, targets_GxBxT)
    wide = logits_GxBxTxV.dtype
    # The gradient of a token's loss for its logits: the probabilities, less 1 at the target.
    probability = jax.nn.softmax(logits_GxBxTxV, axis=-1)
    error = probability - jax.nn.one_hot(targets_GxBxT, head_VxE.shape[0], dtype=wide)
    if bound is not None:
        error = error * (1.0 - jnp.square(logits_GxBxTxV / bound))
    # Rounded to the hidden states' dtype: so both products below are the fast narrow ones.
    to_logits = (error * mask_GxB[..., None, None]).astype(hidden_GxBxTxE.dtype)
    if as_ExV:
        operands = ("gbte,gbtv->gev", hidden_GxBxTxE, to_logits)
    else:
        operands = ("gbtv,gbte->gve", to_logits, hidden_GxBxTxE)
    to_head = jnp.einsum(*operands, preferred_element_type=wide)
    to_hidden_GxBxTxE = jnp.einsum("gbtv,ve->gbte", to_logits, head_VxE)
    return losses_GxBxT, to_head, to_hidden_GxBxTxE


def _start_head_gradient(
    hidden_GxBxTxE: jax.Array, head_VxE: jax.Array, as_ExV: bool, layout: Layout | None
) -> jax.Array:
    """Zeros [G, E, V] or [G, V, E], each group's on its own device."""
    groups = len(hidden_GxBxTxE)
    vocab, embed = head_VxE.shape
    (vocab_axis,) = COMPUTE_RULES["vocab"]
    shape = (groups, vocab, embed)
    spec: tuple[Any, ...] = (BATCH_AXES, vocab_axis, None)
    if as_ExV:
        shape = (groups, embed, vocab)
        spec = (BATCH_AXES, None, vocab_axis)
    zeros = jnp.zeros(shape, select_wide_dtype(hidden_GxBxTxE.dtype))
    return layout.constrain(zeros, layout.make_sharding(*spec)) if layout else zeros


def _backward(
    layout: Layout | None, bound: float | None, rows: int, saved: Pair, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    to_hidden, to_head = saved
    scaled_to_hidden = (widen(to_hidden) * gradient).astype(to_hidden.dtype)
    scaled_to_head = (widen(to_head) * gradient).astype(to_head.dtype)
    return scaled_to_hidden, scaled_to_head, None, None


_sum_groups.defvjp(_forward, _backward)


def _logits(hidden_GxBxTxE: jax.Array, head_VxE: jax.Array) -> jax.Array:
    wide = select_wide_dtype(hidden_GxBxTxE.dtype)
    return jnp.einsum("gbte,ve->gbtv", hidden_GxBxTxE, head_VxE, preferred_element_type=wide)


def _zeros(hidden_GxBxTxE: jax.Array) -> jax.Array:
    """A sum for each group."""
    return jnp.zeros(len(hidden_GxBxTxE), select_wide_dtype(hidden_GxBxTxE.dtype))


def _cut_time(
    hidden_GxBxTxE: jax.Array, targets_GxBxT: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Cut time into N equal pieces: hidden states [N, G, B, T/N, E] and targets [N, G, B, T/N].

    A piece is the longest that has no more than `rows` tokens of a group.
    """
    groups, batch, time = targets_GxBxT.shape
    limit = max(1, rows // batch)
    # The pieces are equal, so the length divides T: 2048 rows of 8 sequences of 1024 tokens make
    # pieces of 256.
    length = max(size for size in range(1, time + 1) if time % size == 0 and size <= limit)

    def cut(array: jax.Array) -> jax.Array:
        shape = (groups, batch, time // length, length, *array.shape[3:])
        return jnp.moveaxis(array.reshape(shape), 2, 0)

    return cut(hidden_GxBxTxE), cut(targets_GxBxT)
