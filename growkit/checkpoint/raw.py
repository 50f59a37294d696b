"""Raw bytes of files, read at an offset; and whether a file is still the one that was opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from growkit.checkpoint.files import open_regular
from growkit.errors import GrowkitError

# What tells that a file is another one or was written to: device, inode, size, and the times of
# the last change of its bytes and of its inode. The last cannot be set back.
Stamp = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Span:
    """Raw bytes in C order: `size` bytes at `offset` of a file.

    stamp: of the file when its header was read. Whoever reads the span compares it. checksum: the
    CRC-32 of its bytes where the file states one.
    """

    path: Path
    offset: int
    size: int
    stamp: Stamp | None = None
    checksum: int | None = None

    def part(self, start: int, size: int) -> Span:
        """`size` bytes of it, from its byte `start`."""
        return replace(self, offset=self.offset + start, size=size, checksum=None)


@contextmanager
def open_span(span: Span) -> Iterator[int]:
    """The file of a span, open for reading. Raises GrowkitError if it is not as it was."""
    file = open_regular(span.path)
    try:
        if span.stamp is not None and stamp_of(os.fstat(file)) != span.stamp:
            raise say_changed(span.path)
        yield file
    finally:
        os.close(file)


def read_into(file: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer of bytes from an offset of a file. Raises GrowkitError if it ends before."""
    done = 0
    while done < len(buffer):
        count = _read_some(file, buffer[done:], offset + done)
        # 0 bytes mean the end of the file and nothing else; short reads are common on network
        # disks.
        if count == 0:
            raise GrowkitError(
                f"{path} ended at byte {offset + done:,} while it was being read; was it written "
                "to?"
            )
        done += count


def _read_some(file: int, buffer: memoryview, offset: int) -> int:
    """Read up to a buffer's length; returns the number of bytes, 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [buffer], offset)
    # Some systems have no preadv: one copy more.
    data = os.pread(file, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def read_span(span: Span, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array at a span, in memory of its own. Raises GrowkitError if the file is too short."""
    array = np.empty(shape, dtype)
    buffer = array.reshape(-1).view(np.uint8).data
    with open_span(span) as file:
        read_into(file, buffer[: span.size], span.offset, span.path)
    return array


def read_stamp(path: Path) -> Stamp:
    """The stamp of the file that a path leads to."""
    return stamp_of(os.stat(path))


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp in what the system says of a file."""
    # Nanoseconds, as the kernel gives them: floats of seconds would round 2026 to 0.2 microseconds.
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return status.st_dev, status.st_ino, status.st_size, *times


def say_changed(path: Path) -> GrowkitError:
    return GrowkitError(
        f"the source changed while it was being read: {path}; run the command again"
    )
