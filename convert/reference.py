"""transformers' own forward pass, as a function from tokens to logits, to compare ours with.

The only file here that imports torch and transformers, when it is asked to.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from growkit.errors import GrowkitError


def require_transformers() -> None:
    """Raise GrowkitError, before any work is done, where torch or transformers is not installed."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise GrowkitError(f"{name} is not installed; pip install 'growkit[hf]' brings it")


def load_network(path: Path, dtype: str | None = None) -> Any:
    """The causal language model of a directory, in `dtype` (default: its own).

    Raises ImportError without torch and transformers, GrowkitError when transformers would fill in a tensor.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    network, report = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        torch_dtype=getattr(torch, dtype) if dtype else "auto",
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    # A missing tensor would be random, with no more than a printed report.
    tied = {"lm_head.weight", "embed_out.weight"} if network.config.tie_word_embeddings else set()
    missing = sorted(set(report["missing_keys"]) - tied)
    if missing or report["unexpected_keys"]:
        raise GrowkitError(
            f"transformers finds {path} incomplete: missing {missing}, unexpected {report['unexpected_keys']}"
        )
    return network.eval()


def load_logits(path: Path, dtype: str | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """The logits [B, T, V] of a Hugging Face directory for tokens [B, T]. Raises GrowkitError without transformers."""
    require_transformers()
    import torch

    network = load_network(path, dtype)

    def logits(tokens_BxT: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return (
                network(torch.from_numpy(np.asarray(tokens_BxT, np.int64))).logits.double().numpy()
            )

    return logits


def generate_text(path: Path, prompt: str, tokens: int) -> str:
    """The prompt and up to `tokens` more, likeliest first, by transformers' own generate. Raises ImportError."""
    network = load_network(path)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(prompt, return_tensors="pt")
    found = network.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0, repetition_penalty=1.3
    )
    return tokenizer.decode(found[0])
