"""Continuing a text with a model, one token at a time.

The model always reads a window of the same length, so that one program is compiled. Each new token
runs the whole window again, without a cache of keys and values: cheap for a look at a model, slow
for serving one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from growkit.checkpoint.tensor import Source
from growkit.errors import UsageError
from trainer.config.sections import LARGEST_SEED, Precision
from trainer.model.decoder import GPTNeoX

# Windows are multiples of this many tokens, so that few lengths are compiled.
ROUND = 64


def generate_tokens(
    source: Source,
    prompt: list[int],
    count: int,
    temperature: float,
    seed: int,
    end_of_text: int | None = None,
) -> Iterator[int]:
    """Yield up to `count` token ids that follow `prompt`; stop before `end_of_text`.

    Temperature 0 takes the likeliest token. A text longer than the context is cut on the left.
    Raises UsageError for an empty prompt and for a temperature or a seed out of range.
    """
    _check_request(prompt, temperature, seed)
    window = _select_window(source.model.context, len(prompt) + count)
    params = jax.device_put(source.stack(dtype="float32"))
    network = GPTNeoX(source.model, Precision("float32", "float32"))
    draw_token = _make_sampler(network, temperature)
    text = list(prompt)
    for number in range(count):
        last = text[-window:]
        tokens_T = np.zeros(window, np.int32)
        tokens_T[: len(last)] = last
        key = jax.random.fold_in(jax.random.key(seed), number)
        token = int(draw_token(params, tokens_T, len(last), key))
        if token == end_of_text:
            return
        text.append(token)
        yield token


def _check_request(prompt: list[int], temperature: float, seed: int) -> None:
    if not prompt:
        raise UsageError("the prompt is empty: give at least one token to continue")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"--temperature must be a number of at least 0, got {temperature}")
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"--seed must lie between 0 and {LARGEST_SEED}, got {seed}")


def _select_window(context: int, length: int) -> int:
    """The length rounded up to a multiple of ROUND, at most the context."""
    return min(context, math.ceil(length / ROUND) * ROUND)


def _make_sampler(network: GPTNeoX, temperature: float) -> Callable[..., jax.Array]:
    """The jitted (params, tokens [T], length, key) -> the token after the first `length`."""

    @jax.jit
    def draw_token(
        params: Any, tokens_T: jax.Array, length: jax.Array, key: jax.Array
    ) -> jax.Array:
        logits_BxTxV = network.apply({"params": params}, tokens_T[None])
        logits_V = logits_BxTxV[0, length - 1]
        drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, logits_V.argmax())

    return draw_token
