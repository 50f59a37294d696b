"""What all verbs show alike: bars of progress, outputs being written under one, counts as they grow, JSON.

Knows the terminal; leaves what is shown and what is written to the verbs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from math import isfinite
from pathlib import Path

import click

LINE_EVERY = 30.0  # seconds


@contextmanager
def show_progress(what: str, total: int):
    """A bar of bytes on a terminal, nothing elsewhere; yields the function that advances it."""
    if not sys.stderr.isatty():
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


def add_shard_option(command):
    """The option of verbs that may write a Hugging Face directory; `parse_shard_size` reads its value."""
    return click.option(
        "--max-shard-size", "shard", metavar="SIZE",
        help="Bytes that a file of a Hugging Face directory holds at most, as 500MB; 5GB by default.",
    )(command)  # fmt: skip


def parse_shard_size(text: str | None, kind: str) -> int:
    """'500MB' in bytes. Raises UsageError for what is no size, and for an output that is no Hugging Face directory."""
    import re

    from growkit.checkpoint.huggingface import SHARD
    from growkit.errors import UsageError

    if text is None:
        return SHARD
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB|B)?", text.strip().upper())
    if not found or float(found[1]) == 0:
        raise UsageError(f"--max-shard-size is a number with B, KB, MB or GB, as 5GB; got {text!r}")
    if kind != "huggingface":
        raise UsageError(
            "--max-shard-size is for Hugging Face directories, and the output is a trainer checkpoint"
        )
    return int(
        float(found[1])
        * {"B": 1, None: 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[found[2]]
    )


def write_with_progress(sources, contents, out: Path, kind: str, force: bool, shard: str | None = None) -> None:
    """Write the contents made of the sources to `out`, a bar of bytes on the terminal; see `growkit.checkpoint`."""
    from growkit.checkpoint.location import write_output

    # Orbax imports jax; an output is written by this machine's processor, whatever else it has.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with show_progress("writing", contents.size) as progress:
        write_output(out, kind, contents, sources, force, progress, parse_shard_size(shard, kind))


@contextmanager
def show_counts(what: str):
    """Documents, tokens and speed as they grow: a live line on a terminal, a line every half minute elsewhere."""
    begun = time.monotonic()

    def words(documents: int, tokens: int, size: int) -> str:
        speed = size / 1e6 / max(time.monotonic() - begun, 1e-9)
        return f"{what}: {documents:,} documents, {tokens:,} tokens, {size / 1e6:,.1f} MB of text, {speed:,.1f} MB/s"

    if not sys.stderr.isatty():
        yield _every(
            LINE_EVERY, begun, lambda *counts: print(words(*counts), file=sys.stderr, flush=True)
        )
        return
    from rich.console import Console
    from rich.status import Status

    with Status(what, console=Console(stderr=True)) as status:
        yield lambda *counts: status.update(words(*counts))


def _every(seconds: float, last: float, show: Callable[..., None]) -> Callable[..., None]:
    """The function, called at most once in so many seconds since `last`."""

    def shown(*values) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            show(*values)

    return shown


def format_json(value: dict) -> str:
    """One JSON document; numbers that are not finite are null there, JSON having no other word for them."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value
