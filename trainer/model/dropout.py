"""Dropout whose masks are computed where they are used, from a key and places in the array.

`jax.random.bernoulli` runs 20 rounds of Threefry. XLA's compiler for TPUs keeps the result of so
many rounds in memory beside a layer. With 13 rounds it computes them inside whatever uses the mask,
and the mask takes no memory. A mask depends on the key and on places in the whole array, so it is
the same on every mesh.
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from growkit.growth.noise import threefry

# The fewest rounds with no known flaw (see `threefry`).
ROUNDS = 13


def draw_mask(words: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Draw independent booleans of a shape, each False with probability `rate`.

    words: uint32 [2], the data of a key. Raises ValueError where the last two dimensions, or the
    product of the others, hold more than 2**32 numbers.
    """
    cut = max(0, len(shape) - 2)
    key = (words[0], words[1])
    outer = _number_places(shape, 0, cut)
    inner = _number_places(shape, cut, len(shape))
    bits = threefry(key, outer, inner, jnp, ROUNDS)
    threshold = round((1.0 - rate) * 2**32)
    return bits < jnp.uint32(min(threshold, 2**32 - 1))


def _number_places(shape: tuple[int, ...], first: int, last: int) -> jax.Array:
    """uint32 of a shape: each place's index, in C order, along dimensions `first` to `last` - 1."""
    if math.prod(shape[first:last]) > 2**32:
        raise ValueError(
            f"dropout numbers the places of dimensions {shape[first:last]} with 32 bits, "
            f"which are too few"
        )
    place = jnp.zeros(shape, jnp.uint32)
    for dimension in range(first, last):
        stride = jnp.uint32(math.prod(shape[dimension + 1 : last]))
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, dimension) * stride
    return place


def apply_mask(x: jax.Array, mask: jax.Array, rate: float) -> jax.Array:
    """x / (1 - rate) where the mask is True, else 0."""
    return jnp.where(mask, x / (1.0 - rate), 0).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def drop(x: jax.Array, words: jax.Array, rate: float) -> jax.Array:
    """Set numbers of x to 0 with probability `rate`, and scale the others by 1 / (1 - rate).

    words: uint32 [2], the data of a key. The backward pass draws the same mask again, so that only
    the key is kept for it.
    """
    return apply_mask(x, draw_mask(words, rate, x.shape), rate)


def _forward(x: jax.Array, words: jax.Array, rate: float) -> tuple[jax.Array, jax.Array]:
    return drop(x, words, rate), words


def _backward(rate: float, words: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return drop(gradient, words, rate), None


drop.defvjp(_forward, _backward)


class HiddenDropout(nn.Module):
    """Dropout of hidden states.

    Flax derives its key from the name of this class: under another name it draws other masks.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        if deterministic or self.rate == 0.0:
            return x
        words = jax.random.key_data(self.make_rng("dropout"))
        return drop(x, words, self.rate)
