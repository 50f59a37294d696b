"""Modules whose parameters are rows of the axis table: projections, norms, the embedding.

A module finds its rows by its own path in the tree. They give it shapes, how its parameters begin,
whether it has a bias, which way its matrix lies, and what a norm adds to its weight.

Shapes in names: B batch, T time, E embed, V vocab, I and O inputs and outputs.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from growkit.models.architecture import Architecture
from growkit.models.computation import Computation
from growkit.models.notation import Row
from trainer.config.sections import Precision
from trainer.devices.sharding import Layout, target_platform
from trainer.model.matmul import project
from trainer.model.precision import select_wide_dtype, widen


def find_row(model: Architecture, path: tuple[str, ...]) -> Row:
    """Find the table's row for a path in the parameter tree."""
    return next(row for row in model.table.rows if row.path == path)


def select_initializer(model: Architecture, row: Row) -> Any:
    """Select how a row begins.

    Weights that write into the residual stream begin smaller by 1/sqrt(2 layers). Source: GPT-2
    (Radford et al. 2019), section 2.3.
    """
    if row.begins == "ones":
        return nn.initializers.ones
    if row.begins == "zeros":
        return nn.initializers.zeros
    deviation = model.initializer_range
    if row.writes_stream:
        deviation /= math.sqrt(2 * model.layer)
    return nn.initializers.normal(deviation)


class Parameters(nn.Module):
    """A module whose parameters are rows of the axis table, found by the module's own path."""

    model: Architecture
    precision: Precision
    layout: Layout | None = field(default=None, kw_only=True)

    @property
    def common(self) -> dict[str, Any]:
        """The fields that a module shares with its parts."""
        return {"model": self.model, "precision": self.precision, "layout": self.layout}

    @property
    def computation(self) -> Computation:
        """What the family computes."""
        computation = self.model.family.computation
        assert computation is not None
        return computation

    @property
    def platform(self) -> str:
        """What the program is compiled for: cpu, gpu or tpu."""
        return target_platform(self.layout)

    def row(self, name: str) -> Row:
        """The row of the parameter `name` of this module."""
        return find_row(self.model, (*self.path, name))

    def has(self, name: str) -> bool:
        """Whether this module has a parameter `name`."""
        path = (*self.path, name)
        return any(row.path == path for row in self.model.table.rows)

    def parameter(self, name: str, dtype: DTypeLike | None = None) -> jax.Array:
        """The parameter `name` of this module, laid out to compute with.

        dtype: the compute dtype unless given.
        """
        row = self.row(name)
        initializer = select_initializer(self.model, row)
        # Layers are scanned, so that a module has one of them; experts are all here.
        units = [self.model.sizes[axis.name] for axis in row.stacked if axis.name != "layer"]
        shape = (*units, *row.shape(self.model.sizes))
        value = self.param(name, initializer, shape, jnp.dtype(self.precision.params))
        return self.lay_out(value.astype(dtype or self.precision.compute), row)

    def lay_out(self, value: jax.Array, row: Row) -> jax.Array:
        """Lay out a row's parameter to compute with."""
        return value if self.layout is None else self.layout.gather_parameter(value, row)

    def shard_batch(self, x: jax.Array) -> jax.Array:
        """Split x over the devices by its first dimension, the batch."""
        if self.layout is None:
            return x
        return self.layout.constrain(x, self.layout.batch_sharding())


class Linear(Parameters):
    """x weight^T + bias; without a bias where the table has none."""

    @nn.compact
    def __call__(self, x_BxTxI: jax.Array) -> jax.Array:
        weight = self.parameter("weight")
        if self.row("weight").blocks[0][0][0].read:
            # Stored as [inputs, outputs].
            weight = weight.T
        projected_BxTxO = project(x_BxTxI, weight, self.platform)
        if not self.has("bias"):
            return projected_BxTxO
        return projected_BxTxO + self.parameter("bias")[None, None]


class Weight(Parameters):
    """A matrix that another module computes with."""

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.parameter("weight")


class Norm(Parameters):
    """LayerNorm or RMSNorm over the last dimension, computed in at least float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = widen(x)
        if self.model.norm == "layer":
            mean = wide.mean(-1, keepdims=True)
            variance = jnp.square(wide - mean).mean(-1, keepdims=True)
            scaled = (wide - mean) * jax.lax.rsqrt(variance + self.model.norm_eps)
        else:
            square = jnp.square(wide).mean(-1, keepdims=True)
            scaled = wide * jax.lax.rsqrt(square + self.model.norm_eps)
        ahead = (None,) * (x.ndim - 1)
        weight = self.parameter("weight", wide.dtype)
        offset = self.row("weight").offset
        if offset:
            weight = weight + offset
        if not self.has("bias"):
            return (scaled * weight[ahead]).astype(x.dtype)
        bias = self.parameter("bias", wide.dtype)
        return (scaled * weight[ahead] + bias[ahead]).astype(x.dtype)


class Embedding(Parameters):
    """Looks up tokens; as the head it gives logits in at least float32."""

    @nn.compact
    def __call__(self, x: jax.Array, as_head: bool = False) -> jax.Array:
        weight_VxE = self.parameter("weight")
        if not as_head:
            return weight_VxE[x]
        wide = select_wide_dtype(x.dtype)
        return jnp.einsum("bte,ve->btv", x, weight_VxE, preferred_element_type=wide)
