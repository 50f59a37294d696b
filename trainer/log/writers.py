"""Metrics in other places than RUN/metrics.csv: TensorBoard and Weights & Biases, where they are installed.

Knows both libraries, imported only when asked for, and which numbers of a row they get; leaves rows to
`trainer.log.history`. A row that a resumed run writes again takes the place of the one before.
"""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Mapping
from typing import Any, Protocol

from etils import epath

from growkit.errors import UsageError
from trainer.config.sections import Config
from trainer.devices.hosts import is_writer, write_once

TENSORBOARD = "tensorboard"
WANDB = "wandb.txt"


class Writer(Protocol):
    """Takes the numbers of rows."""

    def add(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def note(self, step: int, event: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard; those of steps from `first` on are written again."""

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
    """A run of a project of Weights & Biases, named as RUN; its id lies in RUN, so that a resumed run goes on in it."""

    def __init__(self, library: Any, run: epath.Path, config: Config):
        if not (run / WANDB).exists():
            write_once(run / WANDB, secrets.token_hex(8).encode())
        self.run = library.init(
            project=config.log.wandb,
            name=run.name,
            id=(run / WANDB).read_text(),
            resume="allow",
            config=config.to_dict(),
        )
        # A step of W&B's own cannot be written again, which a resumed run does.
        self.run.define_metric("*", step_metric="step")

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log({"step": step, **numbers})

    def note(self, step: int, event: str) -> None:
        self.run.log({"step": step, "event": event})

    def close(self) -> None:
        self.run.finish()


def _library(name: str, key: str) -> Any:
    """A library that a key of the configuration asks for. Raises UsageError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(
            f"{key} needs {name}, which is not installed: pip install {name}"
        ) from None


class Writers:
    """The writers that a configuration's section `log` asks for, in the process that writes. Raises UsageError."""

    def __init__(self, config: Config):
        self.config, self.open = config, list[Writer]()
        tensorboard, wandb = config.log.tensorboard, config.log.wandb
        # Every process refuses, not only the one that writes: else the others would wait for it.
        self.tensorboard = _library("tensorboardX", "log.tensorboard") if tensorboard else None
        self.wandb = _library("wandb", "log.wandb") if wandb else None

    def begin(self, run: epath.Path, first: int) -> None:
        """Open them for a run that begins, or goes on, at step `first`."""
        if is_writer() and self.tensorboard:
            self.open.append(TensorBoard(self.tensorboard, run, first))
        if is_writer() and self.wandb:
            self.open.append(Wandb(self.wandb, run, self.config))

    def add(self, row: Mapping[str, str]) -> None:
        """Pass on a row of the history; a score of a task is named score/TASK/METRIC, as evaluation names it."""
        numbers = {
            name: float(text)
            for name, text in row.items()
            if text and name not in ("step", "event", "scores")
        }
        numbers |= {
            f"score/{name}": value for name, value in json.loads(row.get("scores") or "{}").items()
        }
        step = int(row["step"])
        for writer in self.open:
            writer.add(step, numbers)
            if row["event"]:
                writer.note(step, row["event"])

    def close(self) -> None:
        """Write what is not written yet, and let go."""
        for writer in self.open:
            writer.close()
        self.open = []
