"""Llama: RMSNorm, a gated mlp, query heads in groups that share a key and value head."""

from __future__ import annotations

from growkit.models.computation import Computation
from growkit.models.family import Family
from growkit.models.fields import Same

TABLE = """
# name                                                axes                          begins  role      when
model.embed_tokens.weight                             vocab embed                   normal  embedding
model.layers.{layer}.input_layernorm.weight           embed                         ones    norm
model.layers.{layer}.self_attn.q_proj.weight          (kv group head_dim) /embed    normal  query
model.layers.{layer}.self_attn.q_proj.bias            (kv group head_dim)           zeros   query     attention_bias
model.layers.{layer}.self_attn.k_proj.weight          (kv head_dim) /embed          normal  key
model.layers.{layer}.self_attn.k_proj.bias            (kv head_dim)                 zeros   key       attention_bias
model.layers.{layer}.self_attn.v_proj.weight          (kv head_dim) /embed          normal  value
model.layers.{layer}.self_attn.v_proj.bias            (kv head_dim)                 zeros   value     attention_bias
model.layers.{/layer}.self_attn.o_proj.weight         embed (/kv /group /head_dim)  normal  matrix
model.layers.{/layer}.self_attn.o_proj.bias           embed                         zeros   bias      attention_bias
model.layers.{layer}.post_attention_layernorm.weight  embed                         ones    norm
model.layers.{layer}.mlp.gate_proj.weight             mlp /embed                    normal  matrix
model.layers.{layer}.mlp.gate_proj.bias               mlp                           zeros   bias      mlp_bias
model.layers.{layer}.mlp.up_proj.weight               mlp /embed                    normal  matrix
model.layers.{layer}.mlp.up_proj.bias                 mlp                           zeros   bias      mlp_bias
model.layers.{/layer}.mlp.down_proj.weight            embed /mlp                    normal  matrix
model.layers.{/layer}.mlp.down_proj.bias              embed                         zeros   bias      mlp_bias
model.norm.weight                                     embed                         ones    norm      untied
# A tied head reads embed through the embedding, which writes it: the norm before it takes the
# reader's share.
model.norm.weight                                     /embed                        ones    norm      tied
lm_head.weight                                        vocab /embed                  normal  head      untied
"""  # noqa: E501

FIELDS = {
    "vocab": "vocab_size",
    "layer": "num_hidden_layers",
    "embed": "hidden_size",
    "kv": "num_key_value_heads",
    "group": "num_attention_heads / num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
}
OPTIONS = {
    "context": "max_position_embeddings",
    "tied": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "activation": "hidden_act",
}
# What transformers 4 and 5 take for fields that a config.json of Llama leaves out; its relatives
# have most of them in common.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": Same("num_attention_heads"),
    "head_dim": Same("hidden_size / num_attention_heads"),
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "hidden_act": "silu",
}
ALL_ROTATED = (
    "transformers rotates all of its heads, and growth needs new dimensions that are not rotated; "
    "grow the heads instead"
)

LLAMA = Family(
    kind="llama",
    class_name="LlamaForCausalLM",
    title="Llama",
    text=TABLE,
    prefix="model",
    fields=FIELDS,
    defaults=DEFAULTS | {"attention_bias": False, "mlp_bias": False},
    options=OPTIONS | {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    norm="rms",
    heads="kv",
    frozen={"head_dim": ALL_ROTATED},
    computation=Computation(),
)
