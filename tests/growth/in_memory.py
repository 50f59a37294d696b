"""Models in memory: what surgery makes of them, and their loss and gradient in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from growkit.checkpoint.tensor import Source, wrap_array
from growkit.models.architecture import Architecture
from growkit.models.gpt_neox import GPT_NEOX
from trainer.config.sections import Precision
from trainer.model.decoder import Decoder

# For models with a vocabulary of at least 40.
TOKENS = np.random.default_rng(1).integers(0, 40, (2, 9))


def held(model: Architecture, **slots: dict[str, np.ndarray]) -> Source:
    """A model in memory, as the source that surgery takes."""
    tensors = {
        slot: {name: wrap_array(array) for name, array in arrays.items()}
        for slot, arrays in slots.items()
    }
    return Source(Path("memory"), "huggingface", model.config(), tensors, [], [], {}, dict)


def made(recipe) -> np.ndarray:
    if recipe.pieces is None:
        return np.zeros(recipe.shape, recipe.dtype)
    ((offset, array),) = recipe.pieces()
    assert offset == 0 and array.shape == recipe.shape and array.dtype == recipe.dtype
    return array


@cache
def loss_and_gradient(model: Architecture):
    network = Decoder(model, Precision("float64", "float64"))

    def loss(params):
        logits = network.apply({"params": params}, TOKENS)
        picked = jnp.take_along_axis(logits[:, :-1], TOKENS[:, 1:, None], -1)
        return (jax.nn.logsumexp(logits[:, :-1], -1) - picked[..., 0]).mean(), logits

    # Models this small compile longer than they run.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)


def break_table(monkeypatch, text: str) -> None:
    """Let every model have the rows of another table of GPT-NeoX, for its own options."""
    family = replace(GPT_NEOX, text=text)
    table = property(lambda self: family.select_rows(self.options))
    monkeypatch.setattr(Architecture, "table", table)
