"""What the user sees while a run goes: a live bar on a terminal, plain lines elsewhere; and how it ended.

Knows how progress is shown; leaves what is measured to the loop.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import click

from trainer.devices.hosts import is_writer


def format_duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


@dataclass(frozen=True)
class Result:
    """How a run ended: at which step, by which signal (None: it is finished), with which validation loss.

    heard: a signal that came, be it when the run was as good as finished.
    """

    step: int
    signal: int | None
    validation_loss: float | None
    heard: int | None = None


class Report:
    """Shows a run of `steps` steps, from step `first` on. Use as a context manager."""

    def __init__(self, name: str, steps: int, first: int = 0):
        self.name, self.steps, self.first = name, steps, first
        self.begun = (time.monotonic(), first)
        self.shown = is_writer()
        self.live = self.shown and sys.stderr.isatty()
        self.bar: Any = None

    def __enter__(self) -> Report:
        if self.live:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[words]}"),
            )
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(
                self.name, total=self.steps, completed=self.first, words="compiling"
            )
            self.bar.start()
        return self

    def __exit__(self, *problem) -> None:
        if self.bar is not None:
            self.bar.stop()

    def restart_clock(self, step: int) -> None:
        """Step `step` is done and what it needed is compiled: the time that is left is reckoned from here."""
        self.begun = (time.monotonic(), step)

    def show_row(self, step: int, loss: float, rate: float, speed: str) -> None:
        """Show a row of metrics: loss in nats a token, rate of learning, speed in words."""
        words = f"loss {loss:.4f}  ppl {math.exp(min(loss, 30)):.2f}  {speed}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, words=words)
            return
        if not self.shown:
            return
        begun, first = self.begun
        each = (time.monotonic() - begun) / (step - first) if step > first else None
        left = "unknown yet" if each is None else format_duration((self.steps - step) * each)
        click.echo(
            f"{self.name}  step {step}/{self.steps}  {words}  lr {rate:.2e}  left {left}", err=True
        )

    def say(self, words: str) -> None:
        """A line of its own."""
        if self.bar is not None:
            self.bar.console.print(f"{self.name}  {words}", highlight=False)
        elif self.shown:
            click.echo(f"{self.name}  {words}", err=True)
