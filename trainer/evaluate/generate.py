"""Continuing a text with a model, one token at a time.

Keys and values of past positions are kept. The prompt is read in one pass; then a jitted loop reads
one token and draws the next. Prompts and caches are padded to a few lengths, so that few programs
are compiled. A text longer than the context is cut on the left. That changes the position of every
token, so from there on each token costs a pass over the whole context.

Shapes in names: L layer, B batch, K key and value head, S positions kept, D head_dim, P prompt.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from growkit.checkpoint.tensor import Source
from growkit.errors import UsageError
from growkit.models import require_trained
from growkit.models.architecture import Architecture
from trainer.config.sections import LARGEST_SEED, Precision
from trainer.data.panics import explain_panics
from trainer.data.tokenizer import find_own_end, parse_model_tokenizer
from trainer.model.attention import Past
from trainer.model.block import KEPT
from trainer.model.decoder import Decoder

# The shortest length of prompts and caches; longer ones are this times a power of two.
SHORTEST = 64
# The most tokens drawn by one call of the jitted loop; those after the end of a text are in vain.
CHUNK = 32


class State(NamedTuple):
    """A text that is being continued.

    text: its tokens [S + 1], zeros after the known ones. keys, values: [L, B, K, S, D].
    """

    text: jax.Array
    keys: jax.Array
    values: jax.Array


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
    params = jax.device_put(source.stack(dtype="float32"))
    for token in Generator(source.model, temperature).draw(params, prompt, count, seed):
        if token in ends:
            return
        yield token


class Generator:
    """The compiled programs that continue texts with a model at one temperature."""

    def __init__(self, model: Architecture, temperature: float) -> None:
        self.context = model.context
        self.temperature = temperature
        self.network = Decoder(model, Precision("float32", "float32"))
        self._read = jax.jit(self._read_prompt, static_argnames="size")
        self._extend = jax.jit(self._extend_text, donate_argnames="state")

    def draw(self, params: Any, prompt: list[int], count: int, seed: int) -> Iterator[int]:
        """Yield `count` tokens that follow `prompt`. params: the parameter tree, on the device."""
        key = jax.random.key(seed)
        text, state, number = list(prompt), None, 0
        size = select_length(len(prompt) + count, self.context)
        while number < count:
            if state is None or len(text) > self.context:
                text = text[-self.context :]
                state = self._read(params, self._pad(text), size=size)
            known = len(text)
            steps = min(CHUNK, count - number, size + 1 - known)
            state = self._extend(params, state, known, known + steps, key, number)
            drawn = np.asarray(state.text)[known : known + steps].tolist()
            yield from drawn
            text += drawn
            number += steps

    def _pad(self, text: list[int]) -> np.ndarray:
        tokens_P = np.zeros(select_length(len(text), self.context), np.int32)
        tokens_P[: len(text)] = text
        return tokens_P

    def _read_prompt(self, params: Any, tokens_P: jax.Array, size: int) -> State:
        """Read a padded prompt in one pass. What the padding leaves in the cache is never read."""
        _, kept = self.network.apply({"params": params}, tokens_P[None], head=False, mutable=[KEPT])
        more = size - len(tokens_P)
        widths = [(0, 0)] * 3 + [(0, more), (0, 0)]
        keys, values = (jnp.pad(each, widths) for each in self.network.find_kept(kept))
        return State(jnp.pad(tokens_P, (0, more + 1)), keys, values)

    def _extend_text(
        self,
        params: Any,
        state: State,
        known: jax.Array,
        end: jax.Array,
        key: jax.Array,
        number: jax.Array,
    ) -> State:
        """Draw the tokens at the places from `known` up to `end`, `number` being drawn already."""

        def draw_next(place: jax.Array, state: State) -> State:
            position = place - 1
            past = Past(state.keys, state.values, position)
            tokens_BxT = state.text[position][None, None]
            logits_BxTxV, kept = self.network.apply(
                {"params": params}, tokens_BxT, past=past, mutable=[KEPT]
            )
            token = self._draw_token(
                logits_BxTxV[0, 0], jax.random.fold_in(key, number + place - known)
            )
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new, position, 3)
                for old, new in zip(past[:2], self.network.find_kept(kept), strict=True)
            )
            return State(state.text.at[place].set(token), keys, values)

        return jax.lax.fori_loop(known, end, draw_next, state)

    def _draw_token(self, logits_V: jax.Array, key: jax.Array) -> jax.Array:
        if self.temperature == 0:
            return logits_V.argmax().astype(jnp.int32)
        drawn = jax.random.categorical(key, logits_V / max(self.temperature, 1e-6))
        return drawn.astype(jnp.int32)


def select_length(length: int, context: int) -> int:
    """The length rounded up to SHORTEST times a power of two, at most the context."""
    rounded = SHORTEST
    while rounded < length:
        rounded *= 2
    return min(rounded, context)


def _check_request(prompt: list[int], temperature: float, seed: int) -> None:
    if not prompt:
        raise UsageError("the prompt is empty: give at least one token to continue")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"--temperature must be a number of at least 0, got {temperature}")
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"--seed must lie between 0 and {LARGEST_SEED}, got {seed}")


def continue_prompt(source: Source, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and up to `tokens` tokens that follow it, as text.

    Raises UsageError for a model that the trainer does not compute, no tokens, and ids beyond the
    model's vocabulary, GrowkitError where the model carries no tokenizer that can be read.
    """
    require_trained(source.model, str(source.path))
    if tokens < 1:
        raise UsageError(f"--tokens must be at least 1, got {tokens}")
    tokenizer = parse_model_tokenizer(source.files, source.path)
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
    own = find_own_end(tokenizer, source.files, source.path)
    return ends if own is None else ends | {own}
