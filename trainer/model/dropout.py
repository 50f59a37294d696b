"""Dropout whose masks are made where they are used, from a key and the place of each number.

`jax.random.bernoulli` runs all 20 rounds of Threefry, which XLA's compiler for TPUs keeps in memory beside a layer
instead of computing it within what uses it; 13 rounds it computes there, and a mask takes no memory. A mask
depends on the key and on the place of a number in the whole array, so it is the same on every mesh. Knows masks; leaves
keys, and what is dropped, to the model.
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from growkit.growth.noise import threefry

ROUNDS = 13


def draw_mask(words: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """bool of `shape`: independent, False with probability `rate`.

    words: uint32 [2], the data of a key. Raises ValueError where the last two dimensions, or those before them, hold
    more than 2**32 numbers.
    """
    cut = max(0, len(shape) - 2)
    bits = threefry(
        (words[0], words[1]), _places(shape, 0, cut), _places(shape, cut, len(shape)), jnp, ROUNDS
    )
    return bits < jnp.uint32(min(round((1.0 - rate) * 2**32), 2**32 - 1))


def _places(shape: tuple[int, ...], first: int, last: int) -> jax.Array:
    """uint32 of `shape`: where a number lies in C order among the dimensions from `first` to `last` (exclusive)."""
    if math.prod(shape[first:last]) > 2**32:
        raise ValueError(
            f"dropout numbers the dimensions {shape[first:last]} with 32 bits, which are too few"
        )
    place = jnp.zeros(shape, jnp.uint32)
    for dimension in range(first, last):
        stride = jnp.uint32(math.prod(shape[dimension + 1 : last]))
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, dimension) * stride
    return place


def apply_mask(x: jax.Array, mask: jax.Array, rate: float) -> jax.Array:
    """x scaled up by 1 / (1 - rate) where the mask is True, else 0."""
    return jnp.where(mask, x / (1.0 - rate), 0).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def drop(x: jax.Array, words: jax.Array, rate: float) -> jax.Array:
    """x with numbers set to 0 with probability `rate` and the rest scaled up by 1 / (1 - rate).

    words: uint32 [2], the key's. Its gradient is made by the same mask again, so nothing but the key is kept for it.
    """
    return apply_mask(x, draw_mask(words, rate, x.shape), rate)


def _forward(x: jax.Array, words: jax.Array, rate: float) -> tuple[jax.Array, jax.Array]:
    return drop(x, words, rate), words


def _backward(rate: float, words: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return drop(gradient, words, rate), None


drop.defvjp(_forward, _backward)


class HiddenDropout(nn.Module):
    """Drops numbers of hidden states, by a key of the module's own."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        if deterministic or self.rate == 0.0:
            return x
        return drop(x, jax.random.key_data(self.make_rng("dropout")), self.rate)
