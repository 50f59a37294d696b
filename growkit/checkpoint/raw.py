"""Raw bytes of files, read at an offset; and whether a file is still the one that was opened.

Arrays that have hashes on record are hashed as their bytes pass, so that comparing them takes no
second read: a model larger than memory would come from the disk twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

import numpy as np

from growkit.checkpoint.files import open_regular
from growkit.checkpoint.hashes import PIECE, begin_hash
from growkit.errors import GrowkitError

# What tells that a file is another one or was written to: device, inode, size, and the times of
# the last change of its bytes and of its inode. The last cannot be set back.
Stamp = tuple[int, int, int, int, int]


class Passing:
    """The hash of an array in a file, made of its bytes as they are read for another end.

    offset, size: where the array lies in the file, in bytes. was_read: whether any of it was read.
    """

    def __init__(self, offset: int, size: int, algorithm: str) -> None:
        self.offset = offset
        self.size = size
        self.hashed = 0
        self.was_read = False
        self._hasher = begin_hash(algorithm)
        self._lock = Lock()

    def see(self, data: memoryview, offset: int) -> None:
        """Hash the bytes that come next, of those read at an offset of the file."""
        self.was_read = True
        with self._lock:
            first = self.offset + self.hashed - offset
            if not 0 <= first < len(data):
                return
            part = data[first : self.offset + self.size - offset]
            self._hasher.update(part)
            self.hashed += len(part)

    def finish(self, span: Span) -> str:
        """The hash of the whole array, at `span`; what did not pass in order is read now."""
        buffer = memoryview(bytearray(min(PIECE, self.size)))
        with open_span(span) as file:
            while self.hashed < self.size:
                at = self.offset + self.hashed
                piece = buffer[: self.offset + self.size - at]
                read_into(file, piece, at, span.path)
                self.see(piece, at)
        return self._hasher.hexdigest()


@dataclass(frozen=True)
class Span:
    """Raw bytes in C order: `size` bytes at `offset` of a file.

    stamp: of the file when its header was read. Whoever reads the span compares it. checksum: the
    CRC-32 of its bytes where the file states one. passing: of the array that it is of, or a part
    of; told what is read.
    """

    path: Path
    offset: int
    size: int
    stamp: Stamp | None = None
    checksum: int | None = None
    passing: Passing | None = field(default=None, compare=False, repr=False)

    def part(self, start: int, size: int) -> Span:
        """`size` bytes of it, from its byte `start`."""
        return replace(self, offset=self.offset + start, size=size, checksum=None)


@dataclass(frozen=True)
class Finish:
    """The hash of an array at a span, made as it is read; the rest is read when it is asked for."""

    passing: Passing
    span: Span

    @property
    def was_read(self) -> bool:
        """Whether any of the array was read, for another end than its hash."""
        return self.passing.was_read

    def __call__(self) -> str:
        return self.passing.finish(self.span)


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


def read_pieces(span: Span, buffer: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(byte offset, bytes) of a span, piece by piece, each in the buffer until the next.

    buffer: uint8, as long as a piece.
    """
    with open_span(span) as file:
        for start in range(0, span.size, len(buffer)):
            piece = buffer[: span.size - start]
            read_into(file, piece.data, span.offset + start, span.path)
            if span.passing:
                span.passing.see(piece.data, span.offset + start)
            yield start, piece


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
    if span.passing:
        span.passing.see(buffer[: span.size], span.offset)
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
