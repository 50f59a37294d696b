"""A run's directory: the configuration it was begun with, and whether a command may go on in it.

Knows config.yaml (the resolved configuration, and the source it began from), the lock that keeps a second
process out, and how files in RUN are replaced whole; leaves what is trained to the loop.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from typing import IO, Any

import yaml
from etils import epath

from growkit import __version__
from growkit.checkpoint.files import is_remote
from growkit.checkpoint.tensor import Source
from growkit.errors import GrowkitError, UsageError
from growkit.models.architecture import Architecture
from trainer.config.sections import Config, build_section, resolve, resolve_model
from trainer.devices.hosts import is_writer, write_once

CONFIG = "config.yaml"
LOCK = ".lock"
# Values that may differ between a run and its resumption: they change what is kept and shown and which devices
# compute, never what is trained.
CHANGEABLE = ("mesh", "attention", "remat", "checkpoint", "eval", "log")


def lock_run(directory: epath.Path) -> IO[str] | None:
    """Keep other processes from training into RUN, until the file returned is closed or this process ends.

    None for a bucket, which nothing holds, and for the other processes of the same run. Raises GrowkitError when
    another process holds RUN.
    """
    if is_remote(directory) or not is_writer():
        return None
    # Opened for appending: opening must not erase the holder's process id.
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
        # A file system without locks (some network ones): train without.
        return file
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def find_changed_keys(before: dict[str, Any], after: dict[str, Any], where: str = "") -> list[str]:
    """The dotted keys in which two resolved configurations differ, those that may change left out."""
    changed = []
    for key in sorted(before.keys() | after.keys()):
        if not where and key in CHANGEABLE:
            continue
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and not where.startswith("data."):
            changed += find_changed_keys(old, new, f"{where}{key}.")
        elif old != new:
            changed.append(f"{where}{key}")
    return changed


def require_same_run(
    stored: dict[str, Any], config: Config, start: str | None, source: Source | None
) -> None:
    """Raise UsageError, naming the keys, when a run that exists was begun with another configuration or source."""
    changed = [
        f"{key} ({_at(stored['config'], key)} then, {_at(config.to_dict(), key)} now)"
        for key in find_changed_keys(stored["config"], config.to_dict())
    ]
    origin = stored["from"] or {}
    if origin.get("path") != start or (
        source and origin and origin["fingerprint"] != source.fingerprint
    ):
        changed.append("--from")
    if changed:
        raise UsageError(
            f"this run was begun with other values of {', '.join(changed)}, which may not change when it is resumed; "
            f"name another --out, or give the values that its {CONFIG} holds"
        )


def _at(values: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        values = values.get(part)
    return values


def fill_model(values: dict[str, Any], model: Architecture, origin: str) -> dict[str, Any]:
    """Nested configuration values with the model section filled from a source's model.

    Raises UsageError where the values state another model; the context alone may differ.
    """
    stated = resolve_model(values.get("model"))
    theirs = dataclasses.asdict(build_section(model))
    different = [key for key in stated if key != "context" and stated[key] != theirs[key]]
    if different:
        said = ", ".join(
            f"{key} is {stated[key]} in the one and {theirs[key]} in the other" for key in different
        )
        raise UsageError(
            f"the configuration is for another model than {origin}: {said}; "
            f"leave its model section out to take the source's (the preset 'recipe' has none)"
        )
    return values | {"model": theirs | stated}


def read_run(out: str | os.PathLike) -> dict[str, Any] | None:
    """What RUN/config.yaml holds, or None for a new run. Raises UsageError when `out` is something else."""
    directory = epath.Path(out)
    path = directory / CONFIG
    if path.exists():
        try:
            stored = yaml.safe_load(path.read_text())
            # Resolved once more: a key that this version of growkit added has its default.
            return {"from": stored["from"], "config": resolve(stored["config"]).to_dict()}
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, UsageError):
            raise UsageError(
                f"{path} is not the configuration of a run; name another --out"
            ) from None
    if directory.exists() and (not directory.is_dir() or any(_visible(directory))):
        raise UsageError(f"{out} exists and is not a run; name another --out")
    return None


def _visible(directory: epath.Path) -> list[str]:
    """What lies in a directory beside a lock and the parts of files that a killed run leaves."""
    return [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]


def open_run(
    directory: epath.Path, config: Config, start: str | None, source: Source | None, resumes: bool
) -> IO[str] | None:
    """Make RUN and write its configuration, or check that the one there is the same. `start` is --from as given.

    resumes: whether RUN has a checkpoint to go on from; where it has none, another configuration begins anew.

    Returns what `lock_run` does. Raises UsageError, or GrowkitError when another process trains into RUN.
    """
    read_run(directory)
    directory.mkdir(parents=True, exist_ok=True)
    held = lock_run(directory)
    # Read only now: what was there before the lock may be another process's beginning.
    stored = read_run(directory)
    if stored is not None and resumes:
        require_same_run(stored, config, start, source)
    origin = (
        {"path": start, "fingerprint": source.fingerprint}
        if source
        else stored["from"]
        if stored
        else None
    )
    described = {"growkit": __version__, "from": origin, "config": config.to_dict()}
    write_once(directory / CONFIG, yaml.safe_dump(described, sort_keys=False).encode())
    return held
