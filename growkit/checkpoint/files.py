"""Small files and the paths users type: read and write JSON, replace one file atomically.

A path may be on this machine or in a bucket (`gs://`, `s3://`, `az://`); both are handled alike.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from growkit.errors import GrowkitError

# Bytes of a JSON file at most. A checkpoint's `files` hold tokenizers, the largest of which have
# tens of megabytes.
JSON_LIMIT = 1 << 30
# How a file begins that stands for one in Git LFS, where that was not fetched.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def change_json(content: bytes, change: Callable[[Any], Any]) -> bytes:
    """The bytes of a JSON file whose value is changed.

    Byte for byte as they were where they are not JSON, or where nothing changes.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    changed = change(value)
    if changed == value:
        return content
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def parse_path(text: str) -> Any:
    """The path a user typed: a bucket's path for gs:// and the like, else one on this machine."""
    if not is_remote(text):
        return Path(os.path.expanduser(text))
    from etils import epath

    return epath.Path(text)


def refuse_pointer(content: bytes, path: object) -> None:
    """Raise GrowkitError for what stands for a file in Git LFS. content: how the file begins."""
    if content.startswith(LFS_POINTER):
        raise GrowkitError(
            f"{path} is a Git LFS pointer, not the file; `git lfs pull` fetches that"
        )


def find_real(path: Path) -> Path:
    """The path without links. One that leads to itself stays as it is; Path.resolve would raise."""
    return Path(os.path.realpath(path))


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a file for reading; returns the file descriptor.

    Raises GrowkitError for a pipe, a device and the like, which could block or never end, and
    OSError where there is nothing to open.
    """
    # O_NONBLOCK: opening a pipe would wait for a writer before its kind can be asked for.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(file).st_mode)
    if kind != stat.S_IFREG:
        os.close(file)
        raise GrowkitError(
            f"{os.fspath(path)} is {KINDS.get(kind, 'no file')}; growkit reads plain files only"
        )
    return file


def read_regular(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """All bytes of a plain file on this machine, of `limit` bytes at most.

    Raises GrowkitError for anything else.
    """
    try:
        with open(open_regular(path), "rb") as file:
            # One byte more than allowed tells a file of the limit's size from a longer one.
            content = file.read(limit + 1)
    except OSError as problem:
        raise GrowkitError(f"cannot read {path}: {problem.strerror}") from None
    if len(content) > limit:
        raise GrowkitError(f"{path} has more than the {limit:,} bytes that growkit reads of it")
    return content


def read_json(path: Path, limit: int = JSON_LIMIT) -> Any:
    """The content of a JSON file. Raises GrowkitError if it cannot be read or is not JSON."""
    try:
        content = path.read_bytes() if is_remote(path) else read_regular(path, limit)
        refuse_pointer(content, path)
        return json.loads(content.decode())
    except OSError as problem:
        raise GrowkitError(f"cannot read {path}: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise GrowkitError(f"{path} is not valid JSON: {problem}") from None


def encode_json(value: Mapping[str, Any] | list[Any]) -> bytes:
    """JSON as growkit writes it: indented by two spaces, with a newline at the end."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_atomically(path: Any, content: bytes) -> None:
    """Replace a file: readers see the old content or the new one, even after a power cut.

    The new content is on the disk before it takes the name, and the name before this returns. A
    bucket stores an object whole or not at all, so there the file is written directly.
    """
    if is_remote(path):
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.part")
    # What a killed process left there may be a link to somewhere else; it is never written through.
    with suppress(FileNotFoundError):
        os.unlink(part)
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with open(file, "wb") as writer:
        writer.write(content)
        writer.flush()
        os.fsync(writer.fileno())
    # rename(2) replaces in one step: a reader sees the old file or the new one.
    part.replace(path)
    sync_directory(path.parent)


def sync_file(path: str | os.PathLike[str]) -> None:
    """Bring the bytes of a file to the disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Bring the names in a directory to the disk, where its file system can do that."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Some network file systems and FUSE know no fsync of a directory.
        with suppress(OSError):
            os.fsync(file)
    finally:
        os.close(file)


def holds_nonfinite(value: Any) -> bool:
    """Whether there is an infinity or NaN anywhere in a value."""
    if isinstance(value, dict):
        return any(holds_nonfinite(part) for part in value.values())
    if isinstance(value, list):
        return any(holds_nonfinite(part) for part in value)
    return isinstance(value, float) and not math.isfinite(value)


def replace_nonfinite(value: Any) -> Any:
    """The value with None in place of infinities and NaN, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [replace_nonfinite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
