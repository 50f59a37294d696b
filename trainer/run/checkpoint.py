"""A run's checkpoints: saved by Orbax in the background, whole or not at all, restored to the bit.

A checkpoint holds a `Snapshot`, in the layout that `growkit.checkpoint.orbax` describes. Which
checkpoints stay on disk is the section `checkpoint`'s to say; when to save is the loop's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from growkit.checkpoint.location import CHECKPOINTS
from growkit.checkpoint.orbax import FILES, META, STATE, decode_files, encode_files
from growkit.errors import GrowkitError
from growkit.lineage import Lineage
from growkit.models import read_config
from growkit.models.architecture import Architecture
from trainer.config.sections import Checkpoint
from trainer.run.state import from_tree, to_tree
from trainer.step.update import State


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
    return max(ocp.utils.checkpoint_steps(epath.Path(run) / CHECKPOINTS), default=None)


def select_validation_loss(metrics: dict[str, float]) -> float:
    """The number by which the best checkpoint is the best."""
    return metrics["validation_loss"]


def build_preservation_policy(settings: Checkpoint) -> Any:
    """Orbax's policy for the checkpoints that stay: the last N, every K steps, the best.

    A checkpoint without a validation loss is never the best.
    """
    keep: list[Any] = [policies.LatestN(settings.keep_last)]
    if settings.keep_every:
        keep.append(policies.EveryNSteps(settings.keep_every))
    if settings.keep_best:
        best = policies.preservation_policy.BestN(
            n=1,
            get_metric_fn=select_validation_loss,
            reverse=True,
            keep_checkpoints_without_metrics=False,
        )
        keep.append(best)
    return policies.AnyPreservationPolicy(keep)


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run: epath.Path, settings: Checkpoint) -> None:
        self.run = epath.Path(run)
        self.directory = self.run / CHECKPOINTS
        # A resumed run needs the validation losses of earlier checkpoints. Orbax writes them down
        # only where there is a best_fn.
        options = ocp.CheckpointManagerOptions(
            best_fn=select_validation_loss,
            best_mode="min",
            preservation_policy=build_preservation_policy(settings),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        state_handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=settings.ocdbt, use_compression=settings.ocdbt
        )
        handlers = {
            STATE: state_handler,
            META: ocp.JsonCheckpointHandler(),
            FILES: ocp.JsonCheckpointHandler(),
        }
        self.manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    @property
    def last(self) -> int | None:
        """The step of the last checkpoint, which is finished after `wait`."""
        step: int | None = self.manager.latest_step()
        return step

    def save(self, step: int, snapshot: Snapshot) -> bool:
        """Begin to save; returns when the state is copied, before it is written.

        A step that is saved already is left alone. Returns whether there was anything to save.
        """
        if step in self.manager.all_steps():
            return False
        meta = {
            "config": dict(snapshot.model_config),
            "lineage": snapshot.lineage.to_json(),
            "record": dict(snapshot.record),
        }
        items = {
            STATE: ocp.args.PyTreeSave(to_tree(snapshot.state)),
            META: ocp.args.JsonSave(meta),
            FILES: ocp.args.JsonSave(encode_files(dict(snapshot.files))),
        }
        loss = snapshot.record.get("validation_loss")
        metrics = None if loss is None else {"validation_loss": loss}
        with self._name_failure("written"):
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        return True

    def restore(self, step: int, like: State) -> Snapshot:
        """The content of a finished checkpoint, its state in the dtypes and shardings of `like`."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, to_tree(like))
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        items = {
            STATE: ocp.args.PyTreeRestore(target, restore_args=restore_args),
            META: ocp.args.JsonRestore(),
        }
        with self._name_unreadable(step):
            found = self.manager.restore(step, args=ocp.args.Composite(**items))
        meta = found[META]
        return Snapshot(
            state=from_tree(found[STATE], like),
            model_config=meta["config"],
            lineage=Lineage.read(meta["lineage"]),
            record=meta["record"],
            files=decode_files(self._read_json(step, FILES)),
        )

    def model(self, step: int) -> Architecture:
        """The sizes and options of the model in a finished checkpoint."""
        with self._name_unreadable(step):
            return read_config(self._read_json(step, META)["config"])

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        text = (self.directory / str(step) / item / "metadata").read_text()
        content: dict[str, Any] = json.loads(text)
        return content

    def wait(self) -> None:
        """Return when everything begun is on disk."""
        with self._name_failure("written"):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then end Orbax's threads."""
        self.wait()
        self.manager.close()

    def _name_unreadable(self, step: int) -> Any:
        path = self.directory / str(step)
        return self._name_failure(f"read, {path}; without it, the run goes on from the one before")

    @contextmanager
    def _name_failure(self, done: str) -> Iterator[None]:
        """Turn whatever a storage raises into one sentence.

        Orbax and its storages have many kinds of exceptions, and a user needs none of them.
        """
        try:
            yield
        except Exception as problem:
            lines = str(problem).strip().splitlines() or [type(problem).__name__]
            raise GrowkitError(
                f"a checkpoint of {self.run} could not be {done} ({lines[0][:300]})"
            ) from problem
