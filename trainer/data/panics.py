"""Calls into the tokenizers library, whose Rust code panics on some tokenizers and texts.

A panic prints lines of its own to standard error, past Python, and is raised as an exception that
is not an Exception. Here it becomes a GrowkitError, and the lines are dropped.
"""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO

from growkit.errors import GrowkitError, first_line


@contextmanager
def explain_panics(where: str) -> Iterator[None]:
    """Raise GrowkitError, with `where` as its subject, where the library panics in the block."""
    standard_error = _divert_standard_error()
    panicked = False
    try:
        yield
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        panicked = True
        raise GrowkitError(
            f"{where} fails in the tokenizers library: {first_line(problem)}"
        ) from None
    finally:
        _restore_standard_error(standard_error, show=not panicked)


@cache
def _open_held() -> IO[bytes]:
    """Where standard error goes while it is held back."""
    held = tempfile.TemporaryFile()  # noqa: SIM115, because it stays open until the end
    atexit.register(held.close)
    return held


def _divert_standard_error() -> int | None:
    """Hold back what is written to standard error; returns its descriptor, None if it is closed."""
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:
        return None
    os.dup2(_open_held().fileno(), 2)
    return kept


def _restore_standard_error(kept: int | None, show: bool) -> None:
    """Undo `_divert_standard_error`, and show or drop what was written."""
    if kept is None:
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    os.dup2(kept, 2)
    os.close(kept)
    held = _open_held()
    size = os.fstat(held.fileno()).st_size
    if not size:
        return
    content = os.pread(held.fileno(), size, 0)
    os.ftruncate(held.fileno(), 0)
    # Both descriptors share one position, and the next writer begins there.
    os.lseek(held.fileno(), 0, os.SEEK_SET)
    if show:
        os.write(2, content)
