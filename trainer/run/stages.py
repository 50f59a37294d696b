"""A run from its first step to its last: one loop after the other in the same directory, as many as it has models.

Growth on the way is no more than this: the loop ends at its step with a checkpoint, as if it had been stopped, and
the next one begins with that checkpoint, grown. Knows the order; leaves everything else to the loop.
"""

from __future__ import annotations

import gc
import os

from growkit.checkpoint.tensor import Source
from growkit.entries import Branch
from trainer.config.sections import Config
from trainer.log.report import Report, Result
from trainer.run.loop import Run


def train(
    config: Config,
    out: str | os.PathLike,
    source: Source | None = None,
    start: str | None = None,
    allow_gap: bool = False,
    branch: Branch | None = None,
    show: type[Report] = Report,
) -> Result:
    """Begin the run `out` or go on with it, to its end or to a signal; arguments as those of `trainer.run.loop.Run`."""
    result = Run(config, out, source, start, allow_gap, branch).go(show)
    while result.signal is None and result.step < config.schedule.steps:
        # What has ended lies in cycles (Orbax's threads and futures), and the grown model needs its room.
        gc.collect()
        result = Run(config, out, None, start, allow_gap).go(show)
    return result
