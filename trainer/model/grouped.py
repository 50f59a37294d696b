"""Products of groups of rows, each group with a matrix of its own, as experts need them.

Rows lie in the order of their groups, and groups may have any number of rows: none is dropped, and
none is padded. Accelerators have an instruction for that (`jax.lax.ragged_dot`). XLA for CPU
computes it as if every row went through every matrix, G times the work; there a loop takes one
block of rows of one group after another.

Shapes in names: M rows, G groups, I and O inputs and outputs, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trainer.model.matmul import matmul_transposed

# Rows of a block at most. The last block of each group is computed whole, so that long blocks waste
# work on short groups; short ones multiply slowly.
ROWS = 128


def multiply_groups(
    x_MxI: jax.Array, weight_GxOxI: jax.Array, sizes_G: jax.Array, platform: str
) -> jax.Array:
    """Multiply each group's rows by its weight^T: [M, O]. sizes: rows of each group, int32.

    Rows after the last group give zeros, and have no gradient.
    """
    if platform == "cpu":
        return _multiply_blocks(x_MxI, weight_GxOxI, sizes_G)
    is_grouped_Mx1 = (_list_rows(len(x_MxI)) < sizes_G.sum(dtype=jnp.int32))[:, None]
    # What an accelerator makes of rows of no group is not said, so both ways are masked.
    grouped_MxI = jnp.where(is_grouped_Mx1, x_MxI, 0)
    product_MxO = jax.lax.ragged_dot(grouped_MxI, weight_GxOxI.swapaxes(1, 2), sizes_G)
    return jnp.where(is_grouped_Mx1, product_MxO, 0)


class Block(NamedTuple):
    """Some rows of one group. start: the first of them. is_in: [R, 1], which are of the group."""

    group: jax.Array
    start: jax.Array
    is_in: jax.Array


def _loop_over_blocks(
    sizes_G: jax.Array, rows: int, add: Callable[[Block, jax.Array], jax.Array], start: jax.Array
) -> jax.Array:
    """Fold `add` over all blocks, in the order of the rows. rows: of a block."""
    blocks_G = -(-sizes_G // rows)
    last_G = jnp.cumsum(blocks_G, dtype=jnp.int32)
    end_G = jnp.cumsum(sizes_G, dtype=jnp.int32)

    def step(number: jax.Array, total: jax.Array) -> jax.Array:
        group = jnp.searchsorted(last_G, number, side="right").astype(jnp.int32)
        within = number - (last_G[group] - blocks_G[group])
        first = end_G[group] - sizes_G[group] + within * rows
        is_in = (first + _list_rows(rows) < end_G[group])[:, None]
        return add(Block(group, first, is_in), total)

    # As many turns as there are blocks, which only the sizes tell.
    return jax.lax.fori_loop(jnp.int32(0), last_G[-1], step, start)


def _list_rows(count: int) -> jax.Array:
    """0, 1, ... of so many rows; counts are int32, in JAX's 64-bit mode too."""
    return jnp.arange(count, dtype=jnp.int32)


def _pad(x_MxI: jax.Array, rows: int) -> jax.Array:
    """Rows of zeros after the last, so that the last block is whole."""
    return jnp.pad(x_MxI, ((0, rows), (0, 0)))


def _map_blocks(
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    x_MxI: jax.Array,
    weight_GxAxB: jax.Array,
    sizes_G: jax.Array,
    outputs: int,
) -> jax.Array:
    """What `multiply` makes of each block [R, I] and its group's weight: [M, outputs]."""
    count = len(x_MxI)
    rows = min(ROWS, count)
    padded = _pad(x_MxI, rows)

    def add(block: Block, product: jax.Array) -> jax.Array:
        x_RxI = jax.lax.dynamic_slice_in_dim(padded, block.start, rows)
        multiplied = multiply(x_RxI, weight_GxAxB[block.group])
        # Rows of the next group are zero until its own blocks, which come later, write them.
        kept = jnp.where(block.is_in, multiplied, 0)
        return jax.lax.dynamic_update_slice_in_dim(product, kept, block.start, 0)

    zeros = jnp.zeros((count + rows, outputs), x_MxI.dtype)
    return _loop_over_blocks(sizes_G, rows, add, zeros)[:count]


@jax.custom_vjp
def _multiply_blocks(x_MxI: jax.Array, weight_GxOxI: jax.Array, sizes_G: jax.Array) -> jax.Array:
    multiply = partial(jnp.einsum, "ri,oi->ro")
    return _map_blocks(multiply, x_MxI, weight_GxOxI, sizes_G, weight_GxOxI.shape[1])


def _forward(
    x_MxI: jax.Array, weight_GxOxI: jax.Array, sizes_G: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _multiply_blocks(x_MxI, weight_GxOxI, sizes_G), (x_MxI, weight_GxOxI, sizes_G)


def _backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], gradient_MxO: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_MxI, weight_GxOxI, sizes_G = saved
    multiply = partial(jnp.einsum, "ro,oi->ri")
    to_x = _map_blocks(multiply, gradient_MxO, weight_GxOxI, sizes_G, x_MxI.shape[1])
    return to_x, _sum_outer(gradient_MxO, x_MxI, weight_GxOxI, sizes_G), None


def _sum_outer(
    gradient_MxO: jax.Array, x_MxI: jax.Array, weight_GxOxI: jax.Array, sizes_G: jax.Array
) -> jax.Array:
    """The gradient [G, O, I] of the weights: of each group gradient^T x."""
    rows = min(ROWS, len(x_MxI))
    padded_gradient, padded_x = _pad(gradient_MxO, rows), _pad(x_MxI, rows)

    def add(block: Block, total: jax.Array) -> jax.Array:
        gradient_RxO = jax.lax.dynamic_slice_in_dim(padded_gradient, block.start, rows)
        x_RxI = jax.lax.dynamic_slice_in_dim(padded_x, block.start, rows)
        product = matmul_transposed(jnp.where(block.is_in, gradient_RxO, 0), x_RxI, "cpu")
        return total.at[block.group].add(product.astype(total.dtype))

    return _loop_over_blocks(sizes_G, rows, add, jnp.zeros_like(weight_GxOxI))


_multiply_blocks.defvjp(_forward, _backward)
