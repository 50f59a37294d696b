"""GPT-NeoX: LayerNorm, fused queries, keys and values, partial rotary positions, biases."""

from __future__ import annotations

from growkit.models.computation import Computation
from growkit.models.family import BUFFERS, Family
from growkit.models.rotary import RotaryFields

TABLE = """
# name                                                   axes                         begins  role      when
gpt_neox.embed_in.weight                                 vocab embed                  normal  embedding
gpt_neox.layers.{layer}.input_layernorm.weight           embed                        ones    norm
gpt_neox.layers.{layer}.input_layernorm.bias             embed                        zeros   bias
gpt_neox.layers.{layer}.post_attention_layernorm.weight  embed                        ones    norm
gpt_neox.layers.{layer}.post_attention_layernorm.bias    embed                        zeros   bias
gpt_neox.layers.{layer}.attention.query_key_value.weight (head qkv head_dim) /embed   normal  qkv
gpt_neox.layers.{layer}.attention.query_key_value.bias   (head qkv head_dim)          zeros   qkv       attention_bias
gpt_neox.layers.{/layer}.attention.dense.weight          embed (/head /head_dim)      normal  matrix
gpt_neox.layers.{/layer}.attention.dense.bias            embed                        zeros   bias      attention_bias
gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight         mlp /embed                   normal  matrix
gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias           mlp                          zeros   bias
gpt_neox.layers.{/layer}.mlp.dense_4h_to_h.weight        embed /mlp                   normal  matrix
gpt_neox.layers.{/layer}.mlp.dense_4h_to_h.bias          embed                        zeros   bias
gpt_neox.final_layer_norm.weight                         embed                        ones    norm      untied
gpt_neox.final_layer_norm.bias                           embed                        zeros   bias      untied
# A tied head reads embed through the embedding, which writes it: the norm before it takes the
# reader's share.
gpt_neox.final_layer_norm.weight                         /embed                       ones    norm      tied
gpt_neox.final_layer_norm.bias                           /embed                       zeros   bias      tied
embed_out.weight                                         vocab /embed                 normal  head      untied
"""  # noqa: E501

GPT_NEOX = Family(
    kind="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    title="GPT-NeoX",
    text=TABLE,
    prefix="gpt_neox",
    fields={
        "vocab": "vocab_size",
        "layer": "num_hidden_layers",
        "embed": "hidden_size",
        "head": "num_attention_heads",
        "mlp": "intermediate_size",
        "head_dim": "hidden_size / num_attention_heads",
    },
    constants={"qkv": 3},
    # GPTNeoXConfig, transformers 4 and 5.
    defaults={
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
    },
    options={
        "context": "max_position_embeddings",
        "parallel_residual": "use_parallel_residual",
        "tied": "tie_word_embeddings",
        "norm_eps": "layer_norm_eps",
        "initializer_range": "initializer_range",
        "activation": "hidden_act",
        "attention_bias": "attention_bias",
    },
    norm="layer",
    heads="head",
    rotary=RotaryFields(base="rotary_emb_base", part="rotary_pct", scaling=False),
    new={"bos_token_id": 0, "eos_token_id": 0},
    fresh={"vocab": 50304, "context": 1024, "tied": True},
    buffers=(".attention.bias", *BUFFERS),
    computation=Computation(
        embedding="embed_in",
        final_norm="final_layer_norm",
        head="embed_out",
        attention="attention",
        fused="query_key_value",
        output="dense",
        gate="",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
    ),
)
