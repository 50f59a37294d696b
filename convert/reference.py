"""transformers' own forward pass, as a function from tokens to logits, to compare growkit's with.

torch and transformers are imported when a function here is called.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from growkit.errors import GrowkitError

COUNTED_IN = "float32"


def require_transformers() -> None:
    """Raise GrowkitError, before any work is done, if torch or transformers is not installed."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise GrowkitError(f"{name} is not installed; pip install 'growkit[hf]' brings it")


def load_network(path: Path, dtype: str | None = None) -> Any:
    """The causal language model of a directory, on the CPU, in `dtype` (default: its own).

    Raises ImportError without torch and transformers, GrowkitError if transformers would fill in a
    tensor.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {
        "torch_dtype": getattr(torch, dtype) if dtype else "auto",
        "output_loading_info": True,
    }
    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
        loaded: Any = load(path, attn_implementation="sdpa", **options)
    except ValueError as problem:
        # A soft cap of attention's scores, as Gemma 2 has, or ALiBi in some classes.
        if "attn_implementation" not in str(problem):
            raise
        loaded = load(path, attn_implementation="eager", **options)
    network, report = loaded
    # transformers fills a missing tensor with random numbers and only prints a report.
    tied = {"lm_head.weight", "embed_out.weight"} if network.config.tie_word_embeddings else set()
    missing = sorted(set(report["missing_keys"]) - tied)
    unexpected = report["unexpected_keys"]
    if missing or unexpected:
        raise GrowkitError(
            f"transformers finds {path} incomplete: missing {missing}, unexpected {unexpected}"
        )
    return network.to("cpu").eval()


def load_logits(path: Path, dtype: str | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """The function from tokens [B, T] to logits [B, T, V] of a directory, on the CPU.

    Raises GrowkitError without torch or transformers.
    """
    require_transformers()
    import torch

    network = load_network(path, dtype)

    def compute_logits(tokens_BxT: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(np.asarray(tokens_BxT, np.int64))
        with torch.no_grad():
            return network(ids).logits.double().numpy()

    return compute_logits


def count_chosen(path: Path, tokens_BxT: np.ndarray, top: int) -> np.ndarray:
    """int64 [layer with experts, expert]: how many of these tokens go through each expert.

    top: experts a token. Computed on the CPU in float32. Raises GrowkitError without torch or
    transformers, and for a type whose scores of experts transformers does not give.
    """
    require_transformers()
    import torch

    network = load_network(path, COUNTED_IN)
    found: list[np.ndarray] = []
    for row_T in tokens_BxT:
        ids = torch.from_numpy(np.asarray(row_T[None], np.int64))
        with torch.no_grad():
            result = network(ids, output_router_logits=True, use_cache=False)
        scores = getattr(result, "router_logits", None)
        if not scores:
            raise GrowkitError(
                f"transformers does not give the scores of experts of {path}; --choose fisher "
                f"takes a checkpoint's second moments"
            )
        # A softmax over all experts keeps their order.
        chosen = [each.topk(top, dim=-1).indices.flatten() for each in scores]
        counts = [
            torch.bincount(index, minlength=each.shape[-1]).numpy()
            for index, each in zip(chosen, scores, strict=True)
        ]
        found.append(np.stack(counts))
    return np.sum(found, axis=0)


def generate_text(path: Path, prompt: str, tokens: int) -> str:
    """The prompt and up to `tokens` more, likeliest first, by transformers' own generate.

    Raises ImportError without torch and transformers.
    """
    network = load_network(path)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(prompt, return_tensors="pt")
    # The penalty keeps a small model from repeating one word.
    found = network.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0, repetition_penalty=1.3
    )
    return str(tokenizer.decode(found[0]))
