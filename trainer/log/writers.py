"""A run's metrics in TensorBoard and Weights & Biases, beside RUN/metrics.csv.

Both libraries are imported only when the configuration asks for them. A row that a resumed run
writes again replaces the one before.
"""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Mapping
from typing import Any, Protocol

from etils import epath

from growkit.errors import GrowkitError, UsageError, first_line
from trainer.config.sections import Config
from trainer.devices.hosts import is_writer, write_once

TENSORBOARD = "tensorboard"  # the directory in RUN
WANDB = "wandb.txt"  # the file in RUN that holds the id of the run in Weights & Biases
# Columns of a row that are not written as numbers.
NOT_NUMBERS = ("step", "event", "scores", "validation_losses")


class Writer(Protocol):
    """A place that metrics are written to."""

    def add(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def note(self, step: int, event: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard; a run resumed at step `first` replaces those after it."""

    def __init__(self, library: Any, run: epath.Path, first: int):
        self.writer = library.SummaryWriter(str(run / TENSORBOARD), purge_step=first + 1)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def note(self, step: int, event: str) -> None:
        self.writer.add_text("event", event, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run in a project of Weights & Biases, with RUN's name.

    Its id is kept in RUN, so that a resumed run continues it.
    """

    def __init__(self, library: Any, run: epath.Path, config: Config):
        if not (run / WANDB).exists():
            write_once(run / WANDB, secrets.token_hex(8).encode())
        try:
            self.run = library.init(
                project=config.log.wandb,
                name=run.name,
                id=(run / WANDB).read_text(),
                resume="allow",
                config=config.to_dict(),
            )
        except Exception as problem:  # W&B raises many types, by the version
            raise GrowkitError(
                f"log.wandb: Weights & Biases cannot be reached ({first_line(problem)}); log in "
                f"with `wandb login`, or set WANDB_MODE=offline to keep the metrics here until "
                f"`wandb sync`"
            ) from None
        # W&B's own step can only increase, and a resumed run goes back: count by a metric instead.
        self.run.define_metric("*", step_metric="step")

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log({"step": step, **numbers})

    def note(self, step: int, event: str) -> None:
        self.run.log({"step": step, "event": event})

    def close(self) -> None:
        self.run.finish()


def _import_library(name: str, key: str) -> Any:
    """A library that a key of the configuration asks for. Raises UsageError when it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(
            f"{key} needs {name}, which is not installed: pip install {name}"
        ) from None


class Writers:
    """The writers that the configuration's section `log` asks for.

    Only one process writes. Raises UsageError in all of them when a library is missing.
    """

    def __init__(self, config: Config):
        self.config = config
        self.writers: list[Writer] = []
        self.tensorboard: Any = None
        self.wandb: Any = None
        self.connected: Wandb | None = None
        # Imported in every process: if only the writing one refused, the others would wait for it.
        if config.log.tensorboard:
            self.tensorboard = _import_library("tensorboardX", "log.tensorboard")
        if config.log.wandb:
            self.wandb = _import_library("wandb", "log.wandb")

    def connect(self, run: epath.Path) -> None:
        """Reach Weights & Biases now, before anything is computed. Raises GrowkitError."""
        if self.wandb and is_writer():
            self.connected = Wandb(self.wandb, run, self.config)

    def begin(self, run: epath.Path, first: int) -> None:
        """Open the writers for a run that begins or resumes at step `first`.

        The second stage of a run connects once more.
        """
        if not is_writer():
            return
        if self.tensorboard:
            self.writers.append(TensorBoard(self.tensorboard, run, first))
        if self.wandb:
            self.writers.append(self.connected or Wandb(self.wandb, run, self.config))
            self.connected = None

    def add(self, row: Mapping[str, str]) -> None:
        """Write a row of the history. A task's score is named score/TASK METRIC, the validation
        loss of a data set validation_loss/NAME.
        """
        numbers = _read_numbers(row)
        step = int(row["step"])
        for writer in self.writers:
            writer.add(step, numbers)
            if row["event"]:
                writer.note(step, row["event"])

    def close(self) -> None:
        """Write what is still buffered, and close."""
        for writer in self.writers:
            writer.close()
        self.writers = []
        if self.connected is not None:
            self.connected.close()
            self.connected = None


def _read_numbers(row: Mapping[str, str]) -> dict[str, float]:
    """The numbers of a row by name."""
    numbers = {name: float(text) for name, text in row.items() if text and name not in NOT_NUMBERS}
    scores = json.loads(row.get("scores") or "{}")
    losses = json.loads(row.get("validation_losses") or "{}")
    numbers |= {f"validation_loss/{name}": value for name, value in losses.items()}
    return numbers | {f"score/{name}": value for name, value in scores.items()}
