"""A text continued by a model, one token at a time.

Knows sampling over a window of fixed length, so that one program is compiled; every new token runs the whole
window again (no cache of keys and values), which is cheap for a look at a model and slow for serving one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from growkit.checkpoint.tensor import Source
from growkit.errors import UsageError
from trainer.config.sections import LARGEST_SEED, Precision
from trainer.model.decoder import GPTNeoX

ROUND = 64


def generate_tokens(
    source: Source,
    prompt: list[int],
    count: int,
    temperature: float,
    seed: int,
    end_of_text: int | None = None,
) -> Iterator[int]:
    """Yield up to `count` token ids that follow `prompt`; stops before `end_of_text`.

    temperature 0 takes the likeliest token. A prompt longer than the context is cut on the left, and so is the
    text once it outgrows the context. Raises UsageError for an empty prompt, and for a temperature or a seed out
    of range.
    """
    if not prompt:
        raise UsageError("the prompt is empty: give at least one token to continue")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"--temperature must be a number of at least 0, got {temperature}")
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"--seed must lie between 0 and {LARGEST_SEED}, got {seed}")
    model = source.model
    window = min(model.context, -(-(len(prompt) + count) // ROUND) * ROUND)
    params = jax.device_put(source.stack(dtype="float32"))
    network = GPTNeoX(model, Precision("float32", "float32"))

    @jax.jit
    def next_token(params, tokens_T, length, key):
        logits_V = network.apply({"params": params}, tokens_T[None])[0, length - 1]
        drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, logits_V.argmax())

    text = list(prompt)
    for number in range(count):
        last = text[-window:]
        padded = np.zeros(window, np.int32)
        padded[: len(last)] = last
        token = int(
            next_token(params, padded, len(last), jax.random.fold_in(jax.random.key(seed), number))
        )
        if token == end_of_text:
            return
        text.append(token)
        yield token
