"""How likely a model in JAX finds texts: log likelihoods, with few compiled programs.

Texts are sorted by length and padded to a few lengths. The head is applied only where a token is
scored, a fixed number of positions at a time, so that the logits of all tokens are never held at
once.

Shapes in names: B batch, T time, N = B x T positions, R positions scored at a time, E embed, V
vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.devices.sharding import make_single_device_layout, place
from trainer.model.decoder import Decoder
from trainer.model.precision import cap, select_wide_dtype
from trainer.step.loss import cross_entropy

# How many positions' logits are held at once.
ROWS = {"cpu": 64}
ROWS_ELSEWHERE = 1024
# The shortest padded length, in tokens.
SHORTEST = 16

# A text to score, in tokens: (context, continuation).
Pair = tuple[list[int], list[int]]
# The losses, and whether each token was the likeliest, of R positions; on the device.
Piece = tuple[jax.Array, jax.Array]


def pad_length(length: int, window: int) -> int:
    """Round a length up to 16, 24, 32, 48, 64, ..., at most the window.

    The steps are the powers of two and one and a half of each.
    """
    size = SHORTEST
    while size < length:
        is_power_of_two = size & (size - 1) == 0
        size = size * 3 // 2 if is_power_of_two else size * 4 // 3
    return min(size, window)


class Likelihood:
    """Scores continuations by a network and its parameters.

    window: the most tokens that the network reads. batch: texts at once, rounded up to a multiple
    of the shards of the network's layout.
    """

    def __init__(self, network: Decoder, params: Any, window: int, batch: int):
        layout = network.layout or make_single_device_layout()
        self.params = params
        self.window = window
        self.layout = layout
        self.batch = math.ceil(batch / layout.batch_shards) * layout.batch_shards
        self.rows = ROWS.get(jax.default_backend(), ROWS_ELSEWHERE)
        parameters = network.model.table.tree(layout.parameter_sharding)
        everywhere = layout.replicated
        self._hidden = jax.jit(
            _define_hidden(network), in_shardings=(parameters, layout.batch_sharding())
        )
        self._losses = jax.jit(
            _define_losses(network),
            in_shardings=(parameters, None, everywhere, everywhere),
            out_shardings=everywhere,
        )

    def score(
        self, pairs: Sequence[Pair], advance: Callable[[int], None] = lambda done: None
    ) -> list[tuple[float, bool]]:
        """(log likelihood in nats, whether each token was the likeliest) of each continuation.

        pairs: contexts and continuations of at least one token each; a context too long is cut on
        the left. advance: told how many texts were scored, as they are.
        """
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for numbers, pieces in self._start_ahead(pairs):
            counts = [len(pairs[number][1]) for number in numbers]
            scores = _read_scores(pieces, counts)
            for number, score in zip(numbers, scores, strict=True):
                results[number] = score
            advance(len(numbers))
        return results

    def _start_ahead(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], list[Piece]]]:
        """Yield the texts' numbers and the losses of each batch, longest texts first.

        The next batch is started before one is yielded, so that the device need not wait for the
        host to read.
        """
        texts = [(context + continuation)[-self.window - 1 :] for context, continuation in pairs]
        order = sorted(range(len(pairs)), key=lambda number: -len(texts[number]))
        waiting: tuple[list[int], list[Piece]] | None = None
        for first in range(0, len(order), self.batch):
            numbers = order[first : first + self.batch]
            counts = [len(pairs[number][1]) for number in numbers]
            started = (numbers, self._start([texts[number] for number in numbers], counts))
            if waiting is not None:
                yield waiting
            waiting = started
        if waiting is not None:
            yield waiting

    def _start(self, texts: list[list[int]], counts: list[int]) -> list[Piece]:
        """Start computing the losses of the last `count` tokens of each text, text by text."""
        time = pad_length(max(map(len, texts)) - 1, self.window)
        tokens_BxT = np.zeros((self._select_height(len(texts)), time), np.int32)
        positions, targets = [], []
        for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
            inputs = text[:-1]
            tokens_BxT[row, : len(inputs)] = inputs
            positions.append(row * time + np.arange(len(inputs) - count, len(inputs)))
            targets.append(text[-count:])
        hidden_NxE = self._hidden(self.params, place(tokens_BxT, self.layout.batch_sharding()))
        pieces = self._pieces(np.concatenate(positions), np.concatenate(targets))
        return [self._losses(self.params, hidden_NxE, *piece) for piece in pieces]

    def _select_height(self, count: int) -> int:
        """How many texts are computed for `count`: the batch, halved as long as they fit."""
        size = self.batch
        while size % (2 * self.layout.batch_shards) == 0 and size // 2 >= count:
            size //= 2
        return size

    def _pieces(
        self, positions: np.ndarray, targets: np.ndarray
    ) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Positions and targets in pieces of `rows`; the last repeats from the start to be full."""
        count = math.ceil(len(positions) / self.rows) * self.rows
        padded_positions = np.resize(positions, count).astype(np.int32)
        padded_targets = np.resize(targets, count).astype(np.int32)
        everywhere = self.layout.replicated
        for first in range(0, count, self.rows):
            last = first + self.rows
            yield (
                place(padded_positions[first:last], everywhere),
                place(padded_targets[first:last], everywhere),
            )


def _define_hidden(network: Decoder) -> Callable[[Any, jax.Array], jax.Array]:
    def hidden(params: Any, tokens_BxT: jax.Array) -> jax.Array:
        hidden_BxTxE = network.apply({"params": params}, tokens_BxT, head=False)
        return hidden_BxTxE.reshape(-1, hidden_BxTxE.shape[-1])

    return hidden


def _define_losses(network: Decoder) -> Callable[..., Piece]:
    wide = select_wide_dtype(network.precision.compute)

    def losses(
        params: Any, hidden_NxE: jax.Array, positions_R: jax.Array, targets_R: jax.Array
    ) -> Piece:
        rows_RxE = hidden_NxE[positions_R]
        head_VxE = network.head_weight(params)
        logits_RxV = jnp.einsum("re,ve->rv", rows_RxE, head_VxE, preferred_element_type=wide)
        logits_RxV = cap(logits_RxV, network.logit_cap)
        return cross_entropy(logits_RxV, targets_R), logits_RxV.argmax(-1) == targets_R

    return losses


def _read_scores(pieces: list[Piece], counts: list[int]) -> list[tuple[float, bool]]:
    """Read a batch from the device and sum up each text. counts: scored tokens of each text."""
    losses = np.concatenate([np.asarray(losses) for losses, _ in pieces])
    hits = np.concatenate([np.asarray(hits) for _, hits in pieces])
    scores = []
    begin = 0
    for count in counts:
        end = begin + count
        total = losses[begin:end].sum(dtype=np.float64)
        scores.append((-float(total), bool(hits[begin:end].all())))
        begin = end
    return scores
