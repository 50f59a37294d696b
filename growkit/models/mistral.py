"""Mistral: Llama without biases, every layer with the same sliding window."""

from __future__ import annotations

from dataclasses import replace

from growkit.models.computation import Computation
from growkit.models.fields import Same
from growkit.models.llama import DEFAULTS, LLAMA, OPTIONS

TABLE = """
# name                                                axes                          begins  role      when
model.embed_tokens.weight                             vocab embed                   normal  embedding
model.layers.{layer}.input_layernorm.weight           embed                         ones    norm
model.layers.{layer}.self_attn.q_proj.weight          (kv group head_dim) /embed    normal  query
model.layers.{layer}.self_attn.k_proj.weight          (kv head_dim) /embed          normal  key
model.layers.{layer}.self_attn.v_proj.weight          (kv head_dim) /embed          normal  value
model.layers.{/layer}.self_attn.o_proj.weight         embed (/kv /group /head_dim)  normal  matrix
model.layers.{layer}.post_attention_layernorm.weight  embed                         ones    norm
model.layers.{layer}.mlp.gate_proj.weight             mlp /embed                    normal  matrix
model.layers.{layer}.mlp.up_proj.weight               mlp /embed                    normal  matrix
model.layers.{/layer}.mlp.down_proj.weight            embed /mlp                    normal  matrix
model.norm.weight                                     embed                         ones    norm      untied
model.norm.weight                                     /embed                        ones    norm      tied
lm_head.weight                                        vocab /embed                  normal  head      untied
"""  # noqa: E501

MISTRAL = replace(
    LLAMA,
    kind="mistral",
    class_name="MistralForCausalLM",
    title="Mistral",
    text=TABLE,
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
    },
    nulls={"num_key_value_heads": Same("num_attention_heads")},
    options=OPTIONS,
    whole_heads=False,
    computation=Computation(
        windows="all", numbers={"window": "sliding_window"}, fields={"sliding_window": 4096}
    ),
)
