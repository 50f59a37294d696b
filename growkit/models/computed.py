"""How the families of derived tables are computed, for those that the trainer trains.

`growkit derive` finds how a family grows; what it computes is stated here by hand.
"""

from __future__ import annotations

from growkit.models.computation import ROTARY_FIELDS, Computation

GEMMA_FIELDS = {
    **ROTARY_FIELDS,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "use_bidirectional_attention": None,
}
GEMMA_NUMBERS = {
    "window": "sliding_window",
    "query_scalar": "query_pre_attn_scalar",
    "score_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
}

COMPUTED = {
    "mixtral": Computation(
        mlp="block_sparse_moe",
        experts="experts",
        router="gate",
        gate="w1",
        up="w3",
        down="w2",
        windows="all",
        numbers={"window": "sliding_window"},
        fields={**ROTARY_FIELDS, "rope_theta": 1_000_000.0, "sliding_window": None},
    ),
    "qwen3_moe": Computation(
        experts="experts",
        router="gate",
        # The table's kinds: layers with experts, and layers with one mlp.
        kinds={"some1": True, "some2": False},
        query_norm="q_norm",
        key_norm="k_norm",
        windows="all",
        numbers={"window": "sliding_window"},
        fields={
            **ROTARY_FIELDS,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
        },
        needs={"sliding_window": "use_sliding_window"},
        only={"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
    ),
    "olmoe": Computation(
        experts="experts",
        router="gate",
        query_norm="q_norm",
        key_norm="k_norm",
        fields={**ROTARY_FIELDS, "clip_qkv": None},
        only={"clip_qkv": (None,)},
    ),
    "olmo2": Computation(
        before_attention="",
        after_attention="post_attention_layernorm",
        before_mlp="",
        after_mlp="post_feedforward_layernorm",
        query_norm="q_norm",
        key_norm="k_norm",
        fields=ROTARY_FIELDS,
    ),
    "gemma2": Computation(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        embedding_root=True,
        windows="list",
        numbers=GEMMA_NUMBERS,
        fields={
            **GEMMA_FIELDS,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        only={"use_bidirectional_attention": (None, False)},
    ),
    "gemma3_text": Computation(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        query_norm="q_norm",
        key_norm="k_norm",
        embedding_root=True,
        windows="list",
        rotary_by_kind=True,
        numbers=GEMMA_NUMBERS,
        fields={
            **GEMMA_FIELDS,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        only={"use_bidirectional_attention": (None, False)},
    ),
    "granite": Computation(
        numbers={
            "embedding_factor": "embedding_multiplier",
            "residual_factor": "residual_multiplier",
            "score_factor": "attention_multiplier",
            "logit_divisor": "logits_scaling",
        },
        fields={
            **ROTARY_FIELDS,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "gpt2": Computation(
        embedding="wte",
        positions="wpe",
        layers="h",
        final_norm="ln_f",
        attention="attn",
        before_attention="ln_1",
        before_mlp="ln_2",
        fused="c_attn",
        output="c_proj",
        gate="",
        up="c_fc",
        down="c_proj",
        fields={"scale_attn_weights": True},
        only={"scale_attn_weights": (True,)},
    ),
}
