"""Qwen3: Qwen2 with norms over each head's queries and keys, and biases as an option."""

from __future__ import annotations

from dataclasses import replace

from growkit.models.llama import OPTIONS
from growkit.models.qwen2 import COMPUTATION, QWEN2

TABLE = """
# name                                                axes                          begins  role            when
model.embed_tokens.weight                             vocab embed                   normal  embedding
model.layers.{layer}.input_layernorm.weight           embed                         ones    norm
model.layers.{layer}.self_attn.q_proj.weight          (kv group head_dim) /embed    normal  query
model.layers.{layer}.self_attn.q_proj.bias            (kv group head_dim)           zeros   query           attention_bias
model.layers.{layer}.self_attn.q_norm.weight          head_dim                      ones    norm
model.layers.{layer}.self_attn.k_proj.weight          (kv head_dim) /embed          normal  key
model.layers.{layer}.self_attn.k_proj.bias            (kv head_dim)                 zeros   key             attention_bias
model.layers.{layer}.self_attn.k_norm.weight          head_dim                      ones    norm
model.layers.{layer}.self_attn.v_proj.weight          (kv head_dim) /embed          normal  value
model.layers.{layer}.self_attn.v_proj.bias            (kv head_dim)                 zeros   value           attention_bias
model.layers.{/layer}.self_attn.o_proj.weight         embed (/kv /group /head_dim)  normal  matrix
model.layers.{/layer}.self_attn.o_proj.bias           embed                         zeros   bias            attention_bias
model.layers.{layer}.post_attention_layernorm.weight  embed                         ones    norm
model.layers.{layer}.mlp.gate_proj.weight             mlp /embed                    normal  matrix
model.layers.{layer}.mlp.up_proj.weight               mlp /embed                    normal  matrix
model.layers.{/layer}.mlp.down_proj.weight            embed /mlp                    normal  matrix
model.norm.weight                                     embed                         ones    norm            untied
model.norm.weight                                     /embed                        ones    norm            tied
lm_head.weight                                        vocab /embed                  normal  head            untied
"""  # noqa: E501

QWEN3 = replace(
    QWEN2,
    kind="qwen3",
    class_name="Qwen3ForCausalLM",
    title="Qwen3",
    text=TABLE,
    defaults={**QWEN2.defaults, "head_dim": 128, "attention_bias": False},
    options=OPTIONS | {"attention_bias": "attention_bias"},
    frozen={"head_dim": "norms of queries and keys average over it; grow the heads instead"},
    computation=replace(COMPUTATION, query_norm="q_norm", key_norm="k_norm"),
)
