"""The language model in Flax: tokens in, logits out, equal to Hugging Face's.

Flax's linen does three things here: it scans one block over the stacked layers, so that compile
time does not grow with depth; it derives keys for dropout and initialisation; it rematerialises.
Linen and not nnx, because the train step stays a pure function of a tree. The tree is exactly the
axis table's. Which parts there are, and what numbers they use, the family says
(`growkit.models.computation`): there is one model for all families.

Shapes in names: B batch, T time, E embed, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_policies

from growkit.checkpoint.tensor import Source
from growkit.models.architecture import Architecture
from trainer.config.sections import Dropout, Precision
from trainer.model.attention import MIXED, Past
from trainer.model.block import EXPANDED, KEPT, Block, multiply
from trainer.model.dropout import HiddenDropout
from trainer.model.experts import ROUTED, Routed, take_last
from trainer.model.kinds import LayerKind, compute_tables, list_kinds, number_kinds
from trainer.model.parameters import Embedding, Norm, Parameters, find_row
from trainer.model.precision import cap
from trainer.model.view import scan_view

# (stream [B, T, E], rotary tables, deterministic) -> the stream after all layers, and what each
# layer of a mixture routed, [layer, X]
ApplyLayers = Callable[[jax.Array, Any, bool], tuple[jax.Array, Routed | None]]
# What is kept of a block for the backward pass, which computes the rest again; None keeps all.
REMAT = {
    "none": None,
    "dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
    # With an mlp of 4 E these are 5 E numbers per token and layer. They spare 4.7 of the 8.3 E^2
    # multiplications that `full` repeats (E = 1536, 1024 tokens).
    "half": checkpoint_policies.save_only_these_names(MIXED, EXPANDED),
    "full": checkpoint_policies.nothing_saveable,
}


class Decoder(Parameters):
    """The language model.

    `apply({"params": tree}, tokens [B, T])` gives logits [B, T, V] in at least float32, or with
    head=False the hidden states [B, T, E] that the head would read; logits of those must still be
    capped (`logit_cap`). rotary: the tables of `compute_tables`, made here unless given. kernel:
    xla, or a kernel, which reads sequences of the configured context and drops no attention
    weights.

    past: the keys and values of all layers for the positions before `tokens`, which then continue
    that text; at most S positions in all, `past`'s own S. `apply(..., mutable=[KEPT])` returns
    those of `tokens` too: `find_kept`.

    view: int32 [N], the layers to compute with instead of all in their order; see
    `trainer.model.view`. Nothing is dropped or kept then.

    layers: what applies all layers, in the place of the scan over their stacked parameters.
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
        past: Past | None = None,
        view: jax.Array | None = None,
        layers: ApplyLayers | None = None,
    ) -> jax.Array:
        common, names = self.common, self.computation
        time = tokens_BxT.shape[1] if past is None else past.keys.shape[-2]
        embed = Embedding(**common, name=names.embedding)
        kinds, numbers = number_kinds(list_kinds(self.model, time))
        if rotary is None:
            rotary = compute_tables(self.model, kinds, time)
        x_BxTxE = multiply(self.shard_batch(embed(tokens_BxT)), self.embedding_factor)
        if names.positions:
            positions = Embedding(**common, name=names.positions)
            x_BxTxE = x_BxTxE + positions(_list_positions(tokens_BxT, past))[None]
        x_BxTxE = HiddenDropout(self.dropout.embedding)(x_BxTxE, deterministic)
        own = {"dropout": self.dropout, "kernel": self.kernel, "kinds": kinds, "name": names.layers}
        rotary = _select_rotary(rotary, tokens_BxT, past)
        number = jnp.asarray(numbers) if len(kinds) > 1 else None
        if layers is not None:
            x_BxTxE, routed = layers(x_BxTxE, rotary, deterministic)
            self.sow(ROUTED, "sums", routed, reduce_fn=take_last)
        elif view is not None:
            x_BxTxE = scan_view(Block(**common, **own), x_BxTxE, rotary, number, view)
        else:
            stack = _scan_block(self.remat, self.model.layer, past)(**common, **own)
            x_BxTxE, _ = stack(x_BxTxE, rotary, deterministic, number, past)
        x_BxTxE = Norm(**common, name=names.final_norm)(x_BxTxE)
        # Dividing what the head reads divides the logits.
        x_BxTxE = multiply(x_BxTxE, 1.0 / (self.model.number("logit_divisor") or 1.0))
        if not head:
            return x_BxTxE
        if not self.model.tied:
            embed = Embedding(**common, name=names.head)
        return cap(embed(x_BxTxE, as_head=True), self.logit_cap)

    @property
    def embedding_factor(self) -> float:
        """What embedded tokens are multiplied by."""
        if self.computation.embedding_root:
            return math.sqrt(self.model.embed)
        return self.model.number("embedding_factor") or 1.0

    @property
    def logit_cap(self) -> float | None:
        """The bound c of logits, c tanh(logits / c); None for none."""
        return self.model.number("logit_cap")

    def find_kept(self, collections: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values [layer, B, K, T, D] in what `apply(..., mutable=[KEPT])` returned."""
        names = self.computation
        kept = collections[KEPT][names.layers][names.attention]
        return kept["keys"], kept["values"]

    def find_routed(self, collections: Any) -> Routed:
        """What each layer routed, [layer, X], in what `apply(..., mutable=[ROUTED])` returned."""
        names = self.computation
        routed = collections[ROUTED]
        if "sums" not in routed:
            routed = routed[names.layers][names.mlp]
        found: Routed = routed["sums"]
        return found

    def head_weight(self, params: Any) -> jax.Array:
        """The head's weight [V, E] of a parameter tree, to compute with.

        Where the two are tied it is the embedding's.
        """
        name = self.computation.embedding if self.model.tied else self.computation.head
        weight = params[name]["weight"].astype(self.precision.compute)
        return self.lay_out(weight, find_row(self.model, (name, "weight")))


def _list_positions(tokens_BxT: jax.Array, past: Past | None) -> jax.Array:
    """The position [T] of each token."""
    positions_T = jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)
    return positions_T if past is None else past.length + positions_T


def _select_rotary(rotary: Any, tokens_BxT: jax.Array, past: Past | None) -> Any:
    """The rotary tables [..., T, R/2] of the tokens' positions."""
    tables = tuple(jnp.asarray(table) for table in rotary)
    if past is None:
        return tables
    time = tokens_BxT.shape[1]
    return tuple(jax.lax.dynamic_slice_in_dim(table, past.length, time, -2) for table in tables)


def _scan_block(remat: str, layer: int, past: Past | None) -> Any:
    """The module of all layers: one block, scanned over parameters stacked by layer."""
    past_axes = None if past is None else Past(0, 0, nn.broadcast)
    return nn.scan(
        _rematerialise_block(remat),
        variable_axes={"params": 0, KEPT: 0, ROUTED: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, nn.broadcast, 0, past_axes),
        length=layer,
    )


def _rematerialise_block(remat: str) -> Any:
    """The block by a remat policy."""
    if remat == "none":
        return Block
    # Argument 3 of __call__ is deterministic. A scan needs no barrier against common
    # subexpressions.
    return nn.remat(Block, policy=REMAT[remat], prevent_cse=False, static_argnums=(3,))


class Layer(Parameters):
    """One layer by itself, for whoever scans layers otherwise than `Decoder` does.

    `apply({"params": {name of the layers: one layer's parameters}}, x, rotary, deterministic,
    kind)` gives the stream after it. The fields are the decoder's.
    """

    dropout: Dropout
    remat: str
    kernel: str
    kinds: tuple[LayerKind, ...]

    @nn.compact
    def __call__(
        self, x_BxTxE: jax.Array, rotary: Any, deterministic: bool, kind: jax.Array | None
    ) -> jax.Array:
        block = _rematerialise_block(self.remat)(
            **self.common,
            dropout=self.dropout,
            kernel=self.kernel,
            kinds=self.kinds,
            name=self.computation.layers,
        )
        x_BxTxE, _ = block(x_BxTxE, rotary, deterministic, kind, None)
        return x_BxTxE


def init_params(model: Architecture, precision: Precision, seed: int) -> Any:
    """Draw a new model's parameter tree, each row as the table says it begins."""
    network = Decoder(model, precision)
    tokens_BxT = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(network.init)(jax.random.key(seed), tokens_BxT)["params"]


def compute_logits(source: Source, tokens_BxT: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """The logits [B, T, V] of a model on disk, computed in `dtype`."""
    network = Decoder(source.model, Precision(dtype, dtype))
    params = source.stack(dtype=dtype)
    return np.asarray(jax.jit(network.apply)({"params": params}, jnp.asarray(tokens_BxT)))
