"""Where a run is: tokens and FLOPs since its lineage began, and its place in the data stream.

Knows how a checkpoint's record says it and which sequences come next; leaves drawing them to `trainer.data.stream`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from growkit.models.architecture import Architecture
from trainer.config.sections import Config
from trainer.data.stream import Mixture, Stream
from trainer.devices.sharding import Layout


class Position:
    """The position at each step of a run that began, or goes on, at step `first` with a checkpoint's `record`.

    stream: what is drawn from, the number-th of the lineage; new: whether it begins here, the data being others.
    """

    def __init__(
        self, config: Config, model: Architecture, mixture: Mixture, record: dict[str, Any], first: int
    ):
        self.batch, self.context = config.batch, config.model.context
        self.tokens_per_step = self.batch.sequences * self.context
        self.flops_per_step = self.tokens_per_step * model.flops_per_token(self.context)
        self.tokens_before = record.get("tokens", 0) - first * self.tokens_per_step
        self.flops_before = record.get("flops", 0.0) - first * self.flops_per_step
        place = record.get("stream") or {
            "number": 0,
            "seed": config.seed,
            "drawn": 0,
            "fingerprint": None,
        }
        self.stream = Stream(mixture, place["seed"])
        self.number, drawn = place["number"], place["drawn"]
        self.new = place["fingerprint"] not in (None, self.stream.fingerprint)
        if self.new:
            # Other data: a stream of its own, so that a text that is in both is not drawn in the same order again.
            self.stream = Stream(mixture, place["seed"] + 1)
            self.number, drawn = place["number"] + 1, 0
        self.drawn_before = drawn - first * self.batch.sequences

    def drawn(self, step: int) -> int:
        """Sequences drawn from the stream when `step` steps are done."""
        return self.drawn_before + step * self.batch.sequences

    def tokens(self, step: int) -> int:
        """Tokens seen since the lineage began."""
        return self.tokens_before + step * self.tokens_per_step

    def flops(self, step: int) -> float:
        """FLOPs spent since the lineage began."""
        return self.flops_before + step * self.flops_per_step

    def record(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of it."""
        stream = {"number": self.number, "seed": self.stream.seed, "drawn": self.drawn(step)}
        return {
            "tokens": self.tokens(step),
            "flops": self.flops(step),
            "stream": stream | {"fingerprint": self.stream.fingerprint},
        }

    def next_batch(self, step: int, layout: Layout) -> jax.Array:
        """The tokens [A, B, T+1] of the step after `step`, each process drawing the sequences of its devices."""
        parts, first = self.batch.accumulation, self.drawn(step)
        count = self.batch.sequences // parts

        def draw(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[1].indices(count)
            return np.stack(
                [
                    self.stream.batch(first + part * count + start, stop - start)
                    for part in range(parts)
                ]
            )

        return jax.make_array_from_callback((parts, count, self.context + 1), layout.batch_sharding(1), draw)
