"""What verbs show alike: progress bars, outputs written under one, growing counts, and text from a
model's files without what would move a terminal's cursor.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from growkit.cli.options import combine_options
from growkit.cli.output import is_quiet
from growkit.errors import UsageError

if TYPE_CHECKING:
    from growkit.checkpoint.location import Care
    from growkit.checkpoint.tensor import Contents, Source

Command = TypeVar("Command", bound=Callable[..., Any])
# Called with the documents, tokens and bytes of text that are done.
Counter = Callable[[int, int, int], None]

LINE_EVERY = 30.0  # seconds
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB|B)?")
# Characters of one line, and lines of one text, that are shown of what a model's files say.
LONGEST_LINE = 2000
MOST_LINES = 10_000
# Control characters (escape sequences move cursors and rename windows), marks that turn the
# direction of writing, and halves of pairs, which no terminal can be given.
UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@contextmanager
def show_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on a terminal, nothing elsewhere; yields the function that advances it."""
    if is_quiet() or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def add_shard_option(command: Command) -> Command:
    """The option of verbs that may write a Hugging Face directory; see `parse_shard_size`."""
    option = click.option(
        "--max-shard-size",
        "shard",
        metavar="SIZE",
        help="The most bytes in one file of a Hugging Face directory, as 500MB; default 5GB.",
    )
    return option(command)


# The options of all verbs that write a model; see `growkit.checkpoint.location.Care`.
add_care_options = combine_options(
    click.option(
        "--no-sync",
        is_flag=True,
        help="Do not wait until OUT is on the disk: faster, but a power cut may lose it.",
    ),
    click.option(
        "--no-verify",
        is_flag=True,
        help="Do not compare the source's bytes with the hashes that were saved with them.",
    ),
    click.option(
        "--strict",
        is_flag=True,
        help="Refuse NaN, infinities and negative second moments. Without it they are a warning.",
    ),
)


def parse_care(options: dict[str, Any]) -> Care:
    """Take the values of `add_care_options` out of a command's options."""
    from growkit.checkpoint.location import Care

    return Care(
        sync=not options.pop("no_sync"),
        verify=not options.pop("no_verify"),
        strict=options.pop("strict"),
    )


def parse_shard_size(text: str | None, kind: str) -> int:
    """'500MB' in bytes; the default for None.

    kind: of the output. Raises UsageError for text that is not a size, and for an output that is
    not a Hugging Face directory.
    """
    from growkit.checkpoint.huggingface import SHARD

    if text is None:
        return SHARD
    found = SIZE.fullmatch(text.strip().upper())
    if not found or float(found[1]) == 0:
        raise UsageError(f"--max-shard-size is a number with B, KB, MB or GB, as 5GB; got {text!r}")
    if kind == "checkpoint":
        raise UsageError(
            "--max-shard-size is for Hugging Face directories, and the output is a trainer "
            "checkpoint"
        )
    return int(float(found[1]) * UNITS[found[2] or "B"])


def write_with_progress(
    sources: Sequence[Source],
    contents: Contents,
    out: Path,
    kind: str,
    force: bool,
    shard: str | None = None,
    care: Care | None = None,
) -> None:
    """Write contents made of the sources to `out` under a progress bar; see `write_output`.

    Numbers that no model should hold are told on standard error.
    """
    from growkit.checkpoint.location import write_output

    size = parse_shard_size(shard, kind)
    with show_progress("writing", contents.size) as progress:
        findings = write_output(out, kind, contents, sources, force, progress, size, care)
    if findings:
        say(f"warning: {findings.describe()}; --strict refuses them", err=True)


def say(text: str, err: bool = False) -> None:
    """Print a text that may hold words from a model's files."""
    click.echo(clean(text), err=err)


def clean(text: str) -> str:
    """A text as a terminal may be given it: control characters spelled out, long lines cut."""
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"... {len(lines) - MOST_LINES:,} lines more"]
    return "\n".join(_clean_line(line) for line in lines)


def _clean_line(line: str) -> str:
    if len(line) > LONGEST_LINE:
        half = LONGEST_LINE // 2
        left_out = len(line) - 2 * half
        line = f"{line[:half]}... {left_out:,} characters more ...{line[-half:]}"
    return UNSHOWN.sub(lambda found: ascii(found[0])[1:-1], line)


@contextmanager
def show_counts(what: str) -> Iterator[Counter]:
    """Documents, tokens and speed as they grow; yields the function that is told the counts.

    A live line on a terminal, a line every half minute elsewhere.
    """
    if is_quiet():
        yield lambda documents, tokens, size: None
        return
    begun = time.monotonic()

    def describe(documents: int, tokens: int, size: int) -> str:
        megabytes = size / 1e6
        speed = megabytes / max(time.monotonic() - begun, 1e-9)
        return (
            f"{what}: {documents:,} documents, {tokens:,} tokens, {megabytes:,.1f} MB of text, "
            f"{speed:,.1f} MB/s"
        )

    def print_line(documents: int, tokens: int, size: int) -> None:
        print(describe(documents, tokens, size), file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        yield _limit_calls(print_line, LINE_EVERY, begun)
        return
    from rich.console import Console
    from rich.status import Status

    with Status(what, console=Console(stderr=True)) as status:
        yield lambda *counts: status.update(describe(*counts))


def _limit_calls(show: Counter, seconds: float, last: float) -> Counter:
    """The function, called at most once in so many seconds since `last`."""

    def show_sometimes(documents: int, tokens: int, size: int) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            show(documents, tokens, size)

    return show_sometimes
