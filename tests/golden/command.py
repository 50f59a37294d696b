"""The code under test, reached by its command line alone."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def command(arguments: Sequence[str]) -> None:
    """Run a command of growkit in this process.

    Raises RuntimeError, with the last line of what it said, when it fails.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from growkit.cli import run

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run(list(arguments))
    if code:
        last = said.getvalue().strip().splitlines()[-1:]
        raise RuntimeError(f"growkit {' '.join(arguments)}: exit code {code}: {' '.join(last)}")


def attempted(make: Callable[[], dict[str, Any]], root: Path) -> dict[str, Any]:
    """What `make` makes, or {"failed": words} where a command fails or its output cannot be read.

    root: the directory of this record, which is no part of the words.
    """
    try:
        return make()
    except (RuntimeError, OSError, LookupError, ValueError) as problem:
        words = f"{type(problem).__name__}: {problem}"
        return {"failed": words.replace(str(root), "ROOT")}
