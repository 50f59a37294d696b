"""What the user sees while a run trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import click

from trainer.devices.hosts import is_writer

HIGHEST_LOSS = 30.0  # nats a token; a perplexity of exp(30) is shown for anything above
# How lines begin that are shown whatever the user asked for: warnings, signals, hosts that hang.
URGENT = ("warning", "stopping", "the others wait")


def format_duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minute:02}:{second:02}"
    return f"{minute}:{second:02}"


@dataclass(frozen=True)
class Result:
    """How a run ended.

    step: its last step. signal: the signal that stopped it, None when it finished. validation_loss:
    at that step, in nats a token; None when it was not validated. heard: a signal that arrived,
    even if the run finished nevertheless. compiling: whether a program is still being compiled in
    a thread of this process, which must not be waited for.
    """

    step: int
    signal: int | None
    validation_loss: float | None
    heard: int | None = None
    compiling: bool = False


class Display(Protocol):
    """What the training loop tells the user by; `Report` is one."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def restart_clock(self, step: int) -> None: ...

    def show_row(self, step: int, loss: float, rate: float, speed: str) -> None: ...

    def say(self, words: str) -> None: ...


# How a run is shown: from its name, its number of steps, and the step that it begins or resumes at.
Show = Callable[[str, int, int], Display]


class Report:
    """Shows a run of `steps` steps, from step `first` on. Use as a context manager."""

    def __init__(self, name: str, steps: int, first: int = 0):
        self.name = name
        self.steps = steps
        self.first = first
        self.clock = (
            time.monotonic(),
            first,
        )  # (when, at which step) the time left is counted from
        self.shown = is_writer()
        self.live = self.shown and sys.stderr.isatty()
        self.bar: Any = None

    def __enter__(self) -> Self:
        if self.live:
            self.bar = _make_bar()
            self.task = self.bar.add_task(
                self.name, total=self.steps, completed=self.first, words="compiling"
            )
            self._show(self.bar.start)
        return self

    def __exit__(self, *problem: object) -> None:
        if self.bar is not None:
            self._show(self.bar.stop)

    def _show(self, write: Callable[..., Any], *given: Any, **named: Any) -> None:
        """Write to the terminal, unless it is gone: training goes on without it.

        A closed terminal (EIO) or a pipe whose reader has ended (EPIPE) must not cost the run.
        """
        if not self.shown:
            return
        try:
            write(*given, **named)
        except OSError:
            self.shown = False

    def restart_clock(self, step: int) -> None:
        """Estimate the time left from here on: `step` is done, and its program is compiled."""
        self.clock = (time.monotonic(), step)

    def show_row(self, step: int, loss: float, rate: float, speed: str) -> None:
        """Show a row of metrics. loss: nats a token; rate: the learning rate; speed: in words."""
        perplexity = math.exp(min(loss, HIGHEST_LOSS))
        words = f"loss {loss:.4f}  ppl {perplexity:.2f}  {speed}"
        if self.bar is not None:
            self._show(self.bar.update, self.task, completed=step, words=words)
            return
        left = self._estimate_time_left(step)
        place = f"step {step}/{self.steps}"
        line = f"{self.name}  {place}  {words}  lr {rate:.2e}  left {left}"
        self._show(click.echo, line, err=True)

    def _estimate_time_left(self, step: int) -> str:
        begun, first = self.clock
        if step <= first:
            return "unknown yet"
        seconds_per_step = (time.monotonic() - begun) / (step - first)
        return format_duration((self.steps - step) * seconds_per_step)

    def say(self, words: str) -> None:
        """Show a line of its own."""
        line = f"{self.name}  {words}"
        if self.bar is not None:
            self._show(self.bar.console.print, line, highlight=False)
        else:
            self._show(click.echo, line, err=True)


class Silent(Report):
    """Shows of a run only what the user must know at once."""

    def __enter__(self) -> Self:
        self.live = False
        return self

    def show_row(self, step: int, loss: float, rate: float, speed: str) -> None:
        """Show nothing: metrics.csv has the row."""

    def say(self, words: str) -> None:
        if words.startswith(URGENT):
            super().say(words)


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
        console=Console(stderr=True),
    )
