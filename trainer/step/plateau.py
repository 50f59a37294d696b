"""Where a validation loss stopped falling, worked out anew from the losses on record.

Nothing is remembered between two validations but the losses themselves, which a run keeps anyway: a resumed run
finds the plateaus that it would have found. Knows numbers; leaves what follows from a plateau to the loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from growkit.lineage import Lineage
from trainer.config.sections import Config, Plateau, Schedule


def find_plateaus(losses: Sequence[float], settings: Plateau) -> list[int]:
    """The indices of the losses at which a plateau was found; none when the patience is 0.

    The rule and its names are those of optax.contrib.reduce_on_plateau: `patience` losses in a row, none of them
    below (1 - rtol) times the best one before it; then the counting begins again, the best one kept.
    """
    best, since, found = math.inf, 0, []
    for number, loss in enumerate(losses):
        if loss < (1 - settings.rtol) * best:
            best, since = loss, 0
        else:
            since += 1
        if settings.patience and since == settings.patience:
            found.append(number)
            since = 0
    return found


def compute_reduction(losses: Sequence[float], schedule: Schedule, lineage: Lineage) -> float:
    """The factor on the learning rate after a training's validation losses: one `factor` for each plateau.

    lineage: this training's entry last; a schedule that goes on in its source's has the source's reduction too.
    """
    source = lineage.entries[-1].source
    before = source.reduction if source and schedule.continued else 1.0
    return before * schedule.plateau.factor ** len(find_plateaus(losses, schedule.plateau))


def reduce_learning_rate(config: Config, factor: float) -> Config:
    """The configuration with its learning rate multiplied, which makes the program of the steps that follow."""
    optimizer = replace(config.optimizer, learning_rate=config.optimizer.learning_rate * factor)
    return replace(config, optimizer=optimizer)
