"""A run's checkpoints: saved by Orbax in the background, whole or not at all, restored to the bit.

A checkpoint holds a `Snapshot`, in the layout that `growkit.checkpoint.orbax` describes, and the
hashes of all of it (`trainer.run.hashed`). Which checkpoints stay on disk is the section
`checkpoint`'s to say; when to save is the loop's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import jax
from etils import epath
from jax.experimental import multihost_utils

from growkit.checkpoint.carried import decode_files, encode_files
from growkit.checkpoint.files import is_remote
from growkit.checkpoint.hashes import HASHES, find_changed, read_hashes
from growkit.checkpoint.kinds import STATE
from growkit.checkpoint.location import CHECKPOINTS
from growkit.checkpoint.orbax import FILES, META
from growkit.errors import GrowkitError, first_line
from growkit.lineage import Lineage
from growkit.models import read_config
from growkit.models.architecture import Architecture
from trainer.config.sections import Checkpoint
from trainer.devices.hosts import is_writer
from trainer.run.damage import DamagedError, find_damage, list_steps, read_item
from trainer.run.hashed import copy_to_host, hash_arrays, hash_later
from trainer.run.soundness import describe_findings, look_at
from trainer.run.state import from_tree, to_tree
from trainer.step.update import State

# The directory in RUN of a checkpoint that is being saved again.
REPLACED = ".replaced"


@dataclass(frozen=True)
class Snapshot:
    """Everything that a checkpoint holds.

    model_config: the content of the model's config.json. record: the position, see
    `trainer.run.position`. files: the tokenizer and the like, by name.
    """

    state: State
    model_config: Mapping[str, Any]
    lineage: Lineage
    record: Mapping[str, Any]
    files: Mapping[str, bytes]


def find_last_step(run: str | os.PathLike[str]) -> int | None:
    """The step of a run's last finished checkpoint, None when it has none."""
    path = epath.Path(run)
    return max([*list_steps(path), *_list_replaced(path)], default=None)


def read_last_lineage(run: str | os.PathLike[str]) -> Lineage:
    """The lineage in a run's last checkpoint that can be read; empty where there is none."""
    directory = epath.Path(run) / CHECKPOINTS
    for step in reversed(list_steps(epath.Path(run))):
        try:
            return Lineage.read(read_item(directory / str(step), META)["lineage"])
        # What is damaged is named when the run begins.
        except (ValueError, KeyError, OSError):
            continue
    return Lineage()


def _list_replaced(run: epath.Path) -> list[int]:
    """The checkpoints that were being saved again when the run was killed."""
    directory = run / REPLACED
    return [int(entry.name) for entry in directory.iterdir()] if directory.exists() else []


def put_back_replaced(run: epath.Path) -> None:
    """Put back what was being saved again when the run was killed, unless the new one is whole."""
    if is_writer():
        for step in _list_replaced(run):
            if not (run / CHECKPOINTS / str(step)).exists():
                (run / REPLACED / str(step)).rename(run / CHECKPOINTS / str(step))
        (run / REPLACED).rmtree(missing_ok=True)
    _meet("put back")


def _meet(name: str) -> None:
    """Wait for the other processes, if there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"growkit {name}")


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run: epath.Path, settings: Checkpoint, sync: bool = True) -> None:
        """sync: whether a checkpoint is on the disk before it counts as finished."""
        self.run = epath.Path(run)
        self.directory = self.run / CHECKPOINTS
        self.settings = settings
        self.sync = sync
        if is_writer():
            # Now, and not at the first save: a disk that cannot be written to is told at once.
            self.directory.mkdir(parents=True, exist_ok=True)

    @cached_property
    def manager(self) -> Any:
        """Orbax's manager. Importing Orbax takes longer than all that a new run does before its
        first step, so it is made when there is a checkpoint to write or to read.
        """
        from trainer.run.saving import make_manager

        return make_manager(self.directory, self.settings, self.sync)

    @property
    def is_begun(self) -> bool:
        """Whether this run has asked for the manager."""
        return "manager" in vars(self)

    @property
    def last(self) -> int | None:
        """The step of the last checkpoint, which is finished after `wait`."""
        if not self.is_begun and not list_steps(self.run):
            return None
        step: int | None = self.manager.latest_step()
        return step

    def save(self, step: int, snapshot: Snapshot) -> bool:
        """Begin to save; returns when the state is copied, before it is written.

        A step that is saved already is left alone. Returns whether there was anything to save.
        """
        import orbax.checkpoint as ocp

        # Orbax would refuse: a signal can ask for a save at a step that was saved by plan.
        if step in self.manager.all_steps():
            return False
        meta = {
            "config": dict(snapshot.model_config),
            "lineage": snapshot.lineage.to_json(),
            "record": dict(snapshot.record),
        }
        # The state is copied to the host here, because the next step takes over its memory.
        hashes = hash_later(snapshot.state, snapshot.files, meta)
        items = {
            STATE: ocp.args.PyTreeSave(to_tree(snapshot.state)),
            META: ocp.args.JsonSave(meta | {HASHES: hashes}),
            FILES: ocp.args.JsonSave(encode_files(dict(snapshot.files))),
        }
        loss = snapshot.record.get("validation_loss")
        metrics = None if loss is None else {"validation_loss": loss}
        with self._name_failure("written"):
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        return True

    def replace(self, step: int, snapshot: Snapshot) -> None:
        """Save a step again, as where a signal kept its first save from having all there is.

        Waits until it is written. A kill meanwhile leaves the old checkpoint, which
        `put_back_replaced` finds. A bucket has no rename: there the old one is removed first.
        """
        self.wait()
        if is_remote(self.run):
            # Until the save below is done the bucket has no checkpoint of this step.
            self.manager.delete(step)
        elif is_writer():
            (self.run / REPLACED).mkdir(exist_ok=True)
            # Renamed and not copied: a step of some gigabytes is out of the way at once.
            (self.directory / str(step)).rename(self.run / REPLACED / str(step))
        # All must see that it is gone before any asks Orbax to save it again.
        _meet("replace")
        self.manager.reload()
        self.save(step, snapshot)
        self.wait()
        if is_writer():
            (self.run / REPLACED).rmtree(missing_ok=True)

    def restore(self, step: int, like: State, verify: bool = True) -> Snapshot:
        """The content of a finished checkpoint, its state in the dtypes and shardings of `like`.

        verify: whether what was read must have the hashes on record. Raises DamagedError for what
        is not as it was saved.
        """
        import orbax.checkpoint as ocp

        # Restored straight into the shardings of this run, on another mesh than it was saved from
        # too.
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, to_tree(like))
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        items = {
            STATE: ocp.args.PyTreeRestore(target, restore_args=restore_args),
            META: ocp.args.JsonRestore(),
        }
        try:
            found = self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as problem:  # Orbax and its storages raise many types
            self._refuse_unreadable(step, problem)
        meta = found[META]
        snapshot = Snapshot(
            state=from_tree(found[STATE], like),
            model_config=meta["config"],
            lineage=Lineage.read(meta["lineage"]),
            record=meta["record"],
            files=self.files(step),
        )
        if verify:
            self._require_unchanged(step, meta, snapshot)
        wrong = describe_findings(look_at(snapshot.state))
        if wrong:
            raise DamagedError(step, f"{self.directory / str(step)} cannot be trained on: {wrong}")
        return snapshot

    def _refuse_unreadable(self, step: int, problem: Exception) -> NoReturn:
        """Raise DamagedError for a damaged checkpoint, GrowkitError for any other reason."""
        path = self.directory / str(step)
        damage = find_damage(path)
        if damage is not None:
            raise DamagedError(step, damage) from problem
        words = f"the checkpoint {path} could not be read ({first_line(problem)})"
        if is_remote(path):
            raise DamagedError(step, words) from problem
        raise GrowkitError(words) from problem

    def _require_unchanged(self, step: int, meta: Mapping[str, Any], snapshot: Snapshot) -> None:
        """Raise DamagedError where something has another hash than the one on record."""
        hashes = read_hashes(meta, self.directory / str(step))
        # A run of an earlier version has no hashes: then there is nothing to compare with.
        if hashes is None:
            return
        arrays = hash_arrays(copy_to_host(snapshot.state), hashes["algorithm"])
        changed = find_changed(hashes, arrays, snapshot.files, meta)
        if changed is not None:
            raise DamagedError(
                step,
                f"{changed} of {self.directory / str(step)} is not what was saved: its hash is "
                f"another than the one on record",
            )

    def model(self, step: int) -> Architecture:
        """The sizes and options of the model in a finished checkpoint."""
        try:
            return read_config(self._read(step, META)["config"])
        except GrowkitError as problem:
            raise DamagedError(step, f"{self.directory / str(step)}: {problem}") from None

    def files(self, step: int) -> dict[str, bytes]:
        """The small files that a finished checkpoint carries, by name."""
        return decode_files(self._read(step, FILES))

    def describe_last_good(self) -> str:
        """The last checkpoint whose loss was finite when it was validated, in words."""
        self.wait()
        if self.last is None:
            return "no checkpoint was saved yet"
        good = self._find_last_good()
        if good is None:
            return "no checkpoint has a validation loss, so none is known to be good"
        return f"the last good checkpoint is {self.run}@{good}"

    def _find_last_good(self) -> int | None:
        for step in sorted(self.manager.all_steps(), reverse=True):
            loss = self._read(step, META)["record"].get("validation_loss")
            if loss is not None and math.isfinite(loss):
                return int(step)
        return None

    def _read(self, step: int, item: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = read_item(self.directory / str(step), item)
        except ValueError as problem:
            raise DamagedError(step, str(problem)) from None
        return content

    def reload(self) -> None:
        """Look again at which checkpoints there are."""
        if self.is_begun:
            self.manager.reload()

    def wait(self) -> None:
        """Return when everything begun is on disk."""
        if not self.is_begun:
            return
        with self._name_failure("written"):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then end Orbax's threads."""
        self.wait()
        if self.is_begun:
            self.manager.close()

    @contextmanager
    def _name_failure(self, done: str) -> Iterator[None]:
        """Turn whatever a storage raises into one sentence.

        Orbax and its storages have many kinds of exceptions, and a user needs none of them.
        """
        try:
            yield
        except Exception as problem:
            raise GrowkitError(
                f"a checkpoint of {self.run} could not be {done} ({first_line(problem)})"
            ) from problem
