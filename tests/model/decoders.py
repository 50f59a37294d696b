"""Small models of the families that the trainer trains, made by transformers and computed by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TIME = 17
# Models this small compile longer than they run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
SLIDES = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
GEMMA = {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 32,
}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0} | parameters}


LINEAR = rope("linear", factor=3.0)
DYNAMIC = rope("dynamic", factor=3.0)
LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LINEAR_PART = rope("linear", factor=3.0, partial_rotary_factor=0.5)
YARN_PART = rope("yarn", factor=4.0, original_max_position_embeddings=8, partial_rotary_factor=0.5)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=8)

# What is built, by name: a type and the fields of its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox-linear": ("gpt_neox", LINEAR_PART),
    "gpt_neox-yarn-unbiased": (
        "gpt_neox",
        YARN_PART | {"attention_bias": False, "hidden_act": "gelu_new"},
    ),
    "llama": ("llama", {}),
    "llama-tied-biased": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-wide-heads": ("llama", {"head_dim": 12, "num_key_value_heads": 4}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": ("llama", LINEAR),
    "llama-dynamic": ("llama", DYNAMIC),
    "llama-longer-than-dynamic": ("llama", DYNAMIC | {"max_position_embeddings": 8}),
    "llama-llama3": ("llama", LLAMA3),
    "llama-yarn": ("llama", YARN),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral-longer-window": ("mistral", {"sliding_window": 64}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", SLIDES),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-window": (
        "qwen3",
        SLIDES | {"layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 8},
    ),
    "olmo2": ("olmo2", {}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-uncapped": (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | {"layer_types": ["sliding_attention", "full_attention"] * 2}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ),
    "gemma3-untied": ("gemma3_text", GEMMA | {"tie_word_embeddings": False}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral-window": ("mixtral", {"num_local_experts": 4, "sliding_window": 5}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True, "head_dim": 16}),
    "qwen3_moe-plain-window": (
        "qwen3_moe",
        EXPERTS | {"use_sliding_window": True, "sliding_window": 5, "attention_bias": True},
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", GPT2 | {"tie_word_embeddings": False, "activation_function": "relu"}),
}
# Models of the tests that are not slow, one of each family.
DEFAULT = (
    "llama",
    "mistral",
    "qwen2-window",
    "qwen3",
    "olmo2",
    "gemma2",
    "gemma3",
    "granite",
    "mixtral",
    "qwen3_moe",
    "gpt2",
)


def save_model(path: Path, kind: str, fields: dict[str, Any], dtype: str = "float32") -> Path:
    """A directory of transformers' own class; all parameters are random, norms too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {} if kind == "gpt2" else SIZES
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(sizes | fields))
    network = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(6.0)
    network.to(getattr(torch, dtype)).save_pretrained(path)
    # Some configurations come back from the disk without null fields, others need them.
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"bos_token_id": 0, "eos_token_id": 0}))
    return path


def compute_theirs(path: Path, tokens: np.ndarray, dtype: str) -> np.ndarray:
    """transformers' logits of a directory; in float64 everything is as wide, norms and rotary
    positions too.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from contextlib import nullcontext

    from growkit.derive.network import wide

    config = json.loads((path / "config.json").read_text())
    plain = {"experts_implementation": "eager"} if "num_experts_per_tok" in config else {}
    with wide() if dtype == "float64" else nullcontext(), torch.no_grad():
        network, report = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            output_loading_info=True,
            **plain,
        )
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        ids = torch.from_numpy(np.asarray(tokens, np.int64))
        return np.asarray(network.eval()(ids).logits)
