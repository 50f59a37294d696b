"""Qwen3: Llama with norms over each head's queries and keys; the upper layers may have a window."""

from __future__ import annotations

from growkit.models.computation import Computation
from growkit.models.family import Family
from growkit.models.fields import Same
from growkit.models.llama import FIELDS, OPTIONS
from growkit.models.qwen2 import WINDOW_FIELDS, window_kinds

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

QWEN3 = Family(
    kind="qwen3",
    class_name="Qwen3ForCausalLM",
    title="Qwen3",
    text=TABLE,
    prefix="model",
    fields=FIELDS,
    # Qwen3Config, transformers 4 and 5.
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "attention_bias": False,
    },
    nulls={"num_key_value_heads": Same("num_attention_heads")},
    options=OPTIONS | {"attention_bias": "attention_bias"},
    norm="rms",
    heads="kv",
    frozen={"head_dim": "norms of queries and keys average over it; grow the heads instead"},
    layer_kinds=window_kinds,
    whole_heads=False,
    computation=Computation(
        query_norm="q_norm",
        key_norm="k_norm",
        windows="list",
        numbers={"window": "sliding_window"},
        fields=WINDOW_FIELDS,
        needs={"sliding_window": "use_sliding_window"},
    ),
)
