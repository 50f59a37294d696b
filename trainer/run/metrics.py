"""The rows of a run's metrics: written to metrics.csv and to the other writers, and drawn."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from trainer.devices.hosts import is_writer
from trainer.log import curves
from trainer.log.load import Loads, describe_load
from trainer.log.writers import Writers
from trainer.run.directory import RunDirectory
from trainer.run.position import Position

DRAWN_EVERY = 60.0  # seconds
CURVES = "curves.png"
SCORES = "scores.png"


class Metrics:
    """Adds rows with the tokens and FLOPs of their step, and draws RUN's pictures now and then.

    first: the step at which the run begins or resumes.
    """

    def __init__(
        self, directory: RunDirectory, writers: Writers, position: Position, first: int
    ) -> None:
        self.path = directory.path
        self.history = directory.history
        self.writers = writers
        self.position = position
        self.loads = Loads(directory.path, first)
        self.drawn_at = time.monotonic()

    def add_load(self, step: int, load_LxX: np.ndarray) -> dict[str, float]:
        """Write how busy each expert was; returns the columns of the row that sum it up."""
        self.loads.add(step, load_LxX)
        return describe_load(load_LxX)

    def add(self, step: int, **values: Any) -> None:
        """Add a row of a step. values: by the names of the history's columns."""
        tokens = self.position.tokens(step)
        flops = self.position.flops(step)
        row = self.history.add(step=step, tokens=tokens, flops=flops, **values)
        self.writers.add(row)

    def draw(self, final: bool = False) -> None:
        """Draw the curves, at most once a minute unless it is the last time."""
        recently = time.monotonic() - self.drawn_at < DRAWN_EVERY
        if not is_writer() or (recently and not final):
            return
        # The source's rows too: a grown model's curve begins where its source's ended.
        rows = self.history.earlier + self.history.rows
        if any(row["loss"] or row["validation_loss"] for row in rows):
            curves.draw_curves(self.path / CURVES, rows, self.path.name)
        if any(row.get("scores") for row in rows):
            curves.draw_scores(self.path / SCORES, rows, self.path.name)
        self.drawn_at = time.monotonic()
