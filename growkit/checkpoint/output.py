"""Output directories that appear whole or not at all, also when the power fails.

The work is done in a hidden directory beside the output, `.OUT.partial`, under a lock. On a clean
exit every file is brought to the disk, then the names of the files; then the directory takes the
output's name, and that name is brought to the disk. This is the order of SQLite's commits. An old
output changes its name with the new one in one step of the kernel's. What a killed command left is
removed by the next one, which knows it by growkit's mark.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from growkit.checkpoint.files import find_real, sync_directory, sync_file
from growkit.checkpoint.lock import describe_self, find_trainer, may_run, try_lock
from growkit.checkpoint.replaceable import find_foreign
from growkit.errors import GrowkitError, UsageError

# Lies in every working directory: HOST PID of the process that made it.
MARK = ".growkit"
# What a working directory holds beside the mark.
NEW, OLD = "new", "old"
# Files brought to the disk side by side: a journal takes many in one transaction.
SYNC_THREADS = 8
# renameat2(2): swap two names.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def check_output(out: Path, source: Path | None, force: bool) -> None:
    """Raise UsageError if `out` must not be written.

    It must not exist (without force), and it must not be, hold or lie within the source. With force
    it must be an output of growkit's that no trainer holds, a model, or an empty directory.
    """
    if source is not None:
        _refuse_source(out, source)
    _refuse_existing(out, force)
    _refuse_trained(out)
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError(
            f"the output is not a directory, and --force replaces directories only: {out}"
        )
    foreign = find_foreign(out)
    if foreign:
        raise UsageError(
            f"the output is neither empty nor a model, so --force does not replace it: {out} "
            f"{foreign}"
        )


def _refuse_trained(out: Path) -> None:
    held = find_trainer(out)
    if held is not None:
        run, process = held
        raise UsageError(
            f"process {process or 'of another command'} is training into {run}, so {out} is not "
            "written; name another directory, or wait until it ends"
        )


def _refuse_source(out: Path, source: Path) -> None:
    """Raise UsageError if writing `out` could change the source."""
    here = find_real(out)
    there = find_real(source)
    if here == there:
        raise UsageError(
            f"the output is the source: {out}; the source is never written to, name another "
            "directory"
        )
    # Files may be links, as in the Hub's cache; what they point to belongs to the source as well.
    protected = [there]
    if source.is_dir():
        protected += [find_real(file) for file in source.iterdir() if file.is_symlink()]
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
def commit_output(out: Path, force: bool = False, sync: bool = True) -> Iterator[Path]:
    """Yield a path for the new directory (not made yet); rename it to `out` on a clean exit.

    After a failure nothing is left, and an old output is as it was. sync: whether everything is on
    the disk, and not only in the system's memory, when this returns. Raises UsageError if another
    process is writing the same output, GrowkitError if it cannot be written.
    """
    work = name_work(out)
    # Remembered before they are made, so that a failure can remove them and nothing else.
    new_parents = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(work)
    except OSError as problem:
        _remove_empty(new_parents)
        raise GrowkitError(f"cannot write {out}: {problem.strerror}") from None
    except UsageError:
        _remove_empty(new_parents)
        raise
    try:
        _clear(work, out)
        (work / MARK).write_text(describe_self())
        # Again, now that nobody else of growkit's can write it: the first look was before the lock.
        _refuse_existing(out, force)
        yield work / NEW
        # And once more: writing may have taken an hour, in which someone else made `out`.
        _refuse_existing(out, force)
        # First the bytes, then the name: a crash between them leaves no name with missing bytes.
        if sync and (work / NEW).is_dir():
            sync_tree(work / NEW)
        _move_into_place(work, out)
        if sync:
            _sync_names(out, work, new_parents)
    except OSError as problem:
        raise GrowkitError(f"cannot write {out}: {problem.strerror or problem}") from problem
    finally:
        # In this order: the old output is in `work` until it is put back.
        _put_back(work, out)
        _remove_work(work)
        os.close(lock)
        _remove_empty(new_parents)


def name_work(out: Path) -> Path:
    """The directory in which an output is made."""
    return out.parent / f".{out.name}.partial"


def find_left(out: Path) -> Path | None:
    """The old output that a command moved aside and did not live to replace, if there is one."""
    work = name_work(out)
    old = work / OLD
    return old if _is_marked(work) and old.is_dir() and not os.path.lexists(out) else None


def _acquire(work: Path) -> int:
    """Make (or take over) the working directory and lock it. The kernel unlocks it when we die.

    Returns the open directory. Raises UsageError for one that is in use, or is not growkit's.
    """
    with suppress(FileExistsError):
        # mkdir succeeds in one process only, whatever the file system has of locks.
        os.mkdir(work)
        # A directory without it that is not empty is somebody else's.
        (work / MARK).write_text(describe_self())
    try:
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        raise _say_foreign(work) from None
    try:
        held = try_lock(lock)
        # The process that held the lock before may have removed the directory since; then this
        # lock is on a directory that is gone.
        gone = not os.path.exists(work) or not os.path.samestat(os.fstat(lock), os.stat(work))
        if held is False or gone:
            raise UsageError(f"another process is writing this output: {work} is in use")
        if not _is_marked(work) and any(work.iterdir()):
            raise _say_foreign(work)
        if held is None:
            _refuse_running(work)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _is_marked(work: Path) -> bool:
    """Whether growkit made a working directory: its mark lies there, and neither is a link."""
    mark = work / MARK
    return not work.is_symlink() and mark.is_file() and not mark.is_symlink()


def _say_foreign(work: Path) -> UsageError:
    return UsageError(
        f"growkit works in {work}, and what is there is not growkit's (it lacks the file {MARK}); "
        "move it away, or name another output"
    )


def _refuse_running(work: Path) -> None:
    """Raise UsageError, on a file system without locks, if the one who made `work` may be alive."""
    holder = (work / MARK).read_text() if _is_marked(work) else ""
    if may_run(holder):
        raise UsageError(
            f"{work} is of a process that may be writing this output (host and process id: "
            f"{holder}), and this file system has no locks to tell; remove it once that has ended"
        )


def _clear(work: Path, out: Path) -> None:
    """Remove what a killed command left in a working directory. Nothing else is touched."""
    import shutil

    _put_back(work, out)
    for name in (NEW, OLD):
        left = work / name
        if left.is_symlink():
            left.unlink()
        elif left.exists():
            shutil.rmtree(left)


def _remove_work(work: Path) -> None:
    """Remove a working directory, and leave what growkit did not put there."""
    import shutil

    for name in (NEW, OLD):
        shutil.rmtree(work / name, ignore_errors=True)
    with suppress(OSError):
        # What growkit did not put there stays, and with it the directory: rmdir refuses a full one.
        if sorted(os.listdir(work)) == [MARK]:
            os.unlink(work / MARK)
        os.rmdir(work)


def _move_into_place(work: Path, out: Path) -> None:
    """Give the new directory the output's name; an old one is in `work` afterwards.

    Where the kernel swaps names, there is a whole output under this name at any moment.
    """
    if not os.path.lexists(out):
        os.rename(work / NEW, out)
    # Without renameat2 (macOS, old kernels) there is a moment without an output; `_put_back` undoes
    # a kill in that moment.
    elif not exchange(work / NEW, out):
        os.rename(out, work / OLD)
        os.rename(work / NEW, out)


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two directories in one step; False where the system cannot do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None or not os.path.lexists(one):
        return False
    paths = (os.fsencode(one), os.fsencode(other))
    return bool(rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0)


def _put_back(work: Path, out: Path) -> None:
    """Restore the old output if a command stopped after moving it away and before replacing it."""
    if _is_marked(work) and not os.path.lexists(out) and (work / OLD).exists():
        os.rename(work / OLD, out)


def _remove_empty(parents: list[Path]) -> None:
    """Remove the parent directories that were made for an output, innermost first, if empty."""
    for parent in parents:
        with suppress(OSError):
            parent.rmdir()


def sync_tree(path: Path) -> None:
    """Bring all files below a directory to the disk, then the names in it, innermost first."""
    from concurrent.futures import ThreadPoolExecutor

    files: list[str] = []
    directories: list[str] = []
    for directory, _, names in os.walk(path):
        directories.append(directory)
        files += [os.path.join(directory, name) for name in names]
    with ThreadPoolExecutor(SYNC_THREADS) as pool:
        list(pool.map(sync_file, files))
    for directory in reversed(directories):
        sync_directory(directory)


def _sync_names(out: Path, work: Path, new_parents: list[Path]) -> None:
    """Bring the output's name to the disk, those of parents made for it, and an old one's."""
    sync_directory(out.parent)
    sync_directory(work)
    for parent in new_parents:
        sync_directory(parent.parent)
