"""What is in a token file, found at its first use and remembered after that.

Reading all of it finds a file that is not what its manifest says, and the ids that it has. The
result lies in the user's cache directory; it holds as long as the files have the size, times and
inode that they had.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint.files import encode_json, write_atomically
from growkit.errors import GrowkitError, UsageError
from trainer.data.tokens import MANIFEST, TokenFile

CACHE = "GROWKIT_CACHE_DIR"  # names another cache directory

_BYTES_AT_ONCE = 1 << 24
_SAID_FROM = 4 << 30  # bytes that take long enough to read for a line about it
# A file that is written to again within the clock's tick keeps its times. Those of a file that is
# as young as this are not trusted (git calls such files racy).
_YOUNG = 2.0  # seconds


@dataclass(frozen=True)
class Content:
    """The ids that occur in a token file, and the sha256 of both its files."""

    lowest: int
    highest: int
    bin_sha256: str
    idx_sha256: str


def check_content(token_file: TokenFile) -> Content:
    """Find what is in a token file, and compare it with the manifest.

    Reads the whole file unless that was done before. Raises GrowkitError where the manifest says
    otherwise.
    """
    stamps = _stamp(token_file)
    content = _recall(token_file, stamps)
    if content is None:
        _announce(token_file)
        content = examine(token_file)
        changed = _stamp(token_file) != stamps
        if changed:
            raise GrowkitError(f"{token_file.name} was written to while it was read; try again")
        _remember(token_file, stamps, content)
    _compare(token_file, content)
    return content


def verify(token_file: TokenFile) -> None:
    """Read both files whole and compare their sha256 with the manifest's.

    Raises GrowkitError when they differ, UsageError when there is no manifest to compare with.
    """
    if token_file.manifest is None:
        raise UsageError(
            f"only data with a {MANIFEST} can be verified, and {token_file.name} has none"
        )
    _compare(token_file, examine(token_file))


def examine(token_file: TokenFile) -> Content:
    """Read a token file from its first byte to its last, in bounded memory."""
    digest = hashlib.sha256()
    lowest: list[int] = []
    highest: list[int] = []
    # A whole number of ids of any size.
    buffer = bytearray(_BYTES_AT_ONCE // 8 * 8)
    with open(token_file.bin_path, "rb", buffering=0) as file:
        while count := _fill(file, buffer):
            part = memoryview(buffer)[:count]
            digest.update(part)
            ids = np.frombuffer(part, token_file.dtype)
            lowest.append(int(ids.min()))
            highest.append(int(ids.max()))
    with open(token_file.index_path, "rb") as file:
        index = hashlib.file_digest(file, "sha256").hexdigest()
    return Content(min(lowest), max(highest), digest.hexdigest(), index)


def _fill(file: Any, buffer: bytearray) -> int:
    """Read until the buffer is full or the file ends; returns how many bytes there are."""
    view = memoryview(buffer)
    count = 0
    while count < len(buffer) and (read := file.readinto(view[count:])):
        count += read
    return count


def _compare(token_file: TokenFile, content: Content) -> None:
    manifest = token_file.manifest or {}
    for path, key in ((token_file.bin_path, "bin"), (token_file.index_path, "idx")):
        expected = manifest.get(f"{key}_sha256")
        found = getattr(content, f"{key}_sha256")
        if expected not in (None, found):
            raise GrowkitError(
                f"{path} has changed since it was made: its sha256 is {found[:16]}..., and the "
                f"manifest says {expected[:16]}...; tokenize the text again, or take the file from "
                f"where it was copied"
            )


def _announce(token_file: TokenFile) -> None:
    size = token_file.tokens.nbytes
    if size >= _SAID_FROM:
        words = f"reading {token_file.name} ({size / 1e9:.1f} GB) once, to check it"
        print(words, file=sys.stderr, flush=True)


def _stamp(token_file: TokenFile) -> list[list[int]]:
    """What changes when a file is written to or replaced: size, times and inode, of both files."""
    stats = [os.stat(path) for path in (token_file.bin_path, token_file.index_path)]
    return [
        [each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino, each.st_dev]
        for each in stats
    ]


def _find_entry(token_file: TokenFile) -> Path:
    """The file that remembers what is in a token file. Raises RuntimeError without a home."""
    home = os.environ.get(CACHE)
    if home:
        caches = Path(home)
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "growkit"
    name = os.path.realpath(token_file.bin_path)
    return caches / "tokens" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def _recall(token_file: TokenFile, stamps: list[list[int]]) -> Content | None:
    """What was found before, if the files are those that it was found of."""
    try:
        entry = json.loads(_find_entry(token_file).read_bytes())
        content = Content(**entry["content"])
        current = entry["stamps"] == stamps and entry["dtype"] == token_file.dtype.str
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, RecursionError):
        return None
    types = [type(value) for value in dataclasses.astuple(content)]
    return content if current and types == [int, int, str, str] else None


def _remember(token_file: TokenFile, stamps: list[list[int]], content: Content) -> None:
    """Write what was found to the cache, where there is one that can be written to."""
    newest = max(time_ns for stamp in stamps for time_ns in stamp[1:3])
    if time.time() - newest / 1e9 < _YOUNG:
        return
    entry = {
        "path": os.path.realpath(token_file.bin_path),
        "dtype": token_file.dtype.str,
        "stamps": stamps,
        "content": dataclasses.asdict(content),
    }
    with suppress(OSError, RuntimeError):
        path = _find_entry(token_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, encode_json(entry))
