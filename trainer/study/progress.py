"""What the user sees of a study while it goes: which run of how many, its loss, the time left for all of them.

Knows FLOPs done and to come, from which the time left is reckoned; leaves what runs there are to `course`.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from trainer.log.report import format_duration

# How the lines of a run begin that a study shows: warnings, a signal's, a stalled host's.
SHOWN = ("warning", "stopping", "the others wait")


class Progress:
    """A bar over all FLOPs of a study on a terminal, a line for each run elsewhere. Use as a context manager."""

    def __init__(self):
        self.live = sys.stderr.isatty()
        self.bar: Any = None
        self.begun, self.words = time.monotonic(), ""
        self.done = self.running = self.left = self.skipped = 0.0

    def __enter__(self) -> Progress:
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[words]}"),
            )
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("study", words="")
            self.bar.start()
        return self

    def __exit__(self, *problem) -> None:
        if self.bar is not None:
            self.bar.stop()

    def begin(self, words: str, left: float) -> None:
        """A run begins. left: FLOPs of it and of all after it."""
        self.words, self.left, self.running, self.skipped = words, left, 0.0, 0.0
        self._show("compiling")

    def step(self, flops: float, loss: float) -> None:
        """The run has done so many FLOPs."""
        self.running = flops
        self._show(f"loss {loss:.4f}, {self.format_time_left()} left")

    def skip(self, flops: float) -> None:
        """The run goes on where so many FLOPs were done before this command."""
        self.skipped, self.left = flops, self.left - flops

    def end(self, flops: float, words: str) -> None:
        """The run is done, in so many FLOPs; words: what came of it."""
        here = flops - self.skipped
        self.done, self.left, self.running = self.done + here, self.left - here, 0.0
        self.say(f"{self.words}: {words}; {self.format_time_left()} left")

    def say(self, words: str) -> None:
        """A line of its own."""
        if self.bar is not None:
            self.bar.console.print(words, highlight=False, soft_wrap=True)
        else:
            click.echo(words, err=True)

    def format_time_left(self) -> str:
        """By the FLOPs a second since this command began."""
        done = self.done + self.running
        seconds = time.monotonic() - self.begun
        return format_duration((self.left - self.running) * seconds / done) if done else "unknown time"

    def _show(self, words: str) -> None:
        if self.bar is not None:
            total, done = self.done + self.left, self.done + self.running
            self.bar.update(
                self.task, description=self.words, total=total, completed=done, words=words
            )


class RunProgress:
    """What a run shows of itself, in the place of `trainer.log.report.Report`: its steps, to the study's progress."""

    def __init__(self, progress: Progress, flops_per_step: float, first: int):
        self.progress, self.flops_per_step, self.first = progress, flops_per_step, first
        progress.skip(first * flops_per_step)

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, *problem) -> None:
        pass

    def restart_clock(self, step: int) -> None:
        pass

    def show_row(self, step: int, loss: float, rate: float, speed: str) -> None:
        self.progress.step((step - self.first) * self.flops_per_step, loss)

    def say(self, words: str) -> None:
        """Only what must be known at once: the rest is in the run's own files."""
        if words.startswith(SHOWN):
            self.progress.say(f"{self.progress.words}: {words}")
