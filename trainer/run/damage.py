"""Checkpoints of a run that are not what was saved: found, named, and set aside when asked to.

A checkpoint is whole when its marker is there, its small files are JSON of the right form, and
everything that has a hash on record has it still. What is damaged is never removed: with
--from-last-whole it is moved to RUN/damaged, and the run goes on from the last whole checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from etils import epath

from growkit.checkpoint.carried import decode_files
from growkit.checkpoint.files import is_remote, refuse_pointer
from growkit.checkpoint.hashes import HASHES, find_changed, read_hashes
from growkit.checkpoint.kinds import FINISHED, STATE
from growkit.checkpoint.location import CHECKPOINTS
from growkit.checkpoint.orbax import FILES, META, open_checkpoint
from growkit.checkpoint.tensor import Source
from growkit.errors import GrowkitError, UsageError, first_line
from growkit.forms import check_record

DAMAGED = "damaged"  # the directory in RUN
METRICS = "metrics"  # Orbax's own item, which is there where a checkpoint was validated


class DamagedError(GrowkitError):
    """A checkpoint is not what was saved."""

    def __init__(self, step: int, words: str) -> None:
        super().__init__(words)
        self.step = step


@dataclass(frozen=True)
class Trust:
    """How careful a run is with what lies on disk.

    verify: whether the model or the checkpoint that it goes on from must have the hashes on record.
    from_last_whole: whether to go back to the last whole checkpoint where later ones are damaged.
    sync: whether a checkpoint is on the disk, and not only in the system's memory, before it counts
    as finished.
    """

    verify: bool = True
    from_last_whole: bool = False
    sync: bool = True

    def require_whole(self, source: Source) -> None:
        """Raise GrowkitError for a source whose bytes are not those that were written."""
        if self.verify:
            source.require_whole()


def list_steps(run: epath.Path) -> list[int]:
    """The steps of the finished checkpoints, in order."""
    directory = run / CHECKPOINTS
    # A new run has none, and does without importing Orbax.
    if not directory.exists() or not any(directory.iterdir()):
        return []
    import orbax.checkpoint as ocp

    return sorted(ocp.utils.checkpoint_steps(directory))


def read_item(checkpoint: Any, item: str) -> Any:
    """A JSON item of a checkpoint. Raises ValueError naming the file where it is damaged."""
    path = checkpoint / item / (METRICS if item == METRICS else "metadata")
    try:
        text = path.read_text()
        refuse_pointer(text.encode(), path)
        content = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as problem:
        raise ValueError(f"{path} cannot be read ({problem.strerror})") from None
    except GrowkitError as problem:
        raise ValueError(str(problem)) from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: it is not JSON") from None
    if not _has_form(content, item):
        raise ValueError(f"{path} is damaged: it is not what a run writes there")
    return content


def _has_form(content: Any, item: str) -> bool:
    """Whether a JSON item holds what a run writes there."""
    if not isinstance(content, dict):
        return False
    if item == META:
        kinds = {"config": dict, "lineage": list, "record": dict}
        whole = all(isinstance(content.get(key), kind) for key, kind in kinds.items())
        # A key that no version writes, in the place of the one of hashes, is a damaged one.
        lost = HASHES not in content and content.keys() - kinds.keys()
        return whole and not lost and _is_record(content["record"])
    if item == METRICS:
        return isinstance(content.get("validation_loss"), int | float)
    try:
        decode_files(content)
    except (GrowkitError, AttributeError, KeyError, TypeError, ValueError):
        return False
    return True


def _is_record(record: dict[str, Any]) -> bool:
    """Whether this is a position that a run can go on from."""
    try:
        check_record(record)
    except (KeyError, ValueError):
        return False
    return True


def find_broken_file(checkpoint: Any) -> str | None:
    """What is wrong with the small files of a checkpoint, in words that begin with the file."""
    if not is_remote(checkpoint) and not (checkpoint / FINISHED).exists():
        return f"{checkpoint} is not a whole checkpoint: it has no {FINISHED}"
    if not (checkpoint / STATE).exists():
        return f"{checkpoint / STATE} is missing"
    try:
        for item in (META, FILES):
            read_item(checkpoint, item)
        if (checkpoint / METRICS).exists():
            read_item(checkpoint, METRICS)
    except ValueError as problem:
        return str(problem)
    return None


def find_broken_files(run: epath.Path) -> dict[int, str]:
    """What is wrong with small files, in words, by the step of the checkpoint."""
    found = {step: find_broken_file(run / CHECKPOINTS / str(step)) for step in list_steps(run)}
    return {step: words for step, words in found.items() if words is not None}


def find_damage(checkpoint: Any) -> str | None:
    """What is wrong with a checkpoint, in words; reads all of it. None for nothing."""
    broken = find_broken_file(checkpoint)
    if broken is not None:
        return broken
    meta = read_item(checkpoint, META)
    try:
        hashes = read_hashes(meta, checkpoint)
    except GrowkitError as problem:
        return str(problem)
    if hashes is not None:
        files = decode_files(read_item(checkpoint, FILES))
        changed = find_changed(hashes, {}, files, meta)
        if changed:
            return f"{changed} of {checkpoint} is not what was saved"
    if is_remote(checkpoint):
        return None
    try:
        open_checkpoint(Path(checkpoint)).require_whole()
    except GrowkitError as problem:
        return str(problem)
    except Exception as problem:  # a damaged array may raise anything in the library that reads it
        return f"{checkpoint} cannot be read ({first_line(problem)})"
    return None


def find_last_whole(run: epath.Path, besides: Collection[int]) -> int | None:
    """The step of the last checkpoint that is whole, those of some steps not looked at."""
    for step in reversed(list_steps(run)):
        if step not in besides and find_damage(run / CHECKPOINTS / str(step)) is None:
            return step
    return None


def go_back(run: epath.Path, damaged: dict[int, str], allowed: bool) -> list[str]:
    """Set the damaged checkpoints aside, and all after the last whole one, where that is allowed.

    damaged: what is wrong with a checkpoint, in words, by its step. Returns what was done, in
    words. Raises DamagedError where it is not allowed, or no checkpoint is whole.
    """
    # The latest one, which a user expects to go on from.
    step, words = max(damaged.items())
    last = find_last_whole(run, damaged)
    if last is None:
        raise DamagedError(
            step, f"{words}; no other checkpoint of {run} is whole: begin again with another --out"
        )
    if not allowed:
        raise DamagedError(
            step,
            f"{words}; the last checkpoint that is whole is {run}@{last}, and --from-last-whole "
            f"goes on from there",
        )
    if jax.process_count() > 1:
        raise UsageError(
            f"--from-last-whole moves checkpoints, which one process must do alone: {words}; move "
            f"what is after {run}@{last} out of {run / CHECKPOINTS} by hand"
        )
    # Later ones too: they follow from what is damaged, or would be taken for the last.
    return [set_aside(run, each) for each in list_steps(run) if each > last or each in damaged] + [
        f"going on from {run}@{last}, the last checkpoint that is whole"
    ]


def set_aside(run: epath.Path, step: int) -> str:
    """Move a checkpoint to RUN/damaged; returns that in words."""
    directory = run / DAMAGED
    directory.mkdir(parents=True, exist_ok=True)
    taken = {entry.name for entry in directory.iterdir()}
    # Damaged at the same step before: 40, 40.1, 40.2.
    names = (f"{step}.{number}" if number else str(step) for number in range(len(taken) + 1))
    target = directory / next(name for name in names if name not in taken)
    (run / CHECKPOINTS / str(step)).rename(target)
    return f"the checkpoint of step {step} is set aside, in {target}"
