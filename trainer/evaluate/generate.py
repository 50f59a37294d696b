"""Continuing a text with a model, one token at a time.

The model always reads a window of the same length, so that one program is compiled. Each new token
runs the whole window again, without a cache of keys and values: cheap for a look at a model, slow
for serving one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from growkit.checkpoint.tensor import Source
from growkit.errors import GrowkitError, UsageError
from growkit.models import require_trained
from trainer.config.sections import LARGEST_SEED, Precision
from trainer.data.panics import explain_panics
from trainer.data.special import read_beside
from trainer.data.tokenizer import parse_tokenizer
from trainer.model.decoder import Decoder

# Windows are multiples of this many tokens, so that few lengths are compiled.
ROUND = 64


def generate_tokens(
    source: Source,
    prompt: list[int],
    count: int,
    temperature: float,
    seed: int,
    ends: Collection[int] = (),
) -> Iterator[int]:
    """Yield up to `count` token ids that follow `prompt`; stop before one of `ends`.

    Temperature 0 takes the likeliest token. A text longer than the context is cut on the left.
    Raises UsageError for an empty prompt and for a temperature or a seed out of range.
    """
    _check_request(prompt, temperature, seed)
    window = _select_window(source.model.context, len(prompt) + count)
    params = jax.device_put(source.stack(dtype="float32"))
    network = Decoder(source.model, Precision("float32", "float32"))
    draw_token = _make_sampler(network, temperature)
    text = list(prompt)
    for number in range(count):
        last = text[-window:]
        tokens_T = np.zeros(window, np.int32)
        tokens_T[: len(last)] = last
        key = jax.random.fold_in(jax.random.key(seed), number)
        token = int(draw_token(params, tokens_T, len(last), key))
        if token in ends:
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


def _make_sampler(network: Decoder, temperature: float) -> Callable[..., jax.Array]:
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


def continue_prompt(source: Source, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and up to `tokens` tokens that follow it, as text.

    Raises UsageError for a model that the trainer does not compute, no tokens, and ids beyond the
    model's vocabulary, GrowkitError where the model carries no tokenizer that can be read.
    """
    require_trained(source.model, str(source.path))
    if tokens < 1:
        raise UsageError(f"--tokens must be at least 1, got {tokens}")
    tokenizer = _read_tokenizer(source)
    with explain_panics("encoding the prompt"):
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if ids and max(ids) >= source.model.vocab:
        raise UsageError(
            f"the prompt has the token {tokenizer.id_to_token(max(ids))!r} with the id "
            f"{max(ids)}, and the model's vocabulary ends at {source.model.vocab - 1}"
        )
    ends = _list_ends(source, tokenizer)
    added = generate_tokens(source, ids, tokens, temperature, seed, ends)
    continuation: str = tokenizer.decode(list(added), skip_special_tokens=False)
    return prompt + continuation


def _list_ends(source: Source, tokenizer: Tokenizer) -> set[int]:
    """The ids that end a text: those of the configuration, and the tokenizer's own."""
    stated = source.config.get("eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    ends = {number for number in listed if isinstance(number, int)}
    beside = read_beside(source.files, str(source.path))
    own = tokenizer.token_to_id(beside.stated[0]) if beside.stated else None
    return ends if own is None else ends | {own}


def _read_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer beside a model, whether it names an end of text or not."""
    if "tokenizer.json" not in source.files:
        raise GrowkitError(
            f"{source.path} carries no tokenizer.json, so text cannot be made into tokens; put one "
            f"beside it"
        )
    name = f"the tokenizer.json of {source.path}"
    return parse_tokenizer(source.files["tokenizer.json"], name)
