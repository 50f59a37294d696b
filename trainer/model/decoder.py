"""GPT-NeoX in Flax: tokens in, logits out, exactly as Hugging Face defines it.

Flax's linen is used where it carries weight: it lifts one block into a scan over stacked layers (so that
depth does not change compile time), threads dropout and initialisation keys, and rematerialises. Linen and
not nnx because the train step stays a pure function of a tree. The tree is exactly the axis table's: every
parameter takes its shape and its initialisation from the row at its own path.

Shapes in names: B batch, T time (S for keys), E embed, H head, D head_dim, R rotated part of D, V vocab.
Knows the forward pass; leaves loss, gradients and devices to others.
"""

from __future__ import annotations

import math
from dataclasses import field
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_policies

from growkit.checkpoint.tensor import Source
from growkit.models.architecture import Architecture
from growkit.models.notation import Row
from trainer.config.sections import Dropout, Precision
from trainer.devices.sharding import Layout, target_platform
from trainer.model.activation import gelu
from trainer.model.attention import causal_attention
from trainer.model.dropout import HiddenDropout
from trainer.model.kernels import kernel_attention
from trainer.model.matmul import project

REMAT = {
    "none": None,
    "dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": checkpoint_policies.nothing_saveable,
}


def widen(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 if that is what it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def compute_rotary_tables(model: Architecture, time: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine [T, R/2] of the rotary angles.

    As Hugging Face has them, angles and tables are rounded to float32 whatever the model's precision is; the
    functions themselves are taken in float64 so that every machine gets the same tables.
    """
    exponent = np.arange(0, model.rotary, 2, dtype=np.float32) / np.float32(model.rotary)
    frequency = np.float32(1.0) / np.float32(model.rotary_base) ** exponent
    angle = (np.arange(time, dtype=np.float32)[:, None] * frequency).astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x_BxHxTxD: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the first R dimensions of every head by position; the rest passes through."""
    cos, sin = (table.astype(x_BxHxTxD.dtype) for table in rotary)
    half = cos.shape[-1]
    first, second, passed = jnp.split(x_BxHxTxD, [half, 2 * half], axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin, passed], axis=-1
    )


def find_row(model: Architecture, path: tuple[str, ...]) -> Row:
    """The table's row for a path in the parameter tree."""
    return next(row for row in model.table.rows if row.path == path)


def select_initializer(model: Architecture, row: Row) -> Any:
    """How a row begins. Weights that write into the residual stream start smaller by 1/sqrt(2 layers).

    Source: GPT-2 (Radford et al. 2019), section 2.3.
    """
    if row.begins == "ones":
        return nn.initializers.ones
    if row.begins == "zeros":
        return nn.initializers.zeros
    writes_residual = row.writes_stream
    return nn.initializers.normal(
        model.initializer_range / (math.sqrt(2 * model.layer) if writes_residual else 1.0)
    )


class Parameters(nn.Module):
    """A module whose parameters are rows of the axis table, found by the module's own path."""

    model: Architecture
    precision: Precision
    layout: Layout | None = field(default=None, kw_only=True)

    @property
    def common(self) -> dict[str, Any]:
        """What a module hands on to those it is made of."""
        return {"model": self.model, "precision": self.precision, "layout": self.layout}

    @property
    def platform(self) -> str:
        return target_platform(self.layout)

    def parameter(self, name: str, dtype: Any = None) -> jax.Array:
        """The parameter `name` of this module, in the compute dtype unless told, laid out to compute with."""
        row = find_row(self.model, (*self.path, name))
        shape = row.shape(self.model.sizes)
        value = self.param(
            name, select_initializer(self.model, row), shape, jnp.dtype(self.precision.params)
        )
        return self.lay_out(value.astype(dtype or self.precision.compute), row)

    def lay_out(self, value: jax.Array, row: Row) -> jax.Array:
        """A row's parameter, laid out to compute with."""
        return value if self.layout is None else self.layout.gather_parameter(value, row)

    def shard_batch(self, x: jax.Array) -> jax.Array:
        """x, whose first dimension is the batch, laid out by it."""
        return x if self.layout is None else self.layout.constrain(x, self.layout.batch_sharding())


class Linear(Parameters):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return project(x, self.parameter("weight"), self.platform) + self.parameter("bias")


class LayerNorm(Parameters):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = widen(x)
        mean = wide.mean(-1, keepdims=True)
        variance = jnp.square(wide - mean).mean(-1, keepdims=True)
        scaled = (wide - mean) * jax.lax.rsqrt(variance + self.model.norm_eps)
        out = scaled * self.parameter("weight", wide.dtype) + self.parameter("bias", wide.dtype)
        return out.astype(x.dtype)


class Embedding(Parameters):
    """Looks tokens up, and as a head gives logits in at least float32."""

    @nn.compact
    def __call__(self, x: jax.Array, as_head: bool = False) -> jax.Array:
        weight_VxE = self.parameter("weight")
        if not as_head:
            return weight_VxE[x]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("bte,ve->btv", x, weight_VxE, preferred_element_type=wide)


class Attention(Parameters):
    dropout: Dropout
    kernel: str

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, rotary: Any, deterministic: bool) -> jax.Array:
        batch, time, _ = x_BxTxE.shape
        model, common = self.model, self.common
        qkv = Linear(**common, name="query_key_value")(x_BxTxE)
        # The fused dimension is [head, 3, head_dim]: each head's query, key and value lie together.
        qkv = qkv.reshape(batch, time, model.head_count, 3, model.head_dim)
        q_BxHxTxD, k_BxHxTxD, v_BxHxTxD = qkv.transpose(3, 0, 2, 1, 4)
        q_BxHxTxD, k_BxHxTxD = rotate(q_BxHxTxD, rotary), rotate(k_BxHxTxD, rotary)
        if self.kernel == "xla":
            drops = not deterministic and self.dropout.attention > 0
            key = self.make_rng("dropout") if drops else None
            dropout, platform = self.dropout.attention, self.platform
            mixed_BxHxTxD = causal_attention(
                q_BxHxTxD, k_BxHxTxD, v_BxHxTxD, key, dropout, platform
            )
        else:
            mixed_BxHxTxD = kernel_attention(
                self.kernel, q_BxHxTxD, k_BxHxTxD, v_BxHxTxD, self.layout
            )
        return Linear(**common, name="dense")(mixed_BxHxTxD.swapaxes(1, 2).reshape(x_BxTxE.shape))


class MLP(Parameters):
    @nn.compact
    def __call__(self, x_BxTxE: jax.Array) -> jax.Array:
        hidden = Linear(**self.common, name="dense_h_to_4h")(x_BxTxE)
        return Linear(**self.common, name="dense_4h_to_h")(gelu(hidden))


class Block(Parameters):
    dropout: Dropout
    kernel: str

    @nn.compact
    def __call__(
        self, x_BxTxE: jax.Array, rotary: Any, deterministic: bool
    ) -> tuple[jax.Array, None]:
        common = self.common
        drop = partial(HiddenDropout(self.dropout.hidden), deterministic=deterministic)
        attention = Attention(**common, dropout=self.dropout, kernel=self.kernel, name="attention")
        mlp = MLP(**common, name="mlp")
        attended = drop(
            attention(LayerNorm(**common, name="input_layernorm")(x_BxTxE), rotary, deterministic)
        )
        norm = LayerNorm(**common, name="post_attention_layernorm")
        if self.model.options["parallel_residual"]:
            return self.shard_batch(x_BxTxE + attended + drop(mlp(norm(x_BxTxE)))), None
        x_BxTxE = self.shard_batch(x_BxTxE + attended)
        return self.shard_batch(x_BxTxE + drop(mlp(norm(x_BxTxE)))), None


class GPTNeoX(Parameters):
    """The language model. `apply({"params": tree}, tokens [B, T])` gives logits [B, T, V] in at least float32,
    or without `head` the hidden states [B, T, E] that the head would read.
    """

    dropout: Dropout = Dropout(0.0, 0.0, 0.0)
    remat: str = "none"
    # xla, or a kernel, which reads sequences of the configured context and drops no attention weights
    kernel: str = "xla"

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        deterministic: bool = True,
        rotary: Any = None,
        head: bool = True,
    ) -> jax.Array:
        common = self.common
        embed = Embedding(**common, name="embed_in")
        rotary = (
            compute_rotary_tables(self.model, tokens_BxT.shape[1]) if rotary is None else rotary
        )
        x_BxTxE = self.shard_batch(embed(tokens_BxT))
        x_BxTxE = HiddenDropout(self.dropout.embedding)(x_BxTxE, deterministic)
        block = Block
        if self.remat != "none":
            block = nn.remat(
                Block, policy=REMAT[self.remat], prevent_cse=False, static_argnums=(3,)
            )
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.model.layer,
        )
        rotary = tuple(jnp.asarray(table) for table in rotary)
        x_BxTxE, _ = layers(**common, dropout=self.dropout, kernel=self.kernel, name="layers")(
            x_BxTxE, rotary, deterministic
        )
        x_BxTxE = LayerNorm(**common, name="final_layer_norm")(x_BxTxE)
        if not head:
            return x_BxTxE
        return (embed if self.model.tied else Embedding(**common, name="embed_out"))(
            x_BxTxE, as_head=True
        )

    def head_weight(self, params: Any) -> jax.Array:
        """The head's weight [V, E] in a parameter tree, to compute with: the embedding's where they are tied."""
        name = "embed_in" if self.model.tied else "embed_out"
        weight = params[name]["weight"].astype(self.precision.compute)
        return self.lay_out(weight, find_row(self.model, (name, "weight")))


def init_params(model: Architecture, precision: Precision, seed: int) -> Any:
    """A new model's parameter tree, by the table's initialisations."""
    network = GPTNeoX(model, precision)
    return jax.jit(network.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]


def compute_logits(source: Source, tokens_BxT: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """The logits [B, T, V] of a model on disk, computed in `dtype`."""
    network = GPTNeoX(source.model, Precision(dtype, dtype))
    return np.asarray(
        jax.jit(network.apply)({"params": source.stack(dtype=dtype)}, jnp.asarray(tokens_BxT))
    )
