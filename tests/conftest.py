"""Small GPT-NeoX models on disk, made by transformers, and the models and trees that tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from growkit.neox import NeoX

SMALL = NeoX(layer=3, embed=32, head=4, mlp=64, vocab=96, context=32, rotary_pct=0.25, tied=False)


def save_transformers_model(path: Path, model: NeoX, dtype: str = "float32", seed: int = 0) -> Path:
    """A directory saved by transformers' own class, every parameter random (norms and biases too)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPTNeoXConfig(
        vocab_size=model.vocab,
        hidden_size=model.embed,
        num_hidden_layers=model.layer,
        num_attention_heads=model.head,
        intermediate_size=model.mlp,
        max_position_embeddings=model.context,
        rotary_pct=model.rotary_pct,
        use_parallel_residual=model.parallel_residual,
        tie_word_embeddings=model.tied,
        layer_norm_eps=model.layer_norm_eps,
    )
    network = transformers.GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.3) if parameter.ndim == 1 else parameter.mul_(4.0)
        for name, parameter in network.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    network.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def transformers_logits(path: Path, tokens: np.ndarray, dtype: str = "float32"):
    """(logits, rotary tables [T, R/2]) of a directory, as transformers computes them with sdpa attention."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    network, report = transformers.GPTNeoXForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    ids = torch.from_numpy(np.asarray(tokens, np.int64))
    with torch.no_grad():
        rotary = network.gpt_neox.rotary_emb(torch.zeros(1), torch.arange(ids.shape[1])[None])
        logits = network.eval()(ids).logits
    half = rotary[0].shape[-1] // 2
    return logits.numpy(), tuple(table[0, :, :half].numpy() for table in rotary)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, SMALL.vocab, (2, 17))
