"""What all verbs show alike: bars of progress, outputs being written under one, counts as they grow, JSON.

Knows the terminal; leaves what is shown and what is written to the verbs.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from math import isfinite
from pathlib import Path


@contextmanager
def progress_bar(what: str, total: int):
    """A bar of bytes on a terminal, nothing elsewhere; yields the function that advances it."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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


def write(source, contents, out: Path, kind: str, force: bool, *shard: int) -> None:
    """Write the contents made of a source to `out`, a bar of bytes on the terminal; see `growkit.checkpoint`."""
    from growkit.checkpoint import write_output

    # Orbax imports jax; an output is written by this machine's processor, whatever else it has.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with progress_bar("writing", contents.size) as progress:
        write_output(out, kind, contents, source, force, progress, *shard)


@contextmanager
def counter(what: str):
    """A live line of documents and tokens on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.status import Status

    with Status(what, console=Console(stderr=True)) as status:
        yield lambda documents, tokens, size: status.update(
            f"{what}: {documents:,} documents, {tokens:,} tokens, {size / 1e6:,.1f} MB of text"
        )


def json_text(value: dict) -> str:
    """One JSON document; numbers that are not finite are null there, JSON having no other word for them."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value
