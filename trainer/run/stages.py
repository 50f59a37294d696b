"""A run from its first step to its last: one stage after the other, as many as it has models.

Growth on the way needs no more than this. The first stage ends at its step with a checkpoint, as
if it had been stopped, and the next one begins with that checkpoint, grown.
"""

from __future__ import annotations

import gc
import logging
import os
from typing import Any

from growkit.entries import Branch
from trainer.devices.programs import enable_program_cache
from trainer.log.report import Report, Result, Show
from trainer.run.begin import begin, prepare
from trainer.run.damage import Trust
from trainer.run.loop import Run


def train(
    values: dict[str, Any],
    out: str | os.PathLike[str],
    start: str | None = None,
    allow_gap: bool = False,
    branch: Branch | None = None,
    show: Show = Report,
    trust: Trust | None = None,
) -> Result:
    """Train into the run directory `out`, or go on with the run there, to its end or to a signal.

    values: the configuration, as nested values. start: the model to begin with, None for a new
    one. allow_gap: train on where exact growth moved the validation loss. branch: what the
    lineage says of a run that began as a branch of another. show: what the user sees. trust:
    what becomes of a damaged checkpoint. Raises UsageError or GrowkitError.
    """
    # Orbax logs its errors with tracebacks, and raises them too: the user is shown one sentence.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    setup = prepare(values, out, start, allow_gap, branch, trust)
    enable_program_cache()
    result = Run(begin(setup)).go(show)
    # A signal ends the run; otherwise a stage that ended early ended at its growth.
    while result.signal is None and result.step < setup.first.config.schedule.steps:
        # The stage that ended lies in cycles (Orbax's threads and futures), and the grown model
        # needs its memory.
        gc.collect()
        result = Run(begin(setup)).go(show)
    return result
