"""How likely a model in JAX finds texts: log likelihoods, with few compiled programs.

Texts are sorted by length and padded to a few lengths (`trainer.evaluate.batches`). The head is
applied only where a token is scored, to some positions at a time (`trainer.evaluate.losses`), so
that the logits of all tokens are never held at once.

Shapes in names: B batch, T time, N = B x T positions, E embed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from trainer.devices.sharding import make_single_device_layout, place
from trainer.evaluate.batches import Batch, plan_batches
from trainer.evaluate.losses import FEWEST_ROWS, ROWS, Piece, define_losses
from trainer.model.decoder import Decoder

# What stands after a text that is shorter than its row. No score depends on it.
PADDING = 0

# A text to score, in tokens: (context, continuation).
Pair = tuple[list[int], list[int]]
# Told of (texts, tokens) that were scored.
Advance = Callable[[int, int], None]


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
        parameters = network.model.table.tree(layout.parameter_sharding)
        everywhere = layout.replicated
        self._hidden = jax.jit(
            _define_hidden(network), in_shardings=(parameters, layout.batch_sharding())
        )
        self._losses = jax.jit(
            define_losses(network, layout),
            in_shardings=(parameters, None, everywhere, everywhere),
            out_shardings=everywhere,
        )

    def score(
        self, pairs: Sequence[Pair], advance: Advance = lambda texts, tokens: None
    ) -> list[tuple[float, bool]]:
        """(log likelihood in nats, whether each token was the likeliest) of each continuation.

        pairs: contexts and continuations of at least one token each; a context too long is cut on
        the left. advance: told how many texts and how many of their tokens were read, as they are.
        """
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        lengths = [count_tokens(pair, self.window) for pair in pairs]
        for numbers, pieces in self._start_ahead(pairs, lengths):
            counts = [len(pairs[number][1]) for number in numbers]
            scores = _read_scores(pieces, counts)
            for number, score in zip(numbers, scores, strict=True):
                results[number] = score
            advance(len(numbers), sum(lengths[number] for number in numbers))
        return results

    def _start_ahead(
        self, pairs: Sequence[Pair], lengths: Sequence[int]
    ) -> Iterator[tuple[list[int], list[Piece]]]:
        """Yield the texts' numbers and the losses of each batch, longest texts first.

        The next batch is started before one is yielded, so that the device need not wait for the
        host to read.
        """
        shards = self.layout.batch_shards
        waiting: tuple[list[int], list[Piece]] | None = None
        for batch in plan_batches(lengths, self.window, self.batch, shards):
            started = (batch.numbers, self._start(batch, [pairs[each] for each in batch.numbers]))
            if waiting is not None:
                yield waiting
            waiting = started
        if waiting is not None:
            yield waiting

    def _start(self, batch: Batch, pairs: Sequence[Pair]) -> list[Piece]:
        """Start computing the losses of the continuations of a batch, text by text."""
        tokens_BxT = np.full((batch.height, batch.time), PADDING, np.int32)
        positions, targets = [], []
        for row, (context, continuation) in enumerate(pairs):
            inputs = (context + continuation)[-self.window - 1 : -1]
            tokens_BxT[row, : len(inputs)] = inputs
            count = len(continuation)
            positions.append(row * batch.time + np.arange(len(inputs) - count, len(inputs)))
            targets.append(continuation)
        hidden_NxE = self._hidden(self.params, place(tokens_BxT, self.layout.batch_sharding()))
        pieces = self._pieces(np.concatenate(positions), np.concatenate(targets))
        return [self._losses(self.params, hidden_NxE, *piece) for piece in pieces]

    def _pieces(
        self, positions: np.ndarray, targets: np.ndarray
    ) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Positions and targets in pieces of ROWS; the last is filled up to a power of two."""
        everywhere = self.layout.replicated
        for first in range(0, len(positions), ROWS):
            last = min(first + ROWS, len(positions))
            rows = select_rows(last - first)
            # Filled up with the piece's own positions, whose losses are then not read.
            yield (
                place(np.resize(positions[first:last], rows).astype(np.int32), everywhere),
                place(np.resize(targets[first:last], rows).astype(np.int32), everywhere),
            )


def count_tokens(pair: Pair, window: int) -> int:
    """How many tokens of a text the network reads: all but the last, at most the window."""
    context, continuation = pair
    return min(len(context) + len(continuation) - 1, window)


def select_rows(count: int) -> int:
    """The power of two from FEWEST_ROWS to ROWS in which so many positions are scored."""
    rows = FEWEST_ROWS
    while rows < count:
        rows *= 2
    return rows


def _define_hidden(network: Decoder) -> Callable[[Any, jax.Array], jax.Array]:
    def hidden(params: Any, tokens_BxT: jax.Array) -> jax.Array:
        hidden_BxTxE = network.apply({"params": params}, tokens_BxT, head=False)
        return hidden_BxTxE.reshape(-1, hidden_BxTxE.shape[-1])

    return hidden


def _read_scores(pieces: list[Piece], counts: list[int]) -> list[tuple[float, bool]]:
    """Read a batch from the device and sum up each text. counts: scored tokens of each text.

    Only the last piece may have more positions than were asked for, at its end.
    """
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
