"""The validation loss of a run: the mean over windows that are the same on any number of hosts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from trainer.data.corpus import Corpus
from trainer.data.stream import validation_batches
from trainer.devices.sharding import place
from trainer.run.begin import Stage

EvalStep = Callable[[Any, jax.Array, jax.Array], jax.Array]


def compute_validation_loss(
    eval_step: EvalStep,
    params: Any,
    data: Corpus,
    stage: Stage,
    stopped: Callable[[], bool],
) -> float | None:
    """The mean loss in nats a token; None when `stopped` became true meanwhile.

    eval_step: (params, tokens [B, T+1], mask [B]) -> the summed loss of the unmasked sequences.
    """
    config = stage.config
    layout = stage.layout
    windows = config.eval.windows
    shards = layout.batch_shards
    # The smallest multiple of the shards that takes all windows, if that is less than a step's
    # part.
    enough = math.ceil(windows / shards) * shards
    batch = min(config.batch.sequences // config.batch.accumulation, enough)
    sums: list[jax.Array] = []
    tokens_seen = 0
    for tokens, mask in validation_batches(data.validation, batch, windows):
        if stopped():
            return None
        tokens_BxT1 = place(tokens, layout.batch_sharding())
        mask_B = place(mask, layout.batch_sharding())
        sums.append(eval_step(params, tokens_BxT1, mask_B))
        tokens_seen += int(mask.sum()) * config.model.context
        # Stay one batch ahead of the device and no more, so that a signal need not wait for all
        # of them.
        sums[-2:][0].block_until_ready()
    # fsum rounds once, so that the order of the batches does not matter.
    return math.fsum(float(part) for part in sums) / tokens_seen
