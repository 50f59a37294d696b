"""Where a validation loss stopped falling, found from the losses on record.

Between two validations nothing is remembered but the losses themselves, which a run keeps anyway.
So a resumed run finds the same plateaus as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from growkit.lineage import Lineage
from trainer.config.sections import Config, Plateau, Schedule


def find_plateaus(losses: Sequence[float], settings: Plateau) -> list[int]:
    """Find the indices of the losses that complete a plateau; none when the patience is 0.

    The rule is that of optax.contrib.reduce_on_plateau, and so are its names: a plateau is
    `patience` losses in a row, none of them below (1 - rtol) times the best one before it. After a
    plateau the count begins again, and the best loss stays.
    """
    best = math.inf
    since = 0
    found = []
    for number, loss in enumerate(losses):
        if loss < (1 - settings.rtol) * best:
            best = loss
            since = 0
        else:
            since += 1
        # `since` begins again, so a long plateau counts once every `patience` losses.
        if settings.patience and since == settings.patience:
            found.append(number)
            since = 0
    return found


def compute_reduction(losses: Sequence[float], schedule: Schedule, lineage: Lineage) -> float:
    """The factor on the learning rate after these validation losses.

    Each plateau multiplies it by schedule.plateau.factor. lineage: its last entry is this training.
    A schedule that continues its source's begins with the source's factor.
    """
    source = lineage.entries[-1].source
    before = source.reduction if source and schedule.continued else 1.0
    count = len(find_plateaus(losses, schedule.plateau))
    return before * schedule.plateau.factor**count


def reduce_learning_rate(config: Config, factor: float) -> Config:
    """The configuration with its learning rate multiplied by a factor."""
    optimizer = replace(config.optimizer, learning_rate=config.optimizer.learning_rate * factor)
    return replace(config, optimizer=optimizer)
