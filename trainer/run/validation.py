"""The validation loss of a run: the mean over windows that are the same on any number of hosts.

Data sets are computed one after another, so that each has a loss of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from trainer.data.corpus import Corpus
from trainer.data.stream import count_in_turn, validation_batches
from trainer.data.windows import AnyWindows
from trainer.devices.sharding import place
from trainer.run.begin import Stage

HIGHEST_LOSS = 30.0  # nats a token; exp(30) is said for the perplexity of anything above

EvalStep = Callable[[Any, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Validation:
    """Mean losses in nats a token: of all windows, and by data set where there are several."""

    loss: float
    by_set: dict[str, float] = field(default_factory=dict)

    def describe(self, step: int) -> list[str]:
        """Lines for the log."""
        perplexity = math.exp(min(self.loss, HIGHEST_LOSS))
        lines = [f"step {step}: validation loss {self.loss:.4f}, perplexity {perplexity:.2f}"]
        if self.by_set:
            each = ", ".join(f"{name} {loss:.4f}" for name, loss in self.by_set.items())
            lines.append(f"step {step}: validation loss by data set: {each}")
        return lines


def compute_validation_loss(
    eval_step: EvalStep,
    params: Any,
    data: Corpus,
    stage: Stage,
    stopped: Callable[[], bool],
    limit: int | None = None,
) -> Validation | None:
    """The mean losses; None when `stopped` became true meanwhile.

    eval_step: (params, tokens [B, T+1], mask [B]) -> the summed loss of the unmasked sequences.
    limit: windows at most; None for eval.windows.
    """
    config = stage.config
    counts = count_in_turn(data.validation, limit or config.eval.windows)
    sums: dict[str, list[jax.Array]] = {}
    for name, windows, count in zip(data.validation_names, data.validation, counts, strict=True):
        if not count:
            continue
        found = _sum_losses(eval_step, params, windows, count, stage, stopped)
        if found is None:
            return None
        sums[name] = found
    tokens = {
        name: count * config.model.context
        for name, count in zip(data.validation_names, counts, strict=True)
    }
    # fsum rounds once, so that the order of the batches does not matter.
    totals = {name: [float(part) for part in parts] for name, parts in sums.items()}
    every = math.fsum(part for parts in totals.values() for part in parts)
    loss = every / sum(tokens.values())
    if len(totals) < 2:
        return Validation(loss)
    return Validation(loss, {name: math.fsum(each) / tokens[name] for name, each in totals.items()})


def _sum_losses(
    eval_step: EvalStep,
    params: Any,
    windows: AnyWindows,
    count: int,
    stage: Stage,
    stopped: Callable[[], bool],
) -> list[jax.Array] | None:
    """The summed losses of the batches of a data set's first windows; None when it is to stop."""
    layout = stage.layout
    batch = stage.config.batch
    shards = layout.batch_shards
    # The smallest multiple of the shards that takes all windows, if that is less than a step's
    # part. All data sets have the same, so that one program does.
    enough = math.ceil(stage.config.eval.windows / shards) * shards
    size = min(batch.sequences // batch.accumulation, enough)
    sums: list[jax.Array] = []
    for tokens, mask in validation_batches([windows], size, count):
        if stopped():
            return None
        tokens_BxT1 = place(tokens, layout.batch_sharding())
        mask_B = place(mask, layout.batch_sharding())
        sums.append(eval_step(params, tokens_BxT1, mask_B))
        # Stay one batch ahead of the device and no more, so that a signal need not wait for all
        # of them.
        sums[-2:][0].block_until_ready()
    return sums
