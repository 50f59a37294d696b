"""Output directories that appear whole or not at all, and the threads that fill their files.

The work is done in a hidden directory beside the output, under a lock, and renamed into place on a
clean exit. What a killed command left there is removed by the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from growkit.checkpoint.tensor import Recipe, Span
from growkit.errors import GrowkitError, UsageError

# Bytes read and written at once. Two threads with pieces of 1 MB take 0.6x the time of `cp`.
PIECE = 1 << 20
THREADS = 2
# --force replaces only a directory that holds one of these, never somebody's home directory.
MARKS = ("config.json", "_CHECKPOINT_METADATA", "manifest.json", "config.yaml")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """One recipe, and the open file and byte offset where its bytes belong."""

    recipe: Recipe
    file: int
    offset: int


def check_output(out: Path, source: Path | None, force: bool) -> None:
    """Raise UsageError if `out` must not be written.

    It must not exist (without force), and it must not be, hold or lie within the source. With force
    it must be a model or an empty directory.
    """
    if source is not None:
        _refuse_source(out, source)
    _refuse_existing(out, force)
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError(
            f"the output is not a directory, and --force replaces directories only: {out}"
        )
    if any(out.iterdir()) and not any((out / mark).exists() for mark in MARKS):
        raise UsageError(
            f"the output is neither empty nor a model, so --force does not replace it: {out}"
        )


def _refuse_source(out: Path, source: Path) -> None:
    """Raise UsageError if writing `out` could change the source."""
    here = out.resolve()
    there = source.resolve()
    if here == there:
        raise UsageError(
            f"the output is the source: {out}; the source is never written to, name another "
            "directory"
        )
    # Files may be links, as in the Hub's cache; what they point to belongs to the source as well.
    protected = [there]
    if source.is_dir():
        protected += [file.resolve() for file in source.iterdir() if file.is_symlink()]
    holds_source = any(here in (path, *path.parents) for path in protected)
    if there in here.parents or holds_source:
        raise UsageError(
            f"the output {out} and the source {source} lie one within the other; name another "
            "directory"
        )


def _refuse_existing(out: Path, force: bool) -> None:
    if os.path.lexists(out) and not force:
        raise UsageError(
            f"the output exists: {out}; use --force to replace it, or name another directory"
        )


@contextmanager
def commit_output(out: Path, force: bool = False) -> Iterator[Path]:
    """Yield a path for the new directory (not made yet); rename it to `out` on a clean exit.

    After a failure nothing is left, and an old output is as it was. Raises UsageError if another
    process is writing the same output, GrowkitError if it cannot be written.
    """
    work = out.parent / f".{out.name}.partial"
    new_parents = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire_lock(work)
    except OSError as problem:
        _remove_empty(new_parents)
        raise GrowkitError(f"cannot write {out}: {problem.strerror}") from None
    try:
        _clear(work, out)
        _refuse_existing(out, force)
        yield work / "new"
        _refuse_existing(out, force)
        _move_into_place(work, out)
    except OSError as problem:
        raise GrowkitError(f"cannot write {out}: {problem.strerror or problem}") from problem
    finally:
        _put_back(work, out)
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)
        _remove_empty(new_parents)


def _acquire_lock(work: Path) -> int:
    """Make (or take over) the working directory and lock it. The kernel unlocks it when we die."""
    with suppress(FileExistsError):
        os.mkdir(work)
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process that held the lock before may have removed the directory since; then this
        # lock is on a directory that is gone.
        if not os.path.exists(work) or not os.path.samestat(os.fstat(lock), os.stat(work)):
            raise BlockingIOError
    except BlockingIOError:
        os.close(lock)
        raise UsageError(f"another process is writing this output: {work} is in use") from None
    return lock


def _clear(work: Path, out: Path) -> None:
    """Empty a working directory that a killed command left."""
    _put_back(work, out)
    for left in work.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _move_into_place(work: Path, out: Path) -> None:
    """Rename the new directory to the output, after moving an old one away."""
    if os.path.lexists(out):
        os.rename(out, work / "old")
    os.rename(work / "new", out)


def _put_back(work: Path, out: Path) -> None:
    """Restore the old output if a command stopped after moving it away and before replacing it."""
    if not os.path.lexists(out) and (work / "old").exists():
        os.rename(work / "old", out)


def _remove_empty(parents: list[Path]) -> None:
    """Remove the parent directories that were made for an output, innermost first, if empty."""
    for parent in parents:
        with suppress(OSError):
            parent.rmdir()


def create_file(path: Path, size: int) -> int:
    """Open a new file of `size` bytes with all its blocks reserved; returns the file descriptor.

    Reserving finds a full disk before any work is done. Raises GrowkitError then.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    if size == 0:
        return file
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as problem:
        os.close(file)
        free = shutil.disk_usage(path.parent).free
        raise GrowkitError(
            f"cannot write {path.name} of {size / 1e6:,.1f} MB: {problem.strerror}, "
            f"{free / 1e6:,.1f} MB are free; nothing is left behind"
        ) from None
    return file


def fill(jobs: list[Job], progress: Progress | None = None) -> None:
    """Make the bytes of all jobs with two threads, in pieces of 1 MiB, and write each in its place.

    progress: told the number of bytes after each piece. The largest jobs come first, so that both
    threads end together. Jobs of one size alternate between files, because writes to one file wait
    for each other.
    """
    queue = deque(sorted(jobs, key=lambda job: (-job.recipe.size, job.offset)))
    stop = threading.Event()
    report = progress or (lambda done: None)
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            workers = [pool.submit(_work, queue, stop, report) for _ in range(THREADS)]
            # The kernel may deliver a signal to another thread; this one handles it on waking up.
            while wait(workers, timeout=0.1).not_done:
                pass
            for worker in workers:
                worker.result()
        finally:
            stop.set()


def _work(queue: deque[Job], stop: threading.Event, progress: Progress) -> None:
    """Write jobs from the queue until it is empty or another thread failed."""
    buffer = memoryview(bytearray(PIECE))
    opened: dict[Path, int] = {}
    try:
        while not stop.is_set():
            try:
                job = queue.popleft()
            except IndexError:
                return
            for done in _write(job, buffer, opened):
                progress(done)
                if stop.is_set():
                    return
    except BaseException:
        stop.set()
        raise
    finally:
        for file in opened.values():
            os.close(file)


def _write(job: Job, buffer: memoryview, opened: dict[Path, int]) -> Iterator[int]:
    """Write one job; yields the number of bytes after each piece."""
    if job.recipe.copied is not None:
        yield from _copy(job.recipe.copied, job, buffer, opened)
    elif job.recipe.pieces is not None:
        for offset, array in job.recipe.pieces():
            view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            _write_at(job.file, view, job.offset + offset)
            yield len(view)
    else:
        # A new file holds zeros already.
        yield job.recipe.size


def _copy(span: Span, job: Job, buffer: memoryview, opened: dict[Path, int]) -> Iterator[int]:
    """Copy a span to the job's place. opened: file descriptors of sources, kept for later jobs."""
    if span.path not in opened:
        opened[span.path] = os.open(span.path, os.O_RDONLY)
    done = 0
    while done < span.size:
        piece = buffer[: min(PIECE, span.size - done)]
        count = os.preadv(opened[span.path], [piece], span.offset + done)
        if count == 0:
            raise GrowkitError(f"{span.path} ended while it was being read; was it written to?")
        _write_at(job.file, piece[:count], job.offset + done)
        done += count
        yield count


def _write_at(file: int, view: memoryview, offset: int) -> None:
    """Write all bytes at an offset; the system may take several calls for that."""
    while view:
        count = os.pwrite(file, view, offset)
        view = view[count:]
        offset += count
