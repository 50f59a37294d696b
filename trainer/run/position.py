"""Where a run is: tokens and FLOPs since its lineage began, and its place in the data stream.

A checkpoint's record keeps the position. Which sequences come next follows from it alone, so a
resumed run draws what an uninterrupted one would have drawn, on any number of hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from growkit.models.architecture import Architecture
from trainer.config.sections import Config
from trainer.data.stream import Mixture, Stream
from trainer.devices.sharding import Layout


class Position:
    """The position at each step of a run that starts, or goes on, at step `first` with this record.

    stream: the data stream, number `number` of the lineage. new: whether it begins here, because
    the data differ from those before.
    """

    def __init__(
        self,
        config: Config,
        model: Architecture,
        mixture: Mixture,
        record: Mapping[str, Any],
        first: int,
    ) -> None:
        self.batch = config.batch
        self.context = config.model.context
        self.tokens_per_step = self.batch.sequences * self.context
        self.flops_per_step = self.tokens_per_step * model.flops_per_token(self.context)
        # Counted from the record and not from the run's step 0: batch and context may have changed
        # where the lineage went through other runs.
        self.tokens_before = record.get("tokens", 0) - first * self.tokens_per_step
        self.flops_before = record.get("flops", 0.0) - first * self.flops_per_step
        beginning = {"number": 0, "seed": config.seed, "drawn": 0, "fingerprint": None}
        place: Mapping[str, Any] = record.get("stream") or beginning
        self.number = place["number"]
        self.stream = Stream(mixture, place["seed"])
        drawn = place["drawn"]
        self.new = place["fingerprint"] not in (None, self.stream.fingerprint)
        if self.new:
            # Another seed, so that a text that is in both is not drawn in the same order again.
            self.number += 1
            self.stream = Stream(mixture, place["seed"] + 1)
            drawn = 0
        self.drawn_before = drawn - first * self.batch.sequences

    def drawn(self, step: int) -> int:
        """Sequences drawn from the stream after `step` steps."""
        return int(self.drawn_before + step * self.batch.sequences)

    def tokens(self, step: int) -> int:
        """Tokens seen since the lineage began."""
        return int(self.tokens_before + step * self.tokens_per_step)

    def flops(self, step: int) -> float:
        """FLOPs spent since the lineage began."""
        return self.flops_before + step * self.flops_per_step

    def record(self, step: int) -> dict[str, Any]:
        """What a checkpoint at this step says of the position."""
        stream = {
            "number": self.number,
            "seed": self.stream.seed,
            "drawn": self.drawn(step),
            "fingerprint": self.stream.fingerprint,
        }
        return {"tokens": self.tokens(step), "flops": self.flops(step), "stream": stream}

    def next_batch(self, step: int, layout: Layout) -> jax.Array:
        """The tokens [A, B, T+1] of the step after `step`: A accumulated parts of B sequences.

        Each process draws the sequences of its own devices.
        """
        parts = self.batch.accumulation
        count = self.batch.sequences // parts
        first = self.drawn(step)

        def draw(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[1].indices(count)
            # Part p of the batch holds sequences p * count on: what a host draws follows from where
            # its devices lie, and all hosts together draw what one would.
            drawn = [
                self.stream.batch(first + part * count + start, stop - start)
                for part in range(parts)
            ]
            return np.stack(drawn)

        shape = (parts, count, self.context + 1)
        return jax.make_array_from_callback(shape, layout.batch_sharding(1), draw)
