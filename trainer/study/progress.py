"""What the user sees while a study runs: which run of how many, its loss, and the time left.

The time left is estimated from FLOPs, because the runs' steps differ in size.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Self

import click

from trainer.log.report import URGENT, format_duration


class Progress:
    """A bar over all FLOPs of a study on a terminal, a line a run elsewhere. A context manager.

    done: FLOPs of the runs that ended in this command; running: of the current run so far; left: to
    do, the current run's included; skipped: of the current run, done before this command. quiet:
    whether it shows only what a run must say at once.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty() and not quiet
        self.bar: Any = None
        self.begun = time.monotonic()
        self.words = ""
        self.done = 0.0
        self.running = 0.0
        self.left = 0.0
        self.skipped = 0.0

    def __enter__(self) -> Self:
        if self.live:
            self.bar = _make_bar()
            self.task = self.bar.add_task("study", words="")
            self.bar.start()
        return self

    def __exit__(self, *problem: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def begin(self, words: str, left: float) -> None:
        """A run begins. words: its name; left: FLOPs of it and of all runs after it."""
        self.words = words
        self.left = left
        self.running = 0.0
        self.skipped = 0.0
        self._show("compiling")

    def step(self, flops: float, loss: float) -> None:
        """The current run has done `flops` FLOPs in this command."""
        self.running = flops
        self._show(f"loss {loss:.4f}, {self.format_time_left()} left")

    def skip(self, flops: float) -> None:
        """The current run resumes where `flops` FLOPs were done before this command."""
        self.skipped = flops
        self.left -= flops

    def end(self, flops: float, words: str) -> None:
        """The current run ended after `flops` FLOPs. words: its result."""
        trained = flops - self.skipped
        self.done += trained
        self.left -= trained
        self.running = 0.0
        if not self.quiet:
            self.say(f"{self.words}: {words}; {self.format_time_left()} left")

    def say(self, words: str) -> None:
        """Show a line of its own."""
        if self.bar is not None:
            self.bar.console.print(words, highlight=False, soft_wrap=True)
        else:
            click.echo(words, err=True)

    def format_time_left(self) -> str:
        """The time left, at the FLOPs per second since this command began."""
        done = self.done + self.running
        if not done:
            return "unknown time"
        seconds = time.monotonic() - self.begun
        return format_duration((self.left - self.running) * seconds / done)

    def _show(self, words: str) -> None:
        if self.bar is not None:
            self.bar.update(
                self.task,
                description=self.words,
                total=self.done + self.left,
                completed=self.done + self.running,
                words=words,
            )


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[words]}"),
        console=Console(stderr=True),
    )


class RunProgress:
    """Shows a run's steps in the study's progress, instead of `trainer.log.report.Report`."""

    def __init__(self, progress: Progress, flops_per_step: float, first: int):
        self.progress = progress
        self.flops_per_step = flops_per_step
        self.first = first
        progress.skip(first * flops_per_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        pass

    def restart_clock(self, step: int) -> None:
        pass

    def show_row(self, step: int, loss: float, rate: float, speed: str) -> None:
        self.progress.step((step - self.first) * self.flops_per_step, loss)

    def say(self, words: str) -> None:
        """Show only what the user must know at once; everything else is in the run's own files."""
        if words.startswith(URGENT):
            self.progress.say(f"{self.progress.words}: {words}")
