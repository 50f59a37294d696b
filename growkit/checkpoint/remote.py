"""Buckets (gs://, s3://, az://): download what is read, upload what was written once it is whole.

A bucket has no writes at an offset, no rename and no lock. A local copy has all three, and takes
as much local disk (in TMPDIR) for as long as the command runs. The files that make a directory load
are uploaded last. Access is through etils' paths, which need gcsfs for gs:// and s3fs for s3://.
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
from growkit.errors import GrowkitError, UsageError, first_line

# Without these a directory does not load in growkit, Orbax or transformers. Uploaded in this order.
LAST = ("_METADATA", COMMITTED, "_CHECKPOINT_METADATA", INDEX, "config.json", ".metadata")
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
# Bytes copied at once.
PIECE = 16 << 20


@contextmanager
def explain_failures(path: Any) -> Iterator[None]:
    """Turn whatever a storage library raises into a GrowkitError of one sentence about `path`."""
    try:
        yield
    except GrowkitError:
        raise
    except ImportError as problem:
        scheme = os.fspath(path).split("://")[0]
        package = PACKAGES.get(scheme, f"fsspec's library for {scheme}://")
        raise GrowkitError(
            f"{path} needs a library that is not installed: pip install {package}"
        ) from problem
    except Exception as problem:
        raise GrowkitError(f"cannot reach {path}: {first_line(problem)}") from problem


def download(path: Any) -> Path:
    """A local copy of a directory in a bucket, removed when the process ends."""
    here = Path(tempfile.mkdtemp(prefix="growkit-"))
    atexit.register(shutil.rmtree, here, ignore_errors=True)
    with explain_failures(path):
        for file in _list_files(path):
            copy = here / Path(*file.relative_to(path).parts)
            copy.parent.mkdir(parents=True, exist_ok=True)
            _copy(file, copy)
    return here


def check_free(out: Any, force: bool) -> None:
    """Raise UsageError if there is something at `out`, unless force is given."""
    with explain_failures(out):
        if not force and out.exists():
            raise UsageError(
                f"the output exists: {out}; use --force to replace it, or name another directory"
            )


def upload(here: Path, out: Any, force: bool) -> None:
    """Copy a local directory to a bucket; after a failure, remove what was uploaded.

    Replacing is not atomic in a bucket: the old directory is removed first.
    """
    check_free(out, force)
    files = [file for file in here.rglob("*") if file.is_file()]
    with explain_failures(out):
        if out.exists():
            out.rmtree()
        try:
            for file in sorted(files, key=_upload_order):
                copy = out.joinpath(*file.relative_to(here).parts)
                copy.parent.mkdir(parents=True, exist_ok=True)
                _copy(file, copy)
        # Ctrl-C too: half a model must not stay under the output's name.
        except BaseException:
            out.rmtree(missing_ok=True)
            raise


def _upload_order(file: Path) -> tuple[int, str]:
    """A sort key: first by name, then what makes the directory load."""
    place = LAST.index(file.name) + 1 if file.name in LAST else 0
    return place, str(file)


def _list_files(path: Any) -> Iterator[Any]:
    """Every file below a directory of a bucket."""
    for child in path.iterdir():
        if child.is_dir():
            yield from _list_files(child)
        else:
            yield child


def _copy(source: Any, target: Any) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, PIECE)
