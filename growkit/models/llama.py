"""Llama: the axis table, and the sizes and options that a Hugging Face config.json states.

RMSNorm, a gated mlp, query heads in groups that share a key and value head, no biases. Growth works on it by
the table alone; the trainer computes GPT-NeoX only. Knows the architecture's facts; leaves arithmetic on arrays
and files to others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

from growkit.errors import GrowkitError, UsageError
from growkit.models.architecture import Architecture, check_sizes, whole
from growkit.models.notation import Table, parse_table

TABLE = """
# name                                                   axes                             begins   only when
model.embed_tokens.weight                                vocab embed                      normal
model.layers.{layer}.input_layernorm.weight              embed                            ones
model.layers.{layer}.self_attn.q_proj.weight             (kv group head_dim) /embed       normal
model.layers.{layer}.self_attn.k_proj.weight             (kv head_dim) /embed             normal
model.layers.{layer}.self_attn.v_proj.weight             (kv head_dim) /embed             normal
model.layers.{/layer}.self_attn.o_proj.weight            embed (/kv /group /head_dim)     normal
model.layers.{layer}.post_attention_layernorm.weight     embed                            ones
model.layers.{layer}.mlp.gate_proj.weight                mlp /embed                       normal
model.layers.{layer}.mlp.up_proj.weight                  mlp /embed                       normal
model.layers.{/layer}.mlp.down_proj.weight               embed /mlp                       normal
model.norm.weight                                        embed                            ones     untied
# A tied head reads embed through the embedding, which writes it: the norm before it takes the reader's share.
model.norm.weight                                        /embed                           ones     tied
lm_head.weight                                           vocab /embed                     normal   untied
"""

FIELDS = {
    "vocab": "vocab_size",
    "layer": "num_hidden_layers",
    "embed": "hidden_size",
    "kv": "num_key_value_heads",
    "group": "num_attention_heads / num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
}

# What transformers takes for a field that config.json leaves out (LlamaConfig, versions 4 and 5).
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
PLAIN_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Llama(Architecture):
    """A Llama model's sizes and options.

    kv is the number of key and value heads, group how many query heads share one. rope holds rope_type,
    rope_theta and what a scaled type adds: growth keeps head_dim and context, and with them every type as it is.
    rms_norm_eps has no unit; context is in tokens.
    """

    fields: ClassVar[Mapping[str, str]] = FIELDS
    kind: ClassVar[str] = "llama"
    norm: ClassVar[str] = "rms"
    heads: ClassVar[str] = "kv"
    head_name: ClassVar[str] = "lm_head.weight"
    buffers: ClassVar[tuple[str, ...]] = (".rotary_emb.inv_freq",)

    layer: int
    embed: int
    kv: int
    group: int
    head_dim: int
    mlp: int
    vocab: int = 32000
    context: int = 2048
    rope: Mapping[str, Any] = field(default_factory=lambda: dict(PLAIN_ROTARY))
    hidden_act: str = "silu"
    tied: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self):
        check_sizes(self)
        if self.head_dim % 2:
            raise GrowkitError(
                f"head_dim must be even, because rotary positions rotate pairs; got {self.head_dim}"
            )

    @property
    def rotary(self) -> int:
        """All of a head: Llama rotates every dimension."""
        return self.head_dim

    @property
    def coupled(self) -> bool:
        """No: head_dim is a configuration field of its own, so that embed and the heads change one by one."""
        return False

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis of the table."""
        return {axis: getattr(self, axis) for axis in FIELDS}

    @property
    def table(self) -> Table:
        return table(self.tied)

    @property
    def norm_eps(self) -> float:
        return self.rms_norm_eps

    def resized(self, sizes: Mapping[str, int], norm_eps: float | None = None) -> Llama:
        """This model at other sizes. Raises UsageError for those at which transformers would compute no such model."""
        axes = {axis: sizes[axis] for axis in FIELDS}
        if axes["head_dim"] != self.head_dim:
            raise UsageError(
                f"head_dim of a Llama model stays {self.head_dim}: transformers rotates all of its heads, and growth "
                f"needs new dimensions that are not rotated; grow the heads instead"
            )
        grown = replace(self, **axes, rms_norm_eps=norm_eps or self.rms_norm_eps)
        # A source that breaks this rule of transformers 5 may grow in depth all the same.
        if grown.embed % grown.head_count and not self.embed % self.head_count:
            low = grown.embed - grown.embed % grown.head_count
            near = [size for size in (low, low + grown.head_count) if size > self.embed]
            raise UsageError(
                f"hidden_size must be a multiple of num_attention_heads, got {grown.embed} and {grown.head_count}; "
                f"with {grown.head_count} heads the nearest for embed: {' and '.join(map(str, near))}"
            )
        return grown

    def written(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return write_config(self, base)


@lru_cache
def table(tied: bool) -> Table:
    """The rows that hold for a tied or an untied head."""
    other = "untied" if tied else "tied"
    return Table(tuple(row for row in parse_table(TABLE) if row.condition != other))


def read_config(config: Mapping[str, Any]) -> Llama:
    """The sizes and options in the content of a config.json, as transformers 4 or 5 wrote it.

    Raises GrowkitError for biases, which the table does not hold, and for values that contradict each other.
    """
    values = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    for option in ("attention_bias", "mlp_bias"):
        if values[option]:
            raise GrowkitError(
                f"{option} is true, and the axis table of Llama holds no biases: it must be false"
            )
    try:
        return Llama(
            **_heads(values),
            **{axis: whole(values, FIELDS[axis]) for axis in ("vocab", "layer", "embed", "mlp")},
            context=whole(values, "max_position_embeddings"),
            rope=_rope(values),
            hidden_act=str(values["hidden_act"]),
            tied=bool(values["tie_word_embeddings"]),
            rms_norm_eps=float(values["rms_norm_eps"]),
            initializer_range=float(values["initializer_range"]),
        )
    except (AttributeError, TypeError, ValueError) as problem:
        raise GrowkitError(f"config.json holds a value of the wrong kind: {problem}") from None


def _heads(values: Mapping[str, Any]) -> dict[str, int]:
    """kv, group and head_dim; the fields for the first and last may be absent."""
    heads, embed = whole(values, "num_attention_heads"), whole(values, "hidden_size")
    kv = whole(values, "num_key_value_heads") if "num_key_value_heads" in values else heads
    if heads < 1 or kv < 1 or heads % kv:
        raise GrowkitError(
            f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv}"
        )
    if "head_dim" not in values and embed % heads:
        raise GrowkitError(
            f"hidden_size must be a multiple of num_attention_heads where no head_dim is given, got {embed} and {heads}"
        )
    head_dim = whole(values, "head_dim") if "head_dim" in values else embed // heads
    return {"kv": kv, "group": heads // kv, "head_dim": head_dim}


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters as transformers 5 takes them: rope_scaling of version 4 goes before rope_parameters."""
    stated = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    kind = stated.pop("type", "default")
    return (
        {"rope_type": kind}
        | stated
        | {"rope_theta": float(stated.get("rope_theta", values["rope_theta"]))}
    )


def write_config(model: Llama, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json content for `model`, in fields that transformers 4 and 5 both read.

    Fields of `base` that say nothing about sizes or options are kept as they are.
    """
    scaling = {key: value for key, value in model.rope.items() if key != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLM"],
        **(base or {}),
        "model_type": "llama",
        **{
            FIELDS[axis]: getattr(model, axis)
            for axis in ("vocab", "layer", "embed", "kv", "head_dim", "mlp")
        },
        "num_attention_heads": model.head_count,
        "max_position_embeddings": model.context,
        "rope_theta": model.rope["rope_theta"],
        "rope_scaling": None if model.rope["rope_type"] == "default" else scaling,
        "rope_parameters": dict(model.rope),
        "hidden_act": model.hidden_act,
        "tie_word_embeddings": model.tied,
        "rms_norm_eps": model.rms_norm_eps,
        "initializer_range": model.initializer_range,
        "attention_bias": False,
        "mlp_bias": False,
    }
