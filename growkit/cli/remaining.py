"""How far a model is with the texts it scores, and how long it will take for the others.

The time left is that of the tokens left at the speed so far. Texts are scored longest first, so
that a share of the texts would overstate it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from growkit.cli.output import is_quiet

LINE_EVERY = 30.0  # seconds between two lines where there is no terminal
MINUTE = 60
HOUR = 60 * MINUTE


class Remaining:
    """What is done of some texts. clock: seconds, from any origin."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.expect(0, 0)

    def expect(self, texts: int, tokens: int) -> None:
        """Begin with so many texts, of so many tokens together."""
        self.texts = texts
        self.tokens = tokens
        self.texts_done = 0
        self.tokens_done = 0
        self.begun = self.clock()

    def advance(self, texts: int, tokens: int) -> None:
        """Count what was scored. A model that pads may count more tokens than it has."""
        self.texts_done += texts
        self.tokens_done = min(self.tokens_done + tokens, self.tokens)

    def estimate_seconds(self) -> float | None:
        """Seconds until all is scored; None before anything is."""
        if not self.tokens_done:
            return None
        passed = self.clock() - self.begun
        return passed * (self.tokens - self.tokens_done) / self.tokens_done

    def describe(self) -> str:
        """As: 1,024 of 3,912 texts, 4 min left."""
        words = f"{self.texts_done:,} of {self.texts:,} texts"
        seconds = self.estimate_seconds()
        return words if seconds is None else f"{words}, {format_seconds(seconds)} left"


def format_seconds(seconds: float) -> str:
    """A time in one or two units: 40 s, 4 min, 2 h 5 min."""
    whole = round(seconds)
    if whole < MINUTE:
        return f"{whole} s"
    minutes = round(seconds / MINUTE)
    if minutes < HOUR // MINUTE:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, HOUR // MINUTE)
    return f"{hours} h {minutes} min"


@contextmanager
def show_remaining(words: str, model: Any) -> Iterator[None]:
    """Show how far a model is while it scores: a bar on a terminal, elsewhere a line now and then,
    and nothing with --quiet.

    words: what is scored. model: a `growkit.evaluation.harness.WindowedModel`.
    """
    if is_quiet():
        yield
        return
    remaining = Remaining()
    show = _show_bar if sys.stderr.isatty() else _print_lines
    with show(words, remaining) as update:

        def advance(texts: int, tokens: int) -> None:
            remaining.advance(texts, tokens)
            update()

        model.expect = remaining.expect
        model.advance = advance
        yield
    del model.expect, model.advance


@contextmanager
def _print_lines(words: str, remaining: Remaining) -> Iterator[Callable[[], None]]:
    """A line every half minute, the first after that time."""
    last = remaining.clock()

    def update() -> None:
        nonlocal last
        if remaining.clock() - last >= LINE_EVERY:
            last = remaining.clock()
            click.echo(f"{words}: {remaining.describe()}", err=True)

    yield update


@contextmanager
def _show_bar(words: str, remaining: Remaining) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(words, total=None, state="")

        def update() -> None:
            progress.update(
                task,
                total=remaining.tokens,
                completed=remaining.tokens_done,
                state=remaining.describe(),
            )

        yield update
