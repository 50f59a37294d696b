"""How likely a model in JAX finds texts: log likelihoods of continuations, many at once, with few programs compiled.

Texts are sorted by length and padded to a few lengths; the head is applied only where a token is scored, a fixed
number of positions at a time, so that all logits are never held. Knows tokens; leaves text to `trainer.evaluate.harness`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.devices.sharding import make_single_device_layout, place
from trainer.model.decoder import GPTNeoX
from trainer.step.loss import cross_entropy

# Positions whose logits are held at once.
ROWS = {"cpu": 64}
ROWS_ELSEWHERE = 1024
SHORTEST = 16


def pad_length(length: int, window: int) -> int:
    """The padded length: 16, 24, 32, 48, 64, ... (powers of two and their halves added), at most the window."""
    size = SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, window)


class Likelihood:
    """Scores continuations by a network and its parameters. window: tokens it reads at most.

    batch: texts at once, made a multiple of the shards of the network's layout.
    """

    def __init__(self, network: GPTNeoX, params: Any, window: int, batch: int):
        layout = network.layout or make_single_device_layout()
        self.params, self.window, self.layout = params, window, layout
        self.batch = -(-batch // layout.batch_shards) * layout.batch_shards
        self.rows = ROWS.get(jax.default_backend(), ROWS_ELSEWHERE)

        def hidden(params, tokens_BxT):
            hidden_BxTxE = network.apply({"params": params}, tokens_BxT, head=False)
            return hidden_BxTxE.reshape(-1, hidden_BxTxE.shape[-1])

        def losses(params, hidden_NxE, positions_R, targets_R):
            wide = jnp.promote_types(network.precision.compute, jnp.float32)
            rows_RxE, head_VxE = hidden_NxE[positions_R], network.head_weight(params)
            logits_RxV = jnp.einsum("re,ve->rv", rows_RxE, head_VxE, preferred_element_type=wide)
            return cross_entropy(logits_RxV, targets_R), logits_RxV.argmax(-1) == targets_R

        stored, whole = network.model.table.tree(layout.parameter_sharding), layout.replicated
        self._hidden = jax.jit(hidden, in_shardings=(stored, layout.batch_sharding()))
        self._losses = jax.jit(
            losses, in_shardings=(stored, None, whole, whole), out_shardings=whole
        )

    def score(
        self,
        pairs: Sequence[tuple[list[int], list[int]]],
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[tuple[float, bool]]:
        """(log likelihood in nats, whether each token was the likeliest) of continuations after their contexts.

        pairs: (context, continuation) in tokens, at least one each; a context too long is cut on the left.
        """
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        texts = [(context + continuation)[-self.window - 1 :] for context, continuation in pairs]
        order = sorted(range(len(pairs)), key=lambda number: -len(texts[number]))
        pending: tuple[list[int], Any] | None = None
        for first in range(0, len(order), self.batch):
            chosen = order[first : first + self.batch]
            started = (
                chosen,
                self._start([texts[n] for n in chosen], [len(pairs[n][1]) for n in chosen]),
            )
            # One batch ahead of the device, so that it need not wait for this one to be read.
            for numbers, parts in filter(None, [pending]):
                self._finish(numbers, parts, pairs, results)
                advance(len(numbers))
            pending = started
        for numbers, parts in filter(None, [pending]):
            self._finish(numbers, parts, pairs, results)
            advance(len(numbers))
        return results

    def _start(
        self, texts: list[list[int]], scored: list[int]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Losses and hits of the last tokens of each text, one after another, in parts, begun on the device."""
        time = pad_length(max(map(len, texts)) - 1, self.window)
        tokens_BxT = np.zeros((self._height(len(texts)), time), np.int32)
        positions, targets = [], []
        for row, (text, count) in enumerate(zip(texts, scored, strict=True)):
            tokens_BxT[row, : len(text) - 1] = text[:-1]
            positions.append(row * time + np.arange(len(text) - 1 - count, len(text) - 1))
            targets.append(text[-count:])
        hidden_NxE = self._hidden(self.params, place(tokens_BxT, self.layout.batch_sharding()))
        return [
            self._losses(self.params, hidden_NxE, *piece)
            for piece in self._pieces(np.concatenate(positions), np.concatenate(targets))
        ]

    def _height(self, count: int) -> int:
        """How many texts are computed for `count`: the batch, or of its halves the smallest that holds them."""
        size = self.batch
        while size % (2 * self.layout.batch_shards) == 0 and size // 2 >= count:
            size //= 2
        return size

    def _pieces(
        self, positions: np.ndarray, targets: np.ndarray
    ) -> Iterator[tuple[jax.Array, ...]]:
        """Both in pieces of `rows`, the last filled up with zeros."""
        count = -(-len(positions) // self.rows) * self.rows
        padded = [np.resize(array, count).astype(np.int32) for array in (positions, targets)]
        for first in range(0, count, self.rows):
            yield tuple(
                place(array[first : first + self.rows], self.layout.replicated) for array in padded
            )

    @staticmethod
    def _finish(numbers: list[int], parts: list, pairs: Sequence, results: list) -> None:
        """Read what a batch's parts came to, and put the sums in their places."""
        losses, hits = (
            np.concatenate([np.asarray(part) for part in kind]) for kind in zip(*parts, strict=True)
        )
        begin = 0
        for number in numbers:
            end = begin + len(pairs[number][1])
            results[number] = (
                -float(losses[begin:end].sum(dtype=np.float64)),
                bool(hits[begin:end].all()),
            )
            begin = end
