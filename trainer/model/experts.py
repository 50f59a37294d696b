"""A mixture of experts in the place of an mlp: a router scores them, a token passes the best few.

No token is dropped and no expert has a capacity: the rows of all tokens are sorted by expert and
multiplied in groups (`trainer.model.grouped`). On a mesh each device has whole experts. It takes
the tokens of all devices along the axis `expert`, computes the rows that its own experts get, and
the parts of each token's sum are added up.

Shapes in names: B batch, T time, E embed, X experts, K experts a token, N tokens, M = N x K rows,
G experts on a device, H hidden units.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from trainer.devices.sharding import BATCH_AXES, COMPUTE_RULES, Layout
from trainer.model.activation import ACTIVATIONS, Function
from trainer.model.grouped import multiply_groups
from trainer.model.parameters import Parameters, Weight
from trainer.model.precision import select_wide_dtype, widen

# The collection in which `apply(..., mutable=[ROUTED])` returns what each layer routed.
ROUTED = "routed"
# The mesh axes over which experts, and the hidden units of each, are split.
EXPERT, TENSOR = "expert", "tensor"


class Routed(NamedTuple):
    """Sums over tokens: how many each expert got, and the router's probabilities; both [X]."""

    counts: jax.Array
    scores: jax.Array


class Router(Parameters):
    """The probabilities [B, T, X] of all experts, in at least float32."""

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array) -> jax.Array:
        weight_XxE = self.parameter("weight")
        wide = select_wide_dtype(x_BxTxE.dtype)
        logits = jnp.einsum("bte,xe->btx", x_BxTxE, weight_XxE, preferred_element_type=wide)
        return jax.nn.softmax(logits, axis=-1)


class Mixture(Parameters):
    """The sum of the chosen experts' outputs, each times its weight."""

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array) -> jax.Array:
        gate, names = self.model.gate, self.computation
        assert gate is not None and gate.scores == "softmax"
        scores_BxTxX = Router(**self.common, name=names.router)(x_BxTxE)
        weights_BxTxK, chosen_BxTxK = jax.lax.top_k(scores_BxTxX, gate.top)
        if gate.normalised:
            weights_BxTxK = weights_BxTxK / weights_BxTxK.sum(-1, keepdims=True)
        # Without effect unless the collection is asked for.
        routed = Routed(_count(chosen_BxTxK, scores_BxTxX), scores_BxTxX.sum((0, 1)))
        self.sow(ROUTED, "sums", routed, reduce_fn=take_last)
        experts = Experts(**self.common, name=names.experts)
        return experts(x_BxTxE, chosen_BxTxK, weights_BxTxK)


def take_last(_: Any, value: Routed | None) -> Routed | None:
    """What a collection keeps of two values of one name."""
    return value


def _count(chosen_BxTxK: jax.Array, scores_BxTxX: jax.Array) -> jax.Array:
    """How many tokens each expert got, [X], in the scores' dtype."""
    experts_X = jnp.arange(scores_BxTxX.shape[-1], dtype=jnp.int32)
    is_chosen = chosen_BxTxK[..., None] == experts_X[None, None, None]
    return is_chosen.sum((0, 1, 2)).astype(scores_BxTxX.dtype)


class Experts(Parameters):
    """Every token through its experts, [B, T, E]; weights are those of the experts' outputs."""

    @nn.compact
    def __call__(
        self, x_BxTxE: jax.Array, chosen_BxTxK: jax.Array, weights_BxTxK: jax.Array
    ) -> jax.Array:
        names = self.computation
        parts = (names.gate, names.up, names.down)
        matrices = [Weight(**self.common, name=name)() for name in parts]
        activate = ACTIVATIONS[self.model.activation]
        compute = partial(apply_experts, activate=activate, platform=self.platform)
        if self.layout is None or self.layout.mesh.size == 1:
            return compute(x_BxTxE, chosen_BxTxK, weights_BxTxK, *matrices)
        specs = [self.spec(name) for name in parts]
        spread = _spread(compute, self.layout, specs)
        return spread(x_BxTxE, chosen_BxTxK, weights_BxTxK, *matrices)

    def spec(self, name: str) -> PartitionSpec:
        """How one layer's matrices of a part lie on the mesh while they are computed with."""
        assert self.layout is not None
        row = next(row for row in self.model.table.rows if row.path == (*self.path, name, "weight"))
        return self.layout.row_sharding(row, COMPUTE_RULES, stacked=False).spec


def apply_experts(
    x_BxTxE: jax.Array,
    chosen_BxTxK: jax.Array,
    weights_BxTxK: jax.Array,
    gate_GxHxE: jax.Array,
    up_GxHxE: jax.Array,
    down_GxExH: jax.Array,
    first: jax.Array | int = 0,
    *,
    activate: Function,
    platform: str,
) -> jax.Array:
    """The weighted sum [B, T, E] of what G experts make of the tokens that chose them.

    first: the number of the first of these experts.
    """
    count, top = len(gate_GxHxE), chosen_BxTxK.shape[-1]
    tokens_NxE = x_BxTxE.reshape(-1, x_BxTxE.shape[-1])
    # Rows of experts elsewhere come last, after all groups.
    local_M = chosen_BxTxK.reshape(-1) - first
    local_M = jnp.where((local_M < 0) | (local_M >= count), count, local_M)
    order_M = jnp.argsort(local_M)
    back_M = jnp.argsort(order_M)
    held_G = jnp.arange(count, dtype=jnp.int32)
    sizes_G = (local_M[:, None] == held_G[None]).sum(0, dtype=jnp.int32)

    def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
        return multiply_groups(x, weight, sizes_G, platform)

    rows_MxE = permute(jnp.repeat(tokens_NxE, top, axis=0), order_M, back_M)
    hidden_MxH = activate(multiply(rows_MxE, gate_GxHxE)) * multiply(rows_MxE, up_GxHxE)
    made_MxE = permute(multiply(hidden_MxH, down_GxExH), back_M, order_M)
    made_NxKxE = made_MxE.reshape(-1, top, made_MxE.shape[-1])
    weights_NxK = weights_BxTxK.reshape(-1, top)
    # Added up in the weights' dtype, at least float32.
    sum_NxE = (widen(made_NxKxE) * weights_NxK[..., None]).sum(1)
    return sum_NxE.astype(x_BxTxE.dtype).reshape(x_BxTxE.shape)


@jax.custom_vjp
def permute(rows: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """rows[order]; back: the inverse permutation.

    The gradient is gathered by it, where JAX's own would be scattered.
    """
    return rows[order]


def _permute_forward(
    rows: jax.Array, order: jax.Array, back: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return rows[order], back


def _permute_backward(back: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    return gradient[back], None, None


permute.defvjp(_permute_forward, _permute_backward)


def _spread(compute: Any, layout: Layout, specs: list[PartitionSpec]) -> Any:
    """`compute` on a mesh, each device with the experts, and the units of them, that it holds."""
    shape = layout.mesh.shape

    def local(x: jax.Array, chosen: jax.Array, weights: jax.Array, *matrices: Any) -> jax.Array:
        first = jax.lax.axis_index(EXPERT) * len(matrices[0])
        tokens = (x, chosen, weights)
        if shape[EXPERT] > 1:
            gather = partial(jax.lax.all_gather, axis_name=EXPERT, axis=0, tiled=True)
            tokens = tuple(gather(array) for array in tokens)
        partial_sums = compute(*tokens, *matrices, first)
        if shape[TENSOR] > 1:
            partial_sums = jax.lax.psum(partial_sums, TENSOR)
        if shape[EXPERT] == 1:
            return partial_sums
        return jax.lax.psum_scatter(partial_sums, EXPERT, scatter_dimension=0, tiled=True)

    batch = PartitionSpec(BATCH_AXES)
    in_specs = (batch, batch, batch, *specs)
    # check_vma compares how values vary over the mesh, which loops over blocks do not tell.
    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=in_specs, out_specs=batch, check_vma=False
    )
