"""Qwen2 and Qwen2.5:

Llama with biases on queries, keys and values; the upper layers may have a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from growkit.models.computation import Computation
from growkit.models.fields import Same
from growkit.models.llama import DEFAULTS, LLAMA, OPTIONS

TABLE = """
# name                                                axes                          begins  role      when
model.embed_tokens.weight                             vocab embed                   normal  embedding
model.layers.{layer}.input_layernorm.weight           embed                         ones    norm
model.layers.{layer}.self_attn.q_proj.weight          (kv group head_dim) /embed    normal  query
model.layers.{layer}.self_attn.q_proj.bias            (kv group head_dim)           zeros   query
model.layers.{layer}.self_attn.k_proj.weight          (kv head_dim) /embed          normal  key
model.layers.{layer}.self_attn.k_proj.bias            (kv head_dim)                 zeros   key
model.layers.{layer}.self_attn.v_proj.weight          (kv head_dim) /embed          normal  value
model.layers.{layer}.self_attn.v_proj.bias            (kv head_dim)                 zeros   value
model.layers.{/layer}.self_attn.o_proj.weight         embed (/kv /group /head_dim)  normal  matrix
model.layers.{layer}.post_attention_layernorm.weight  embed                         ones    norm
model.layers.{layer}.mlp.gate_proj.weight             mlp /embed                    normal  matrix
model.layers.{layer}.mlp.up_proj.weight               mlp /embed                    normal  matrix
model.layers.{/layer}.mlp.down_proj.weight            embed /mlp                    normal  matrix
model.norm.weight                                     embed                         ones    norm      untied
model.norm.weight                                     /embed                        ones    norm      tied
lm_head.weight                                        vocab /embed                  normal  head      untied
"""  # noqa: E501

COMPUTATION = Computation(
    windows="list",
    numbers={"window": "sliding_window"},
    # With transformers' defaults.
    fields={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    needs={"sliding_window": "use_sliding_window"},
)


def window_kinds(config: Mapping[str, Any]) -> list[str]:
    """The kinds of all layers: from max_window_layers on they have the sliding window, where one is
    used.
    """
    layers = config.get("num_hidden_layers", 32)
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = layers if window is None else config.get("max_window_layers", 28)
    return ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]


QWEN2 = replace(
    LLAMA,
    kind="qwen2",
    class_name="Qwen2ForCausalLM",
    title="Qwen2",
    text=TABLE,
    # Qwen2Config has no head_dim, but the model reads one that is there.
    defaults=DEFAULTS
    | {
        "vocab_size": 151936,
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
    },
    nulls={"num_key_value_heads": Same("num_attention_heads")},
    options=OPTIONS,
    layer_kinds=window_kinds,
    whole_heads=False,
    computation=COMPUTATION,
)
