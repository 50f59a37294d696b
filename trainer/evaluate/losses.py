"""The losses of some positions, and whether each target was the likeliest token.

On a CPU the vocabulary is taken block by block, with the largest logit and the sum of exponentials
so far (online softmax, arXiv 1805.02867): then a block of logits stays in the caches, and the head
is read once for many positions. Elsewhere all logits of the positions are made at once.

Shapes in names: R positions, E embed, V vocab, C tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trainer.devices.sharding import Layout
from trainer.model.decoder import Decoder
from trainer.model.precision import cap, select_wide_dtype
from trainer.step.loss import cross_entropy

# How many positions are scored at once, at most. On a CPU more are not faster (measured).
ROWS = 512
# The fewest; a call's positions are filled up to a power of two from here to ROWS.
FEWEST_ROWS = 64
# Tokens of the vocabulary whose logits are held at once on a CPU: with 512 positions 2 MB.
BLOCK = 1024

# The losses, and whether each token was the likeliest, of R positions; on the device.
Piece = tuple[jax.Array, jax.Array]


class Seen(NamedTuple):
    """What is known of R positions after some blocks of the vocabulary.

    largest: the largest logit. earlier: the largest of the tokens before the target. total: the sum
    of exp(logit - largest). target: the target's logit, once its block was seen.
    """

    largest: jax.Array
    earlier: jax.Array
    total: jax.Array
    target: jax.Array


def define_losses(network: Decoder, layout: Layout) -> Callable[..., Piece]:
    """(parameters, hidden states [N, E], positions [R], targets [R]) -> (losses, hits)."""
    # Blocks of a vocabulary that is split over devices would be gathered from them.
    in_blocks = layout.platform == "cpu" and layout.mesh.shape["tensor"] == 1
    compute = _compute_in_blocks if in_blocks else _compute_at_once

    def losses(
        params: Any, hidden_NxE: jax.Array, positions_R: jax.Array, targets_R: jax.Array
    ) -> Piece:
        head_VxE = network.head_weight(params)
        return compute(hidden_NxE[positions_R], head_VxE, targets_R, network.logit_cap)

    return losses


def _compute_at_once(
    rows_RxE: jax.Array, head_VxE: jax.Array, targets_R: jax.Array, bound: float | None
) -> Piece:
    logits_RxV = _multiply(rows_RxE, head_VxE, bound)
    return cross_entropy(logits_RxV, targets_R), logits_RxV.argmax(-1) == targets_R


def _multiply(rows_RxE: jax.Array, head_CxE: jax.Array, bound: float | None) -> jax.Array:
    wide = select_wide_dtype(rows_RxE.dtype)
    return cap(jnp.einsum("re,ce->rc", rows_RxE, head_CxE, preferred_element_type=wide), bound)


def _compute_in_blocks(
    rows_RxE: jax.Array, head_VxE: jax.Array, targets_R: jax.Array, bound: float | None
) -> Piece:
    vocab = len(head_VxE)
    size = min(BLOCK, vocab)

    def see_block(number: jax.Array, seen: Seen) -> Seen:
        # The last block begins early enough to be a whole one; what was seen is left out.
        first = jnp.minimum(number * size, vocab - size)
        block_CxE = jax.lax.dynamic_slice_in_dim(head_VxE, first, size)
        tokens_C = first + jnp.arange(size, dtype=jnp.int32)
        logits_RxC = _multiply(rows_RxE, block_CxE, bound)
        logits_RxC = jnp.where((tokens_C >= number * size)[None], logits_RxC, -jnp.inf)
        return _add_block(seen, logits_RxC, tokens_C, targets_R)

    wide = select_wide_dtype(rows_RxE.dtype)
    nothing = jnp.full(len(rows_RxE), -jnp.inf, wide)
    start = Seen(nothing, nothing, jnp.zeros_like(nothing), nothing)
    seen = jax.lax.fori_loop(0, -(-vocab // size), see_block, start)
    losses_R = seen.largest + jnp.log(seen.total) - seen.target
    # As argmax: of several largest the first.
    hits_R = (seen.target == seen.largest) & (seen.earlier < seen.target)
    return losses_R, hits_R


def _add_block(
    seen: Seen, logits_RxC: jax.Array, tokens_C: jax.Array, targets_R: jax.Array
) -> Seen:
    largest_R = jnp.maximum(seen.largest, logits_RxC.max(-1))
    is_earlier_RxC = tokens_C[None] < targets_R[:, None]
    earlier_R = jnp.where(is_earlier_RxC, logits_RxC, -jnp.inf).max(-1)
    block_R = jnp.exp(logits_RxC - largest_R[:, None]).sum(-1)
    is_target_RxC = tokens_C[None] == targets_R[:, None]
    target_R = jnp.where(is_target_RxC, logits_RxC, -jnp.inf).max(-1)
    return Seen(
        largest=largest_R,
        earlier=jnp.maximum(seen.earlier, earlier_R),
        total=seen.total * jnp.exp(seen.largest - largest_R) + block_R,
        target=jnp.maximum(seen.target, target_R),
    )
