"""What a run says before its first step: the model, the data, the kernel, and where it begins.

`describe_run` gives the lines of the log, `describe_start` the event of a run that begins and of
one that changes what it validates on. Events are marked in the picture of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from growkit.lineage import Lineage
from growkit.models.counts import describe_sizes
from trainer.log.speed import Utilization
from trainer.model.kernels import select_kernel
from trainer.run.begin import Setup, Stage
from trainer.run.growth import describe_beginning
from trainer.run.position import Position

OTHER_WINDOWS = "another validation set"


def describe_run(
    setup: Setup, stage: Stage, lineage: Lineage, position: Position, utilization: Utilization
) -> Iterator[str]:
    """The model, the data, the tasks, the attention kernel, and MFU's formula where it is known."""
    model = stage.model
    source = lineage.last_training.source
    origin = f"from {source.path}" if source else "new"
    yield f"model: {describe_sizes(model)}, {origin}"
    yield from setup.data.describe(position.drawn(stage.config.schedule.steps))
    yield from setup.questions.notes
    yield select_kernel(stage.config, model, stage.layout).words
    if utilization.formula:
        yield utilization.formula


def describe_start(lineage: Lineage, step: int) -> str:
    """The event of a beginning: what grew, or what an annealing does to the learning rate."""
    words = describe_beginning(lineage, step)
    branch = lineage.last_training.branch
    if branch is None or step:
        return words
    return f"{words}, {branch.verb}: learning rate {branch.rate:g} to {branch.to:g}"


def validates_otherwise(record: Mapping[str, Any], windows: str) -> bool:
    """Whether the model was validated before on other windows than these.

    record: of what the run begins or resumes with. windows: the fingerprint of the run's own.
    """
    before = record.get("validation_windows")
    return before is not None and before != windows
