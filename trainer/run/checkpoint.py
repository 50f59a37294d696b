"""A run's checkpoints: saved by Orbax in the background, whole or not at all, kept by policy, restored to the bit.

Knows how the trainer's state and its record become the layout that `growkit.checkpoint.orbax` describes,
and which checkpoints are kept. Leaves when to save to the loop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from growkit.checkpoint.location import CHECKPOINTS
from growkit.checkpoint.orbax import FILES, META, STATE, decode_files, encode_files
from growkit.checkpoint.tensor import Source, Tensor
from growkit.errors import GrowkitError
from growkit.models import read_config
from growkit.models.architecture import Architecture
from growkit.models.notation import Row
from trainer.config.sections import Checkpoint
from trainer.devices.sharding import place
from trainer.step.update import State


def to_tree(state: State) -> dict[str, Any]:
    """The state as it lies on disk: params, mu, nu and the counters, the moments found structurally."""
    return {
        "params": state.params,
        "mu": optax.tree.get(state.optimizer, "mu"),
        "nu": optax.tree.get(state.optimizer, "nu"),
        "count": optax.tree.get(state.optimizer, "count"),
        "step": state.step,
        "schedule_step": state.schedule_step,
    }


def from_tree(tree: dict[str, Any], like: State) -> State:
    """The inverse of `to_tree`, around an optimizer state of the structure of `like`'s."""
    optimizer = optax.tree.set(like.optimizer, mu=tree["mu"], nu=tree["nu"], count=tree["count"])
    return State(tree["params"], optimizer, tree["step"], tree["schedule_step"])


def from_source(source: Source, like: State, continued: bool = False) -> State:
    """The state that begins a new run from a model on disk, as `like` is: its params, moments and Adam's count.

    Steps begin at 0, and so does the schedule unless it is `continued`. A source without moments starts them at
    zero with count 0.
    """
    rows = source.model.table.tree(lambda row: row)
    tree = jax.tree.map(_zeros, to_tree(like))
    for slot, tensors in source.tensors.items():
        tree[slot] = jax.tree.map(partial(_read, tensors), rows, to_tree(like)[slot])
    if "nu" in source.tensors:
        tree["count"] = place(np.int32(source.record.get("count", 0)), like.step.sharding)
    if continued:
        tree["schedule_step"] = place(
            np.int32(source.record.get("schedule_step", 0)), like.step.sharding
        )
    return from_tree(tree, like)


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return place(np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), leaf.sharding)


def _read(tensors: Mapping[str, Tensor], row: Row, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A row's parameter as `leaf` is, read a layer at a time; of each, this process's devices' parts are kept."""
    indices = {
        _key(index): index
        for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    }
    parts = {key: np.empty(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for key in indices}
    stacked = len(row.stacked)
    for position in np.ndindex(leaf.shape[:stacked]):
        array = tensors[row.name_at(position)].read()
        for key, index in indices.items():
            # Layers are never split.
            parts[key][position] = array[index[stacked:]]
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: parts[_key(index)])


def _key(index: tuple[slice, ...]) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start, part.stop) for part in index)


def find_last_step(run: epath.Path) -> int | None:
    """The step of a run's last finished checkpoint, None when it has none."""
    return max(ocp.utils.checkpoint_steps(epath.Path(run) / CHECKPOINTS), default=None)


def select_validation_loss(metrics: dict[str, float]) -> float:
    """What the best checkpoint is best by."""
    return metrics["validation_loss"]


def build_preservation_policy(settings: Checkpoint) -> Any:
    """Orbax's policy for the checkpoints that stay. One without a validation loss is never the best."""
    keep = [policies.LatestN(settings.keep_last)]
    if settings.keep_every:
        keep.append(policies.EveryNSteps(settings.keep_every))
    if settings.keep_best:
        loss = {
            "get_metric_fn": select_validation_loss,
            "reverse": True,
            "keep_checkpoints_without_metrics": False,
        }
        keep.append(policies.preservation_policy.BestN(n=1, **loss))
    return policies.AnyPreservationPolicy(keep)


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run: epath.Path, settings: Checkpoint):
        self.run = epath.Path(run)
        self.directory = self.run / CHECKPOINTS
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                # Only with a best_fn does Orbax write the losses down, and a resumed run needs those of before.
                best_fn=select_validation_loss,
                best_mode="min",
                preservation_policy=build_preservation_policy(settings),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
            item_handlers={
                STATE: ocp.PyTreeCheckpointHandler(
                    use_ocdbt=settings.ocdbt, use_compression=settings.ocdbt
                ),
                META: ocp.JsonCheckpointHandler(),
                FILES: ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def last(self) -> int | None:
        """The step of the last checkpoint, which is finished after `wait`."""
        return self.manager.latest_step()

    def save(
        self,
        step: int,
        state: State,
        config: dict[str, Any],
        lineage: list[dict[str, Any]],
        record: dict[str, Any],
        files: dict[str, bytes],
    ) -> bool:
        """Begin to save; returns when the state is copied, before it is written. A step saved already is left alone.

        Returns whether there was anything to save.
        """
        if step in self.manager.all_steps():
            return False
        loss = record.get("validation_loss")
        items = {
            STATE: ocp.args.PyTreeSave(to_tree(state)),
            META: ocp.args.JsonSave({"config": config, "lineage": lineage, "record": record}),
            FILES: ocp.args.JsonSave(encode_files(files)),
        }
        with self._failing("written"):
            metrics = None if loss is None else {"validation_loss": loss}
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        return True

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """The state and the meta data of a finished checkpoint, in the dtypes and places of `like`."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, to_tree(like))
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        items = {
            STATE: ocp.args.PyTreeRestore(target, restore_args=restore_args),
            META: ocp.args.JsonRestore(),
        }
        with self._failing(
            f"read, {self.directory / str(step)}; without it, the run goes on from the one before"
        ):
            found = self.manager.restore(step, args=ocp.args.Composite(**items))
        return from_tree(found[STATE], like), found[META]

    def files(self, step: int) -> dict[str, bytes]:
        """The small files that lie with a checkpoint."""
        return decode_files(
            json.loads((self.directory / str(step) / FILES / "metadata").read_text())
        )

    def model(self, step: int) -> Architecture:
        """The sizes and options of the model in a finished checkpoint."""
        with self._failing(
            f"read, {self.directory / str(step)}; without it, the run goes on from the one before"
        ):
            return read_config(
                json.loads((self.directory / str(step) / META / "metadata").read_text())["config"]
            )

    def wait(self) -> None:
        """Return when everything begun is on disk."""
        with self._failing("written"):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then let go of Orbax's threads."""
        self.wait()
        self.manager.close()

    @contextmanager
    def _failing(self, done: str) -> Iterator[None]:
        """Storage fails in as many ways as Orbax and its storages have kinds of exception; a user needs a sentence."""
        try:
            yield
        except Exception as problem:
            words = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
            raise GrowkitError(
                f"a checkpoint of {self.run} could not be {done} ({words[:300]})"
            ) from problem
