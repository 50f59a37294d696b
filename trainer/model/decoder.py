"""GPT-NeoX in Flax: tokens in, logits out, equal to Hugging Face's.

Flax's linen does three things here: it scans one block over the stacked layers, so that compile
time does not grow with depth; it derives keys for dropout and initialisation; it rematerialises.
Linen and not nnx, because the train step stays a pure function of a tree. The tree is exactly the
axis table's: a parameter takes its shape and its initialisation from the row for its own path.

Shapes in names: B batch, T time (S for keys), E embed, H head, D head_dim, R rotated part of D,
V vocab, I and O inputs and outputs.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_policies
from jax.typing import DTypeLike

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
from trainer.model.precision import select_wide_dtype, widen

# What is kept of a block for the backward pass, which computes the rest again; None keeps all.
REMAT = {
    "none": None,
    "dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": checkpoint_policies.nothing_saveable,
}


def compute_rotary_tables(model: Architecture, time: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine [T, R/2] of the rotary angles.

    As in Hugging Face, angles and tables are rounded to float32 whatever the model's precision. The
    functions themselves are computed in float64, so that every machine gets the same tables.
    """
    exponent = np.arange(0, model.rotary, 2, dtype=np.float32) / np.float32(model.rotary)
    frequency = np.float32(1.0) / np.float32(model.rotary_base) ** exponent
    angle = (np.arange(time, dtype=np.float32)[:, None] * frequency).astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x_BxHxTxD: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the first R dimensions of every head by position; the others stay."""
    cos, sin = (table.astype(x_BxHxTxD.dtype)[None, None] for table in rotary)
    half = cos.shape[-1]
    first, second, unrotated = jnp.split(x_BxHxTxD, [half, 2 * half], axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin, unrotated], axis=-1
    )


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
    def platform(self) -> str:
        """What the program is compiled for: cpu, gpu or tpu."""
        return target_platform(self.layout)

    def parameter(self, name: str, dtype: DTypeLike | None = None) -> jax.Array:
        """The parameter `name` of this module, laid out to compute with.

        dtype: the compute dtype unless given.
        """
        row = find_row(self.model, (*self.path, name))
        initializer = select_initializer(self.model, row)
        shape = row.shape(self.model.sizes)
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
    @nn.compact
    def __call__(self, x_BxTxI: jax.Array) -> jax.Array:
        projected_BxTxO = project(x_BxTxI, self.parameter("weight"), self.platform)
        return projected_BxTxO + self.parameter("bias")[None, None]


class LayerNorm(Parameters):
    @nn.compact
    def __call__(self, x_BxTxE: jax.Array) -> jax.Array:
        wide_BxTxE = widen(x_BxTxE)
        mean = wide_BxTxE.mean(-1, keepdims=True)
        variance = jnp.square(wide_BxTxE - mean).mean(-1, keepdims=True)
        scaled = (wide_BxTxE - mean) * jax.lax.rsqrt(variance + self.model.norm_eps)
        weight_E = self.parameter("weight", wide_BxTxE.dtype)
        bias_E = self.parameter("bias", wide_BxTxE.dtype)
        return (scaled * weight_E[None, None] + bias_E[None, None]).astype(x_BxTxE.dtype)


class Embedding(Parameters):
    """Looks up tokens; as the head it gives logits in at least float32."""

    @nn.compact
    def __call__(self, x: jax.Array, as_head: bool = False) -> jax.Array:
        weight_VxE = self.parameter("weight")
        if not as_head:
            return weight_VxE[x]
        wide = select_wide_dtype(x.dtype)
        return jnp.einsum("bte,ve->btv", x, weight_VxE, preferred_element_type=wide)


class Attention(Parameters):
    dropout: Dropout
    kernel: str

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, rotary: Any, deterministic: bool) -> jax.Array:
        batch, time, _ = x_BxTxE.shape
        heads = self.model.head_count
        qkv = Linear(**self.common, name="query_key_value")(x_BxTxE)
        # The fused dimension is [head, 3, head_dim]: each head's query, key and value lie together.
        qkv_BxTxHx3xD = qkv.reshape(batch, time, heads, 3, self.model.head_dim)
        q_BxHxTxD, k_BxHxTxD, v_BxHxTxD = qkv_BxTxHx3xD.transpose(3, 0, 2, 1, 4)
        q_BxHxTxD = rotate(q_BxHxTxD, rotary)
        k_BxHxTxD = rotate(k_BxHxTxD, rotary)
        mixed_BxHxTxD = self.mix(q_BxHxTxD, k_BxHxTxD, v_BxHxTxD, deterministic)
        mixed_BxTxE = mixed_BxHxTxD.swapaxes(1, 2).reshape(x_BxTxE.shape)
        return Linear(**self.common, name="dense")(mixed_BxTxE)

    def mix(
        self,
        q_BxHxTxD: jax.Array,
        k_BxHxTxD: jax.Array,
        v_BxHxTxD: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """Attention by the kernel that was selected. Kernels other than xla drop no weights."""
        if self.kernel != "xla":
            return kernel_attention(self.kernel, q_BxHxTxD, k_BxHxTxD, v_BxHxTxD, self.layout)
        key = None
        if not deterministic and self.dropout.attention > 0:
            key = self.make_rng("dropout")
        return causal_attention(
            q_BxHxTxD, k_BxHxTxD, v_BxHxTxD, key, self.dropout.attention, self.platform
        )


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
        drop = HiddenDropout(self.dropout.hidden)
        attention = Attention(**common, dropout=self.dropout, kernel=self.kernel, name="attention")
        mlp = MLP(**common, name="mlp")
        attention_norm = LayerNorm(**common, name="input_layernorm")
        mlp_norm = LayerNorm(**common, name="post_attention_layernorm")
        attended_BxTxE = attention(attention_norm(x_BxTxE), rotary, deterministic)
        residual_BxTxE = x_BxTxE + drop(attended_BxTxE, deterministic)
        if not self.model.options["parallel_residual"]:
            # The mlp reads what attention wrote, and not what attention read.
            residual_BxTxE = self.shard_batch(residual_BxTxE)
            x_BxTxE = residual_BxTxE
        expanded_BxTxE = mlp(mlp_norm(x_BxTxE))
        return self.shard_batch(residual_BxTxE + drop(expanded_BxTxE, deterministic)), None


class GPTNeoX(Parameters):
    """The language model.

    `apply({"params": tree}, tokens [B, T])` gives logits [B, T, V] in at least float32, or with
    head=False the hidden states [B, T, E] that the head would read. kernel: xla, or a kernel, which
    reads sequences of the configured context and drops no attention weights.
    """

    dropout: Dropout = Dropout(0.0, 0.0, 0.0)
    remat: str = "none"
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
        if rotary is None:
            rotary = compute_rotary_tables(self.model, tokens_BxT.shape[1])
        x_BxTxE = self.shard_batch(embed(tokens_BxT))
        x_BxTxE = HiddenDropout(self.dropout.embedding)(x_BxTxE, deterministic)
        scanned = _scan_block(self.remat, self.model.layer)
        layers = scanned(**common, dropout=self.dropout, kernel=self.kernel, name="layers")
        rotary = tuple(jnp.asarray(table) for table in rotary)
        x_BxTxE, _ = layers(x_BxTxE, rotary, deterministic)
        x_BxTxE = LayerNorm(**common, name="final_layer_norm")(x_BxTxE)
        if not head:
            return x_BxTxE
        if not self.model.tied:
            embed = Embedding(**common, name="embed_out")
        return embed(x_BxTxE, as_head=True)

    def head_weight(self, params: Any) -> jax.Array:
        """The head's weight [V, E] of a parameter tree, to compute with.

        Where the two are tied it is the embedding's.
        """
        name = "embed_in" if self.model.tied else "embed_out"
        weight = params[name]["weight"].astype(self.precision.compute)
        return self.lay_out(weight, find_row(self.model, (name, "weight")))


def _scan_block(remat: str, layer: int) -> Any:
    """The module of all layers: one block, scanned over parameters stacked by layer."""
    block: Any = Block
    if remat != "none":
        # Argument 3 of __call__ is deterministic. A scan needs no barrier against common
        # subexpressions.
        block = nn.remat(Block, policy=REMAT[remat], prevent_cse=False, static_argnums=(3,))
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=layer,
    )


def init_params(model: Architecture, precision: Precision, seed: int) -> Any:
    """Draw a new model's parameter tree, each row as the table says it begins."""
    network = GPTNeoX(model, precision)
    tokens_BxT = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(network.init)(jax.random.key(seed), tokens_BxT)["params"]


def compute_logits(source: Source, tokens_BxT: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """The logits [B, T, V] of a model on disk, computed in `dtype`."""
    network = GPTNeoX(source.model, Precision(dtype, dtype))
    params = source.stack(dtype=dtype)
    return np.asarray(jax.jit(network.apply)({"params": params}, jnp.asarray(tokens_BxT)))
