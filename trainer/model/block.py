"""One layer: attention and mlp, with the norms that its family has before and after them.

Shapes in names: B batch, T time, E embed, H head, K key and value head, D head_dim, O outputs.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from trainer.config.sections import Dropout
from trainer.model.activation import ACTIVATIONS
from trainer.model.attention import Past, Scores, attend_to_past, causal_attention
from trainer.model.dropout import HiddenDropout
from trainer.model.experts import Mixture
from trainer.model.kernels import kernel_attention
from trainer.model.kinds import LayerKind
from trainer.model.parameters import Linear, Norm, Parameters
from trainer.model.rotary import rotate

# The collection in which `apply(..., mutable=[KEPT])` returns each layer's keys and values.
KEPT = "kept"
# The name by which a remat policy may keep what the mlp's first product gives.
EXPANDED = "mlp"
Three = tuple[jax.Array, jax.Array, jax.Array]


class Attention(Parameters):
    dropout: Dropout
    kernel: str
    kinds: tuple[LayerKind, ...]

    @nn.compact
    def __call__(
        self,
        x_BxTxE: jax.Array,
        rotary: Any,
        deterministic: bool,
        kind: jax.Array | None,
        past: Past | None,
    ) -> jax.Array:
        computation = self.computation
        split = self.split_fused if computation.fused else self.split_apart
        q_BxHxTxD, k_BxKxTxD, v_BxKxTxD = split(x_BxTxE)
        if rotary:
            if kind is not None and rotary[0].ndim == 3:
                rotary = tuple(table[kind] for table in rotary)
            q_BxHxTxD = rotate(q_BxHxTxD, rotary)
            k_BxKxTxD = rotate(k_BxKxTxD, rotary)
        # Without effect unless the collection is asked for.
        self.sow(KEPT, "keys", k_BxKxTxD, reduce_fn=_take_last)
        self.sow(KEPT, "values", v_BxKxTxD, reduce_fn=_take_last)
        mixed_BxHxTxD = self.mix((q_BxHxTxD, k_BxKxTxD, v_BxKxTxD), deterministic, kind, past)
        mixed_BxTxO = mixed_BxHxTxD.swapaxes(1, 2).reshape(*x_BxTxE.shape[:2], -1)
        return Linear(**self.common, name=computation.output)(mixed_BxTxO)

    def split_fused(self, x_BxTxE: jax.Array) -> Three:
        """Queries, keys and values from one matrix, whose outputs lie as its row says."""
        name = self.computation.fused
        fused_BxTxO = Linear(**self.common, name=name)(x_BxTxE)
        sizes = self.model.sizes
        row = next(row for row in self.model.table.rows if row.path == (*self.path, name, "weight"))
        # NeoX's outputs are [head, 3, head_dim]: each head's query, key and value lie together.
        written = [axis.name for axis in row.parts[0].axes if not axis.read]
        apart = fused_BxTxO.reshape(*x_BxTxE.shape[:2], *(sizes[axis] for axis in written))
        order = {axis: 2 + place for place, axis in enumerate(written)}
        q, k, v = apart.transpose(order["qkv"], 0, order["head"], 1, order["head_dim"])
        return q, k, v

    def split_apart(self, x_BxTxE: jax.Array) -> Three:
        """Queries, keys and values from a matrix each; queries and keys normalised where they are.

        A norm is of each head, or of all heads together before they are split.
        """
        names = self.computation
        q = self.project_heads(x_BxTxE, names.query, names.query_norm)
        k = self.project_heads(x_BxTxE, names.key, names.key_norm)
        v = self.project_heads(x_BxTxE, names.value, "")
        return q, k, v

    def project_heads(self, x_BxTxE: jax.Array, name: str, norm: str) -> jax.Array:
        """[B, heads, T, D] of one projection."""
        outputs_BxTxO = Linear(**self.common, name=name)(x_BxTxE)
        normalise = Norm(**self.common, name=norm) if norm else None
        by_head = norm and self.is_of_one_head(norm)
        if normalise and not by_head:
            outputs_BxTxO = normalise(outputs_BxTxO)
        head_dim = self.model.head_dim
        heads = outputs_BxTxO.reshape(*outputs_BxTxO.shape[:2], -1, head_dim)
        if normalise and by_head:
            heads = normalise(heads)
        return heads.swapaxes(1, 2)

    def is_of_one_head(self, norm: str) -> bool:
        """Whether a norm of queries or keys averages over each head alone."""
        path = (*self.path, norm, "weight")
        row = next(row for row in self.model.table.rows if row.path == path)
        return row.averages == ("head_dim",)

    @property
    def scores(self) -> Scores:
        """How the products of queries and keys become scores."""
        model = self.model
        divisor = math.sqrt(model.number("query_scalar") or model.head_dim)
        factor = model.number("score_factor")
        if factor is not None:
            divisor = 1.0 / factor
        return Scores(divisor, model.number("score_cap"))

    def mix(
        self,
        arrays: Three,
        deterministic: bool,
        kind: jax.Array | None,
        past: Past | None,
    ) -> jax.Array:
        """Attention by the kernel that was selected. Kernels other than xla drop no weights.

        arrays: queries [B, H, T, D], keys and values [B, K, T, D].
        """
        windows = [each.window for each in self.kinds]
        if past is not None:
            total = past.keys.shape[2] + arrays[0].shape[2]
            window = _select_window(windows, kind, total)
            return attend_to_past(*arrays, past, window, self.scores)
        if self.kernel != "xla":
            return kernel_attention(self.kernel, arrays, self.layout, self.scores, windows, kind)
        key = None
        if not deterministic and self.dropout.attention > 0:
            key = self.make_rng("dropout")
        window = _select_window(windows, kind, arrays[0].shape[2])
        return causal_attention(
            *arrays,
            key,
            self.dropout.attention,
            self.platform,
            window,
            self.scores,
        )


def _take_last(_: Any, value: jax.Array) -> jax.Array:
    return value


def _select_window(
    windows: list[int | None], kind: jax.Array | None, time: int
) -> jax.Array | None:
    """The window of a layer as a number; None where no layer has one."""
    if windows == [None]:
        return None
    sizes = jnp.asarray([window or time for window in windows], jnp.int32)
    return sizes[0 if kind is None else kind]


class MLP(Parameters):
    @nn.compact
    def __call__(self, x_BxTxE: jax.Array) -> jax.Array:
        names = self.computation
        activate = ACTIVATIONS[self.model.activation]
        if names.gate:
            gate = checkpoint_name(Linear(**self.common, name=names.gate)(x_BxTxE), EXPANDED)
            up = checkpoint_name(Linear(**self.common, name=names.up)(x_BxTxE), EXPANDED)
            return Linear(**self.common, name=names.down)(activate(gate) * up)
        hidden = checkpoint_name(Linear(**self.common, name=names.up)(x_BxTxE), EXPANDED)
        return Linear(**self.common, name=names.down)(activate(hidden))


class Block(Parameters):
    dropout: Dropout
    kernel: str
    kinds: tuple[LayerKind, ...]

    @nn.compact
    def __call__(
        self,
        x_BxTxE: jax.Array,
        rotary: Any,
        deterministic: bool,
        kind: jax.Array | None,
        past: Past | None,
    ) -> tuple[jax.Array, None]:
        names = self.computation
        factor = self.model.number("residual_factor") or 1.0
        attention = Attention(
            **self.common,
            dropout=self.dropout,
            kernel=self.kernel,
            kinds=self.kinds,
            name=names.attention,
        )
        mlp = (Mixture if names.experts else MLP)(**self.common, name=names.mlp)
        drop = HiddenDropout(self.dropout.hidden)
        read_BxTxE = self.normalise(names.before_attention, x_BxTxE)
        attended_BxTxE = attention(read_BxTxE, rotary, deterministic, kind, past)
        attended_BxTxE = self.normalise(names.after_attention, attended_BxTxE)
        attended_BxTxE = drop(multiply(attended_BxTxE, factor), deterministic)
        residual_BxTxE = x_BxTxE + attended_BxTxE
        if not self.model.options.get("parallel_residual", False):
            # The mlp reads what attention wrote, and not what attention read.
            residual_BxTxE = self.shard_batch(residual_BxTxE)
            x_BxTxE = residual_BxTxE
        expanded_BxTxE = mlp(self.normalise(names.before_mlp, x_BxTxE))
        expanded_BxTxE = self.normalise(names.after_mlp, expanded_BxTxE)
        expanded_BxTxE = drop(multiply(expanded_BxTxE, factor), deterministic)
        return self.shard_batch(residual_BxTxE + expanded_BxTxE), None

    def normalise(self, name: str, x: jax.Array) -> jax.Array:
        """x by the norm of that name; as it is where the family has none."""
        return Norm(**self.common, name=name)(x) if name else x


def multiply(x: jax.Array, factor: float) -> jax.Array:
    """x times a number, rounded to x's dtype; x itself for 1."""
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)
