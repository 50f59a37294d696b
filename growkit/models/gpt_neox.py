"""GPT-NeoX: the axis table, and the sizes and options that a Hugging Face config.json states.

From the table come the model's shapes, its initialisation, growth, names in files and the decay mask.
Knows the architecture's facts; leaves arithmetic on arrays, files and the forward pass to others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

from growkit.errors import GrowkitError, UsageError
from growkit.models.architecture import Architecture, check_sizes, count_parameters, whole
from growkit.models.notation import Table, parse_table

TABLE = """
# name                                                   axes                             begins   only when
gpt_neox.embed_in.weight                                 vocab embed                      normal
gpt_neox.layers.{layer}.input_layernorm.weight           embed                            ones
gpt_neox.layers.{layer}.input_layernorm.bias             embed                            zeros
gpt_neox.layers.{layer}.post_attention_layernorm.weight  embed                            ones
gpt_neox.layers.{layer}.post_attention_layernorm.bias    embed                            zeros
gpt_neox.layers.{layer}.attention.query_key_value.weight (head qkv head_dim) /embed       normal
gpt_neox.layers.{layer}.attention.query_key_value.bias   (head qkv head_dim)              zeros
gpt_neox.layers.{/layer}.attention.dense.weight          embed (/head /head_dim)          normal
gpt_neox.layers.{/layer}.attention.dense.bias            embed                            zeros
gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight         mlp /embed                       normal
gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias           mlp                              zeros
gpt_neox.layers.{/layer}.mlp.dense_4h_to_h.weight        embed /mlp                       normal
gpt_neox.layers.{/layer}.mlp.dense_4h_to_h.bias          embed                            zeros
gpt_neox.final_layer_norm.weight                         embed                            ones     untied
gpt_neox.final_layer_norm.bias                           embed                            zeros    untied
# A tied head reads embed through the embedding, which writes it: the norm before it takes the reader's share.
gpt_neox.final_layer_norm.weight                         /embed                           ones     tied
gpt_neox.final_layer_norm.bias                           /embed                           zeros    tied
embed_out.weight                                         vocab /embed                     normal   untied
"""

FIELDS = {
    "vocab": "vocab_size",
    "layer": "num_hidden_layers",
    "embed": "hidden_size",
    "head": "num_attention_heads",
    "mlp": "intermediate_size",
}

# Buffers that old checkpoints carry and no model of today reads.
BUFFERS = (
    ".attention.bias",
    ".attention.masked_bias",
    ".attention.rotary_emb.inv_freq",
    ".rotary_emb.inv_freq",
)

# What transformers takes for a field that config.json leaves out (GPTNeoXConfig, versions 4 and 5).
DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "hidden_act": "gelu",
    "attention_bias": True,
}


@dataclass(frozen=True)
class NeoX(Architecture):
    """A GPT-NeoX model's sizes and options.

    rotary_pct is the part of each head that is rotated; layer_norm_eps has no unit; context is in tokens.
    """

    fields: ClassVar[Mapping[str, str]] = FIELDS
    kind: ClassVar[str] = "gpt_neox"
    norm: ClassVar[str] = "layer"
    heads: ClassVar[str] = "head"
    head_name: ClassVar[str] = "embed_out.weight"
    buffers: ClassVar[tuple[str, ...]] = BUFFERS

    layer: int
    embed: int
    head: int
    mlp: int
    vocab: int = 50304
    context: int = 1024
    rotary_pct: float = 0.25
    rotary_base: float = 10000.0
    parallel_residual: bool = True
    tied: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        if self.embed % self.head:
            low = self.embed - self.embed % self.head
            raise GrowkitError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.embed} and {self.head}; "
                f"the nearest hidden sizes are {low or self.head} and {low + self.head}"
            )
        if self.rotary % 2 or not 0 < self.rotary <= self.head_dim:
            raise GrowkitError(
                f"the rotated part of a head must be even and between 2 and head_dim, got int({self.head_dim} x "
                f"{self.rotary_pct}) = {self.rotary}"
            )

    @property
    def head_dim(self) -> int:
        return self.embed // self.head

    @property
    def rotary(self) -> int:
        """How many of a head's dimensions are rotated."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis of the table."""
        return {axis: getattr(self, axis) for axis in FIELDS} | {
            "head_dim": self.head_dim,
            "qkv": 3,
        }

    @property
    def table(self) -> Table:
        return table(self.tied)

    @property
    def norm_eps(self) -> float:
        return self.layer_norm_eps

    def resized(self, sizes: Mapping[str, int], norm_eps: float | None = None) -> NeoX:
        """This model at other sizes. embed must be head x head_dim; rotary_pct is rewritten to keep `rotary`.

        transformers takes int(head_dim * rotary_pct): where rounding would miss the count, half a dimension is added.
        """
        axes = {axis: sizes[axis] for axis in FIELDS}
        head_dim = axes["embed"] // axes["head"]
        share = self.rotary_pct
        if head_dim != self.head_dim:
            share = self.rotary / head_dim
            share = (
                share if int(head_dim * share) == self.rotary else (self.rotary + 0.5) / head_dim
            )
        return replace(
            self, **axes, rotary_pct=share, layer_norm_eps=norm_eps or self.layer_norm_eps
        )

    def written(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return write_config(self, base)

    def flops_per_token(self, context: int | None = None) -> float:
        """Training FLOPs a token: 6 per weight that is multiplied, and 12 x layer x embed x context for attention.

        PaLM (arXiv 2204.02311), appendix B; the embedding look-up multiplies nothing, the head does.
        """
        matrices = [
            row
            for row in self.table.rows
            if len(row.dimensions) == 2 and "embed_in" not in row.name
        ]
        layered = count_parameters(Table(tuple(matrices)), self.sizes)
        head = self.vocab * self.embed if self.tied else 0
        return 6.0 * (layered + head) + 12.0 * self.layer * self.embed * (context or self.context)


@lru_cache
def table(tied: bool) -> Table:
    """The rows that hold for a tied or an untied head."""
    other = "untied" if tied else "tied"
    return Table(tuple(row for row in parse_table(TABLE) if row.condition != other))


def read_config(config: Mapping[str, Any]) -> NeoX:
    """The sizes and options in the content of a config.json, as transformers 4 or 5 wrote it.

    Raises GrowkitError for another architecture and for values that contradict each other.
    """
    values = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    _check_function(values)
    rope = values.get("rope_parameters") or {}
    try:
        return NeoX(
            **{axis: whole(values, field) for axis, field in FIELDS.items()},
            context=whole(values, "max_position_embeddings"),
            rotary_pct=float(rope.get("partial_rotary_factor", values["rotary_pct"])),
            rotary_base=float(rope.get("rope_theta", values["rotary_emb_base"])),
            parallel_residual=bool(values["use_parallel_residual"]),
            tied=bool(values["tie_word_embeddings"]),
            layer_norm_eps=float(values["layer_norm_eps"]),
            initializer_range=float(values["initializer_range"]),
        )
    except (AttributeError, TypeError, ValueError) as problem:
        raise GrowkitError(f"config.json holds a value of the wrong kind: {problem}") from None


def require_neox(model: Architecture, origin: Any) -> NeoX:
    """The model of `origin`, for what computes GPT-NeoX only. Raises UsageError for another architecture."""
    if not isinstance(model, NeoX):
        raise UsageError(
            f"{origin} is a {model.kind!r} model, which growkit grows but does not train: training, import, export "
            f"and generate take {NeoX.kind!r} only"
        )
    return model


def _check_function(values: Mapping[str, Any]) -> None:
    """Raise GrowkitError for an option under which the model computes another function than growkit's trainer."""
    if not values["attention_bias"]:
        raise GrowkitError(
            "attention_bias is false, and the axis table holds the biases of GPT-NeoX: it must be true"
        )
    if values["hidden_act"] != "gelu":
        raise GrowkitError(
            f"hidden_act is {values['hidden_act']!r}, and growkit computes 'gelu' only; "
            "set it to 'gelu' if training is to go on with that"
        )
    # transformers 5 lets the older field rope_scaling replace rope_parameters.
    for field in ("rope_scaling", "rope_parameters"):
        rope = values.get(field)
        kind = (
            rope.get("rope_type", rope.get("type", "default"))
            if isinstance(rope, Mapping)
            else rope
        )
        if kind not in (None, "default"):
            raise GrowkitError(
                f"{field} is {kind!r}, and growkit computes plain rotary positions ('default') only"
            )


def write_config(model: NeoX, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json content for `model`, in fields that transformers 4 and 5 both read.

    Fields of `base` that say nothing about sizes or options are kept as they are.
    """
    rope = {"rope_type": "default"} | dict((base or {}).get("rope_parameters") or {})
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_act": "gelu",
        "bos_token_id": 0,
        "eos_token_id": 0,
        **(base or {}),
        "model_type": "gpt_neox",
        **{field: getattr(model, axis) for axis, field in FIELDS.items()},
        "max_position_embeddings": model.context,
        "rotary_pct": model.rotary_pct,
        "rotary_emb_base": model.rotary_base,
        "rope_parameters": rope
        | {"rope_theta": model.rotary_base, "partial_rotary_factor": model.rotary_pct},
        "use_parallel_residual": model.parallel_residual,
        "tie_word_embeddings": model.tied,
        "layer_norm_eps": model.layer_norm_eps,
        "initializer_range": model.initializer_range,
        "attention_bias": True,
    }
