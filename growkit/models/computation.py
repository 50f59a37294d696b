"""What a family computes, as data: the names of its parts, and the fields that say the rest.

The trainer assembles a model from these facts and the table. The names say which parts there are:
a norm before or after attention, a gate, norms of queries. The table says whether a part has a
bias, which way a matrix lies, and what a norm averages over and adds to its weight. The fields of
config.json give the numbers: windows, caps, factors. The vocabulary is closed: NUMBERS,
ACTIVATIONS and ROTARY are all that there is, and the trainer computes each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
# The kinds of rotary positions.
ROTARY = ("default", "linear", "dynamic", "yarn", "llama3")
# What a number does: keys within `window` positions are read by layers of the kind SLIDING; caps c
# bound by c tanh(x / c); scores are divided by the root of `query_scalar` instead of head_dim's, or
# multiplied by `score_factor`; the others multiply or divide what they are named for.
NUMBERS = (
    "window",
    "score_cap",
    "logit_cap",
    "query_scalar",
    "score_factor",
    "embedding_factor",
    "residual_factor",
    "logit_divisor",
)
FULL = "full_attention"
SLIDING = "sliding_attention"
LAYER_TYPES = "layer_types"
# Fields in which configurations state rotary positions, with transformers' defaults.
ROTARY_FIELDS = {"rope_theta": 10000.0, "rope_parameters": None, "rope_scaling": None}


@dataclass(frozen=True)
class Computation:
    """The parts of a family's models by their names in a parameter tree; "" for one it lacks."""

    embedding: str = "embed_tokens"
    # Learned positions, added to the embedded tokens.
    positions: str = ""
    layers: str = "layers"
    final_norm: str = "norm"
    head: str = "lm_head"
    # Parts of a layer. A norm before a part reads the stream; one after it writes the stream.
    attention: str = "self_attn"
    mlp: str = "mlp"
    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    # Parts of attention: one matrix for queries, keys and values, or one for each.
    fused: str = ""
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    query_norm: str = ""
    key_norm: str = ""
    output: str = "o_proj"
    # Parts of the mlp. With a gate, its activation multiplies `up`'s result.
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    # Parts of a mixture's mlp: the experts, each with gate, up and down, and the router, which
    # scores them. How a gate chooses by the scores, the table's section [experts] says.
    experts: str = ""
    router: str = ""
    # A kind of layers in the table -> whether all layers are of it, or none, in a computed model.
    kinds: Mapping[str, bool] = field(default_factory=dict)
    # Whether embedded tokens are multiplied by sqrt(embed), rounded to the model's dtype.
    embedding_root: bool = False
    # Which layers have the window: "" none, "all", or "list" as `layer_types` says.
    windows: str = ""
    # Whether `rope_parameters` holds rotary parameters for each kind of layer.
    rotary_by_kind: bool = False
    # One of NUMBERS -> the field that states it.
    numbers: Mapping[str, str] = field(default_factory=dict)
    # Fields that are neither sizes nor options of the family, with transformers' defaults.
    fields: Mapping[str, Any] = field(default_factory=dict)
    # field -> the field without which it counts as null.
    needs: Mapping[str, str] = field(default_factory=dict)
    # field -> the values of it that are computed.
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def select_kinds(
    computation: Computation,
    config: Mapping[str, Any],
    layers: int,
    by_rule: list[str] | None,
    pattern: tuple[str, ...],
) -> list[str] | None:
    """The kind of each layer; None for a family whose layers are all of one kind.

    by_rule: the kinds by the family's rule, None without one. pattern: kinds that repeat where
    config.json lists none. Raises ValueError for a list of another length.
    """
    if computation.windows != "list":
        return None
    listed = config.get(LAYER_TYPES)
    if listed is not None:
        if len(listed) != layers or not set(listed) <= {FULL, SLIDING}:
            raise ValueError(
                f"{LAYER_TYPES} must name {layers} layers {FULL} or {SLIDING}, got {listed!r}"
            )
        return list(listed)
    if by_rule is not None:
        return by_rule
    return [pattern[layer % len(pattern)] for layer in range(layers)]
