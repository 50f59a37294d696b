"""The threads that make the bytes of an output's arrays and write each in its place.

As the bytes pass they are hashed, and numbers that no model should hold are counted.
"""

from __future__ import annotations

import errno
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from growkit.checkpoint.hashes import begin_hash, hash_file
from growkit.checkpoint.numbers import Findings
from growkit.checkpoint.raw import read_pieces
from growkit.checkpoint.tensor import Recipe
from growkit.errors import GrowkitError

# Bytes read and written at once. Two threads with pieces of 1 MB take 0.6x the time of `cp`.
PIECE = 1 << 20
THREADS = 2
ZEROS = memoryview(bytes(PIECE))
# What a file system says that cannot reserve blocks: some network ones, ZFS.
NO_RESERVING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """One array of an output: its recipes, end to end, and where their bytes belong.

    slot: params, mu, nu, or '' for a counter. file, offset: the open file and the byte of it.
    summed: whether the file states the CRC-32 of the array, of one recipe then.
    """

    slot: str
    name: str
    recipes: tuple[Recipe, ...]
    file: int
    offset: int
    summed: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(recipe.size for recipe in self.recipes)

    @property
    def key(self) -> tuple[str, str]:
        return self.slot, self.name


@dataclass
class Filled:
    """What is known of the arrays once they are written.

    hashes, checksums: (slot, name) -> the hash, the CRC-32 where it was asked for.
    """

    hashes: dict[tuple[str, str], str] = field(default_factory=dict)
    checksums: dict[tuple[str, str], int] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)


@contextmanager
def collect_jobs() -> Iterator[list[Job]]:
    """An empty list for jobs, whose files are closed at the end."""
    jobs: list[Job] = []
    try:
        yield jobs
    finally:
        for file in {job.file for job in jobs}:
            os.close(file)


def create_file(path: Path, size: int) -> int:
    """Open a new file of `size` bytes with all its blocks reserved; returns the file descriptor.

    Reserving finds a full disk before any work is done. Raises GrowkitError then. Where blocks
    cannot be reserved (macOS, some network file systems), the file is only made as long.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    if size == 0:
        return file
    try:
        _reserve(file, size)
    except OSError as problem:
        import shutil

        os.close(file)
        free = shutil.disk_usage(path.parent).free
        raise GrowkitError(
            f"cannot write {path.name} of {size / 1e6:,.1f} MB: {problem.strerror}, "
            f"{free / 1e6:,.1f} MB are free; nothing is left behind"
        ) from None
    return file


def _reserve(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            # Unlike ftruncate it takes the blocks, so the disk cannot be full later.
            os.posix_fallocate(file, 0, size)
            return
        except OSError as problem:
            if problem.errno not in NO_RESERVING:
                raise
    os.ftruncate(file, size)


def fill(jobs: list[Job], progress: Progress | None = None) -> Filled:
    """Make the bytes of all jobs with two threads, in pieces of 1 MiB, and write each in its place.

    progress: told the number of bytes after each piece. The largest jobs come first, so that both
    threads end together. Jobs of one size alternate between files, because writes to one file wait
    for each other.
    """
    from concurrent.futures import ThreadPoolExecutor, wait

    # popleft of a deque is atomic: the threads need no lock of their own.
    queue = deque(sorted(jobs, key=lambda job: (-job.size, job.offset)))
    stop = threading.Event()
    report = progress or (lambda done: None)
    filled = Filled()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            workers = [pool.submit(_work, queue, stop, report, filled) for _ in range(THREADS)]
            # The kernel may deliver a signal to another thread; this one handles it on waking up.
            while wait(workers, timeout=0.1).not_done:
                pass
            for worker in workers:
                worker.result()
        finally:
            stop.set()
    return filled


def _work(queue: deque[Job], stop: threading.Event, progress: Progress, filled: Filled) -> None:
    """Write jobs from the queue until it is empty or another thread failed."""
    buffer = np.empty(PIECE, np.uint8)
    try:
        while not stop.is_set():
            try:
                job = queue.popleft()
            except IndexError:
                return
            for done in _write(job, buffer, filled):
                progress(done)
                if stop.is_set():
                    return
    except BaseException:
        stop.set()
        raise


def _write(job: Job, buffer: np.ndarray, filled: Filled) -> Iterator[int]:
    """Write one job, hash and look at its bytes; yields the number of bytes after each piece."""
    passed = _Passed(job)
    begin = 0
    for recipe in job.recipes:
        for offset, array in _make_pieces(recipe, buffer):
            # Flat and contiguous, because pwrite takes bytes; an array that is so already is not
            # copied.
            data = np.ascontiguousarray(array).reshape(-1)
            view = data.view(np.uint8).data
            _write_at(job.file, view, job.offset + begin + offset)
            filled.findings.look(job.slot, job.name, data)
            passed.follow(view, begin + offset)
            yield len(view)
        if recipe.is_zeros:
            # A new file holds zeros already. They are not read again for their hash: that would
            # take memory for pages of a file that has none yet.
            for start in range(begin, begin + recipe.size, PIECE):
                passed.follow(ZEROS[: begin + recipe.size - start], start)
            yield recipe.size
        begin += recipe.size
    filled.hashes[job.key] = passed.find_hash()
    if job.summed:
        filled.checksums[job.key] = passed.find_sum()


class _Passed:
    """The hash of a job's bytes and, where it is asked for, their CRC-32, as they pass."""

    def __init__(self, job: Job):
        self.job = job
        self.hasher = begin_hash()
        self.known = find_checksum(job.recipes[0]) if job.summed else None
        self.sums = job.summed and self.known is None
        self.checksum = 0
        self.done = 0

    def follow(self, view: memoryview, at: int) -> None:
        """Take a piece that begins at byte `at`, if it comes in turn.

        Pieces of one stretch come in order, those of copies may not.
        """
        if at != self.done:
            return
        self.hasher.update(view)
        if self.sums:
            self.checksum = zlib.crc32(view, self.checksum)
        self.done += len(view)

    @property
    def in_order(self) -> bool:
        """Whether all pieces came in the order in which they lie.

        Others are read again, still in memory.
        """
        return self.done == self.job.size

    def find_hash(self) -> str:
        job = self.job
        if self.in_order:
            return self.hasher.hexdigest()
        return hash_file(job.file, job.offset, job.size)

    def find_sum(self) -> int:
        if self.known is not None:
            return self.known
        if self.in_order:
            return self.checksum
        return _sum_file(self.job.file, self.job.offset, self.job.size)


def find_checksum(recipe: Recipe) -> int | None:
    """The CRC-32 of what a recipe makes, where it is known before: of a copy, of zeros.

    zlib makes 2.2 GB/s of them on one core, a copy 1.5: most of growth in depth does without.
    """
    if recipe.copied is not None:
        return recipe.copied.checksum
    return _sum_zeros(recipe.size) if recipe.is_zeros else None


@lru_cache(maxsize=256)
def _sum_zeros(size: int) -> int:
    checksum = 0
    for start in range(0, size, PIECE):
        checksum = zlib.crc32(ZEROS[: size - start], checksum)
    return checksum


def _sum_file(file: int, offset: int, size: int) -> int:
    """The CRC-32 of `size` bytes at `offset` of an open file."""
    checksum = 0
    for start in range(0, size, PIECE):
        checksum = zlib.crc32(os.pread(file, min(PIECE, size - start), offset + start), checksum)
    return checksum


def _make_pieces(recipe: Recipe, buffer: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(byte offset, array) of every piece that must be written."""
    if recipe.copied is not None:
        # One buffer for each thread, reused, so that it stays in the cache.
        for offset, piece in read_pieces(recipe.copied, buffer):
            yield offset, piece.view(recipe.dtype)
    elif recipe.pieces is not None:
        yield from recipe.pieces()


def _write_at(file: int, view: memoryview, offset: int) -> None:
    """Write all bytes at an offset; the system may take several calls for that."""
    # pwrite may write less than asked: up to 2 GiB at a time on Linux, less on a signal.
    while view:
        count = os.pwrite(file, view, offset)
        view = view[count:]
        offset += count
