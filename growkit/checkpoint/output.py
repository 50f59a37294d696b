"""An output directory that appears whole or not at all, and the threads that fill its files.

The work is done in a hidden sibling directory under a lock, and renamed into place on a clean exit; what
a killed command left there is cleared by the next one. Knows bytes and directories; leaves formats to others.
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

PIECE = 1 << 20
THREADS = 2
# Only a directory with one of these is overwritten: --force is no licence to remove a home directory.
MARKS = ("config.json", "_CHECKPOINT_METADATA", "manifest.json", "config.yaml")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """One recipe and the place in an open file where its bytes belong."""

    recipe: Recipe
    file: int
    offset: int


def check_output(out: Path, source: Path | None, force: bool) -> None:
    """Raise UsageError when `out` must not be written: it exists, or it is or holds the source, or lies within it."""
    if source is not None:
        here, there = out.resolve(), source.resolve()
        if here == there:
            raise UsageError(
                f"the output is the source: {out}; the source is never written to, name another directory"
            )
        # Files of the source may be links, as in the Hub's cache: what they lead to is the source as well.
        linked = (
            [file.resolve() for file in source.iterdir() if file.is_symlink()]
            if source.is_dir()
            else []
        )
        if there in here.parents or any(here in (path, *path.parents) for path in (there, *linked)):
            raise UsageError(
                f"the output {out} and the source {source} lie one within the other; name another directory"
            )
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


@contextmanager
def commit_output(out: Path, force: bool = False) -> Iterator[Path]:
    """Yield a path for the new directory (not made yet); rename it to `out` on a clean exit, else leave nothing.

    Raises UsageError when another process is writing the same output.
    """
    work = out.parent / f".{out.name}.partial"
    parents = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire_lock(work)
    except OSError as problem:
        _remove_empty(parents)
        raise GrowkitError(f"cannot write {out}: {problem.strerror}") from None
    try:
        _clear(work, out)
        _refuse_existing(out, force)
        yield work / "new"
        _refuse_existing(out, force)
        if os.path.lexists(out):
            os.rename(out, work / "old")
        os.rename(work / "new", out)
    except OSError as problem:
        raise GrowkitError(f"cannot write {out}: {problem.strerror or problem}") from problem
    finally:
        _put_back(work, out)
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)
        _remove_empty(parents)


def _acquire_lock(work: Path) -> int:
    """Make (or take over) the working directory and hold its lock, which the kernel frees at our death."""
    with suppress(FileExistsError):
        os.mkdir(work)
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held the lock before may have removed the directory since: then this lock guards nothing.
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
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _put_back(work: Path, out: Path) -> None:
    """Give back the old output where a command failed, or was killed, between taking it away and the new one."""
    if not os.path.lexists(out) and (work / "old").exists():
        os.rename(work / "old", out)


def _refuse_existing(out: Path, force: bool) -> None:
    if os.path.lexists(out) and not force:
        raise UsageError(
            f"the output exists: {out}; use --force to replace it, or name another directory"
        )


def _remove_empty(parents: list[Path]) -> None:
    """Remove the parents that were made for an output, the innermost first, as far as they are empty."""
    for parent in parents:
        with suppress(OSError):
            parent.rmdir()


def create_file(path: Path, size: int) -> int:
    """Open a new file with all its blocks reserved, so that a full disk is found out before any work."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    if size:
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as problem:
            os.close(file)
            free = shutil.disk_usage(path.parent).free
            raise GrowkitError(
                f"cannot write {path.name} of {size / 1e6:,.1f} MB: {problem.strerror}, {free / 1e6:,.1f} MB are free; "
                f"nothing is left behind"
            ) from None
    return file


def fill(jobs: list[Job], progress: Progress | None = None) -> None:
    """Make the bytes of all jobs, two at a time, in pieces of 1 MiB, and write each at its place.

    The largest come first, so that both threads end together; those of one size go through all files before the next
    of a file, for writes to one file wait for each other.
    """
    todo = deque(sorted(jobs, key=lambda job: (-job.recipe.size, job.offset)))
    stop = threading.Event()
    progress = progress or (lambda done: None)
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            workers = [pool.submit(_work, todo, stop, progress) for _ in range(THREADS)]
            # A signal that the kernel gives to another thread is handled when this one next wakes up.
            while wait(workers, timeout=0.1).not_done:
                pass
            for worker in workers:
                worker.result()
        finally:
            stop.set()


def _work(todo: deque[Job], stop: threading.Event, progress: Progress) -> None:
    buffer = memoryview(bytearray(PIECE))
    opened: dict[Path, int] = {}
    try:
        while not stop.is_set():
            try:
                job = todo.popleft()
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
    if job.recipe.copied is not None:
        yield from _copy(job.recipe.copied, job, buffer, opened)
    elif job.recipe.pieces is not None:
        for offset, array in job.recipe.pieces():
            view = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            _pwrite(job.file, view, job.offset + offset)
            yield len(view)
    else:
        yield job.recipe.size


def _copy(span: Span, job: Job, buffer: memoryview, opened: dict[Path, int]) -> Iterator[int]:
    if span.path not in opened:
        opened[span.path] = os.open(span.path, os.O_RDONLY)
    done = 0
    while done < span.size:
        piece = buffer[: min(PIECE, span.size - done)]
        count = os.preadv(opened[span.path], [piece], span.offset + done)
        if count == 0:
            raise GrowkitError(f"{span.path} ended while it was being read; was it written to?")
        _pwrite(job.file, piece[:count], job.offset + done)
        done += count
        yield count


def _pwrite(file: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
