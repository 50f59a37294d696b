"""Buckets (gs://, s3://, az://): what is read there is first brought here, what is written is sent when it is whole.

A bucket has no offsets to write at, no rename and no lock; a copy here has, at the price of as much local disk
(in TMPDIR) for as long as the command runs. What makes a directory load is sent last. Knows etils' paths, which
need gcsfs for gs:// and s3fs for s3://.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from growkit.checkpoint.huggingface import INDEX
from growkit.checkpoint.orbax import COMMITTED
from growkit.errors import GrowkitError, UsageError

# A directory without these is none that loads, to growkit, Orbax or transformers.
LAST = ("_METADATA", COMMITTED, "_CHECKPOINT_METADATA", INDEX, "config.json")
PIECE = 16 << 20


@contextmanager
def explain_failures(path: Any) -> Iterator[None]:
    """Storage fails in as many ways as there are libraries for it; a user needs one sentence."""
    try:
        yield
    except GrowkitError:
        raise
    except ImportError as problem:
        scheme = os.fspath(path).split("://")[0]
        package = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}.get(
            scheme, f"fsspec's library for {scheme}://"
        )
        raise GrowkitError(
            f"{path} needs a library that is not installed: pip install {package}"
        ) from problem
    except Exception as problem:
        words = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        raise GrowkitError(f"cannot reach {path}: {words[:300]}") from problem


def download(path: Any) -> Path:
    """A copy on this machine of a directory in a bucket, removed when the process ends."""
    here = Path(tempfile.mkdtemp(prefix="growkit-"))
    atexit.register(shutil.rmtree, here, ignore_errors=True)
    with explain_failures(path):
        for file in _files(path):
            copy = here / Path(*file.relative_to(path).parts)
            copy.parent.mkdir(parents=True, exist_ok=True)
            _copy(file, copy)
    return here


def check_free(out: Any, force: bool) -> None:
    """Raise UsageError when there is something at `out` and it is not to be replaced."""
    with explain_failures(out):
        if not force and out.exists():
            raise UsageError(
                f"the output exists: {out}; use --force to replace it, or name another directory"
            )


def upload(here: Path, out: Any, force: bool) -> None:
    """Copy a whole directory to a bucket; after a failure what was sent is removed again.

    Replacing is not atomic there: the old one is removed first.
    """
    check_free(out, force)
    with explain_failures(out):
        if out.exists():
            out.rmtree()
        try:
            for file in sorted((file for file in here.rglob("*") if file.is_file()), key=_order):
                copy = out.joinpath(*file.relative_to(here).parts)
                copy.parent.mkdir(parents=True, exist_ok=True)
                _copy(file, copy)
        except BaseException:
            out.rmtree(missing_ok=True)
            raise


def _order(file: Path) -> tuple[int, str]:
    return (LAST.index(file.name) + 1 if file.name in LAST else 0), str(file)


def _files(path: Any) -> Iterator[Any]:
    for child in path.iterdir():
        if child.is_dir():
            yield from _files(child)
        else:
            yield child


def _copy(source: Any, target: Any) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, PIECE)
