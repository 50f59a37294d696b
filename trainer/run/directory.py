"""A run's directory: whether a command may go on in it, and what a run has open there.

RUN/config.yaml         the resolved configuration, and the source the run began with
RUN/metrics.csv         a row every few steps
RUN/experts.jsonl       the load of each expert of a mixture; see `trainer.log.load`
RUN/checkpoints/STEP/   see `trainer.run.checkpoint`
RUN/damaged/STEP/       see `trainer.run.damage`
RUN/.lock               held while a process trains into RUN
"""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

import yaml
from etils import epath

from growkit import __version__
from growkit.checkpoint.files import is_remote, refuse_pointer
from growkit.checkpoint.tensor import Source
from growkit.errors import GrowkitError, UsageError
from trainer.config.sections import Config, resolve
from trainer.config.values import load_yaml
from trainer.devices.hosts import is_writer, write_once
from trainer.log.history import History
from trainer.run.checkpoint import Checkpoints, find_last_step, put_back_replaced
from trainer.run.damage import Trust, find_broken_files, go_back

CONFIG = "config.yaml"
LOCK = ".lock"
# Keys that people change to train a run on for longer, or at another rate.
SCHEDULES = ("schedule.", "optimizer.learning_rate")
# Sections that may differ between a run and its resumption: they change what is kept and shown,
# and which devices compute, but not what is trained.
CHANGEABLE = ("mesh", "attention", "remat", "loss_chunk", "checkpoint", "eval", "log")


@dataclass(frozen=True)
class StoredRun:
    """What RUN/config.yaml says: how the run was begun.

    origin: {"path", "fingerprint"} of the source, None for a new model.
    """

    config: Config
    origin: dict[str, Any] | None


@dataclass(frozen=True)
class RunDirectory:
    """What a run has open in its directory.

    lock: None in a bucket, and in processes that do not write. notes: what was done about damaged
    checkpoints, in words.
    """

    path: epath.Path
    checkpoints: Checkpoints
    history: History
    lock: IO[str] | None
    notes: tuple[str, ...] = ()

    def close(self) -> None:
        """Wait for what is being saved, then let other processes in.

        After a failure nobody calls this; the end of the process unlocks RUN.
        """
        self.checkpoints.close()
        self.unlock()

    def unlock(self) -> None:
        """Let other processes in at once."""
        if self.lock is not None:
            self.lock.close()


def read_run(out: str | os.PathLike[str]) -> StoredRun | None:
    """The run in the directory `out`, or None for a new one.

    Raises UsageError when something other than a run is there, GrowkitError for a Git LFS pointer.
    """
    directory = epath.Path(out)
    path = directory / CONFIG
    if path.exists():
        content = path.read_bytes()
        refuse_pointer(content, path)
        try:
            stored = load_yaml(content.decode())
            # A key that this version of growkit added takes its default.
            return StoredRun(resolve(stored["config"]), stored["from"])
        except (yaml.YAMLError, ValueError, TypeError, KeyError, UsageError):
            raise UsageError(
                f"{path} is not the configuration of a run; name another --out"
            ) from None
    if directory.exists() and (not directory.is_dir() or _list_visible(directory)):
        raise UsageError(f"{out} exists and is not a run; name another --out")
    return None


def _list_visible(directory: epath.Path) -> list[str]:
    """What is in a directory apart from the lock and the half-written files of a killed run."""
    return [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]


def open_run(
    path: epath.Path,
    config: Config,
    start: str | None,
    source: Source | None,
    trust: Trust | None = None,
) -> RunDirectory:
    """Make RUN and write its configuration, or check that RUN was begun with the same one.

    start: --from, as given. Where RUN has no checkpoint yet, the run begins anew, whatever the
    configuration was before. trust: whether checkpoints whose small files are damaged are set
    aside, and new ones brought to the disk. Raises UsageError, or GrowkitError when another process
    trains into RUN, or a checkpoint is damaged.
    """
    trust = trust or Trust()
    path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as on_failure:
        lock = lock_run(path)
        if lock is not None:
            on_failure.callback(lock.close)
        # Read only now: before the lock, another process may have been about to begin.
        stored = read_run(path)
        resumes = stored is not None and find_last_step(path) is not None
        if stored is not None and resumes:
            require_same_run(stored, config, start, source, path)
            put_back_replaced(path)
        broken = find_broken_files(path)
        notes = go_back(path, broken, trust.from_last_whole) if broken else []
        origin = stored.origin if stored is not None and resumes else None
        if source is not None:
            origin = {"path": start, "fingerprint": source.fingerprint}
        content = {"growkit": __version__, "from": origin, "config": config.to_dict()}
        # On every start, so that the file has the keys of the version that trains now.
        write_once(path / CONFIG, yaml.safe_dump(content, sort_keys=False).encode())
        checkpoints = Checkpoints(path, config.checkpoint, trust.sync)
        opened = RunDirectory(path, checkpoints, History(path), lock, tuple(notes))
        on_failure.pop_all()
    return opened


def lock_run(directory: epath.Path) -> IO[str] | None:
    """Keep other processes from training into RUN.

    Until the returned file is closed, or this process ends. None for a bucket, which cannot be
    locked, and for the other processes of the same run. Raises GrowkitError when another process
    has locked RUN.
    """
    if is_remote(directory) or not is_writer():
        return None
    # Opened for appending, because opening must not erase the process id of the one that holds it.
    file = open(directory / LOCK, "a+")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise GrowkitError(
            f"process {holder or 'of another command'} is training into {directory}; "
            f"wait until it ends, or name another --out"
        ) from None
    except OSError:
        # A file system without locks, as some network ones are: train without one.
        return file
    # Only now that the lock is ours: the id before it may be of a process that still trains.
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def require_same_run(
    stored: StoredRun, config: Config, start: str | None, source: Source | None, out: epath.Path
) -> None:
    """Raise UsageError, naming the keys, when a run was begun otherwise, or from another source."""
    before = stored.config.to_dict()
    now = config.to_dict()
    changed = [
        f"{key} ({_find_value(before, key)} then, {_find_value(now, key)} now)"
        for key in find_changed_keys(before, now)
    ]
    origin = stored.origin or {}
    another_path = origin.get("path") != start
    another_model = source is not None and origin and origin["fingerprint"] != source.fingerprint
    if another_path or another_model:
        changed.append("--from")
    if changed:
        raise UsageError(
            f"this run was begun with other values of {', '.join(changed)}, which may not change "
            f"when it is resumed; name another --out, or give the values that its {CONFIG} holds"
            f"{_suggest_branch(changed, out)}"
        )


def _suggest_branch(changed: list[str], out: epath.Path) -> str:
    """A clause that says how to train on by another schedule, where that is what changed."""
    if not any(key.startswith(SCHEDULES) for key in changed):
        return ""
    return (
        f"; to train its model on by another schedule or learning rate, begin a new run with "
        f"--from {out}, or lower the rate to its end with `growkit anneal {out}`"
    )


def find_changed_keys(before: dict[str, Any], after: dict[str, Any], where: str = "") -> list[str]:
    """The dotted keys in which two resolved configurations differ, without those that may change.

    where: the section that both are of, with a dot at its end.
    """
    changed = []
    for key in sorted(before.keys() | after.keys()):
        if not where and key in CHANGEABLE:
            continue
        old = before.get(key)
        new = after.get(key)
        # The sections of data have paths for keys, so they are compared whole.
        whole = where.startswith("data.")
        if isinstance(old, dict) and isinstance(new, dict) and not whole:
            changed += find_changed_keys(old, new, f"{where}{key}.")
        elif old != new:
            changed.append(f"{where}{key}")
    return changed


def _find_value(values: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        values = values.get(part)
    return values
