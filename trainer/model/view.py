"""A decoder with other layers than its own: some of them again, some left out, in any order.

The stacked parameters stay where they are. In each step of the scan the parameters of one layer are
read out of the stack by its number, so that a model of N layers takes no more memory than its
source, and one compiled program serves all orders of N layers.

Shapes in names: B batch, T time, E embed, L layers of the stack, N layers of the view.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from trainer.model.block import Block


def scan_view(
    block: Block,
    x_BxTxE: jax.Array,
    rotary: Any,
    kinds_L: jax.Array | None,
    view_N: jax.Array,
) -> jax.Array:
    """What the layers `view_N` of the stack make of x, one after another.

    block: the module whose parameters in the tree are stacked by layer. kinds_L: the number of each
    stacked layer's kind, None where all are of one. Copies are of their source's kind.
    """

    def compute_layer(block: Block, x_BxTxE: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
        def take_layer(stacked: Any) -> Any:
            return jax.tree.map(lambda array: _take(array, layer), stacked)

        kind = None if kinds_L is None else kinds_L[layer]
        compute = nn.map_variables(_call, "params", trans_in_fn=take_layer)
        return compute(block, x_BxTxE, rotary, kind), None

    scan = nn.scan(compute_layer, variable_broadcast="params", split_rngs={"params": False})
    x_BxTxE, _ = scan(block, x_BxTxE, view_N)
    return x_BxTxE


def _take(stacked: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, 0, keepdims=False)


def _call(block: Block, x_BxTxE: jax.Array, rotary: Any, kind: jax.Array | None) -> jax.Array:
    x_BxTxE, _ = block(x_BxTxE, rotary, True, kind, None)
    return x_BxTxE
