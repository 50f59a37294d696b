"""Tiny configurations: any model type of transformers at sizes that a CPU builds in milliseconds.

Sizes go by the names that configurations use, `attribute_map` followed. A name that is not listed
keeps the value of the class. Every size is divisible by 2, so that each can be doubled alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growkit.derive.network import CONFIG_MAPPING, make_config, runs

LAYERS = 3
# Large, so that a proof sees what growth must do to it.
EPS = 1e-2
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 48,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "shared_intermediate_size": 28,
    "moe_shared_expert_intermediate_size": 28,
    "expert_ffn_hidden_size": 20,
    "intermediate_size_mlp": 28,
    "dense_intermediate_size": 28,
    "zero_expert_num": 2,
    "router_hidden_size": 12,
    # latent attention
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 4,
    "index_topk": 64,
    # encoders and decoders of other names
    "decoder_ffn_dim": 24,
    "encoder_ffn_dim": 24,
    "decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_layers": LAYERS,
    "num_encoder_layers": LAYERS,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "ffn_dim": 24,
    "n_inner": 24,
    "n_ctx": 48,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "input_embedding_size": 32,
    "output_embedding_size": 32,
    "rotary_dim": 4,
    "dim_ff": 24,
    "dim_head": 8,
    "dff": 24,
    "ffn_hidden_size": 24,
    "kv_channels": 8,
    "attention_head_size": 8,
    "attention_hidden_size": 32,
    "attention_head_dim": 16,
    "num_kv_heads": 2,
    # recurrent mixers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_headdim": 8,
    "mamba_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_dt_rank": 4,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "n_mamba_heads": 2,
    "state_size": 8,
    "ssm_state_size": 8,
    "time_step_rank": 4,
    "lru_width": 32,
    "num_heads": 4,
    "embedding_dim": 32,
    "num_blocks": LAYERS,
    "adapter_rank": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "swa_v_head_dim": 8,
    "sliding_window": 6,
    "sliding_window_size": 6,
    "attention_window_size": 6,
    "attention_chunk_size": 8,
    "pad_token_id": None,
    "pad_idx": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": None,
}


# Where the values above contradict each other for one type.
SPECIAL: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    # Kinds of layers that the class's own values do not have.
    "bamba": {"attn_layer_indices": [1]},
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "llama4_text": {"moe_layers": [0, 2]},
    "mellum": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_text": {
        "vocab_size_per_layer_input": 40,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    },
    "gemma3n_text": {
        "vocab_size_per_layer_input": 40,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        "activation_sparsity_pattern": [0.0, 0.0, 0.0],
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 6},
}
NAMES = (
    "model_type",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "is_decoder",
)
BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
SAME_HEADS = {"num_key_value_heads": 4}


def options_of(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a config.json states: what is neither a size nor a name nor a list."""
    stated = CONFIG_MAPPING[kind]().to_dict()
    return {
        name: value
        for name, value in config.items()
        if name in stated
        and (
            isinstance(value, (bool, str))
            or name.endswith(("_scale", "_multiplier", "_softcapping"))
        )
        and name not in NAMES
    }


def tiny_fields(kind: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The keyword arguments of a tiny configuration whose model computes: with grouped heads where
    it can.

    options: what else its configuration states.
    """
    fields = shrink(kind) | dict(options or {})
    tries = [fields]
    if "num_key_value_heads" in fields:
        tries.append(fields | SAME_HEADS)
    if "head_dim" in fields:
        tries += [{k: v for k, v in each.items() if k != "head_dim"} for each in list(tries)]
    lists = [name for name in BY_LAYER if name in fields]
    if lists:
        tries += [{k: v for k, v in each.items() if k not in lists} for each in list(tries)]
    problems = []
    for given in tries:
        problem = try_fields(kind, given)
        if problem is None:
            return given
        problems.append(problem)
    raise problems[0]


def try_fields(kind: str, fields: dict[str, Any]) -> Exception | None:
    """None where a model with these fields computes, else why not."""
    try:
        config = make_config(kind, fields)
    except Exception as problem:
        return problem
    return runs(config)


def shrink(kind: str) -> dict[str, Any]:
    """The keyword arguments that make a tiny configuration of a type."""
    config_class = CONFIG_MAPPING[kind]
    given = config_class().to_dict()
    aliases = dict(getattr(config_class, "attribute_map", {}))
    names = {aliases.get(name, name): value for name, value in SIZES.items() if name in aliases}
    names |= {name: value for name, value in SIZES.items() if name in given}
    for name, token in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        if isinstance(given.get(name), int):
            names[name] = token
    for name in BY_LAYER:
        kinds = given.get(name)
        if isinstance(kinds, list) and len(set(map(str, kinds))) > 1:
            names[name] = cover(kinds)
    for name in given:
        if name.endswith(("_eps", "_epsilon")) and isinstance(given[name], float):
            names[name] = EPS
    if isinstance(given.get("is_decoder"), bool):
        names["is_decoder"] = True
    return names | SPECIAL.get(kind, {})


def cover(kinds: list[str]) -> list[str]:
    """A short list of kinds of layers with every kind in it, in the order of their first use."""
    different = list(dict.fromkeys(kinds))
    return (different * LAYERS)[: max(LAYERS, len(different))]
