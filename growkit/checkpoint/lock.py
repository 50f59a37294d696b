"""Who works in a directory: the kernel's locks, and process ids where a file system has no locks.

Lustre mounted without them, some NFS and some FUSE file systems have no flock.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

# Held by the trainer while it trains into a run; see `trainer.run.directory`.
RUN_LOCK = ".lock"


def try_lock(file: int) -> bool | None:
    """Lock an open file or directory until it is closed.

    Returns whether this process holds it now; None where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # ENOLCK, ENOTSUP and the like: a file system without locks.
    except OSError:
        return None
    return True


def describe_self() -> str:
    """'HOST PID' of this process, to be left where others look."""
    return f"{os.uname().nodename} {os.getpid()}"


def may_run(holder: str) -> bool:
    """Whether the process that `describe_self` described may be running still.

    One of another host may: this one cannot tell.
    """
    host, _, number = holder.strip().rpartition(" ")
    # Our own number in the file is from a process that is gone, or from this one.
    if not number.isdigit() or int(number) == os.getpid():
        return False
    if host and host != os.uname().nodename:
        return True
    try:
        # Signal 0 is not sent: the kernel only says whether the process exists.
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def find_trainer(path: Path) -> tuple[Path, str] | None:
    """(run, process id) of the trainer that trains into a directory or into one that holds it."""
    for run in (path, *path.absolute().parents[:2]):
        holder = _find_holder(run / RUN_LOCK)
        if holder is not None:
            return run if path.is_absolute() else Path(os.path.relpath(run)), holder
    return None


def _find_holder(path: Path) -> str | None:
    """The process id in a run's lock file, if a process holds it."""
    try:
        # No link is followed and no pipe waited for: the lock file lies where strangers may write.
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        held = try_lock(file)
        holder = os.read(file, 100).decode(errors="replace").strip()
    finally:
        os.close(file)
    if held is None:
        return holder if holder and may_run(holder) else None
    return holder if not held else None
