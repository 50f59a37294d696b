"""Orbax, as a run has it write checkpoints: which stay, how they are written, and their hashes.

The only file of the loop's that imports Orbax when it is imported itself: that takes a second.
"""

from __future__ import annotations

import json
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint import future

from growkit.checkpoint.files import is_remote
from growkit.checkpoint.hashes import HASHES
from growkit.checkpoint.kinds import STATE
from growkit.checkpoint.orbax import FILES, META
from trainer.config.sections import Checkpoint
from trainer.devices.hosts import is_writer
from trainer.run.power import SyncedPath


def make_manager(directory: epath.Path, settings: Checkpoint, sync: bool) -> Any:
    """The manager of the checkpoints in a directory.

    sync: whether a checkpoint is on the disk before it counts as finished.
    """
    # A resumed run needs the validation losses of earlier checkpoints. Orbax writes them down only
    # where there is a best_fn.
    options = ocp.CheckpointManagerOptions(
        best_fn=select_validation_loss,
        best_mode="min",
        preservation_policy=build_preservation_policy(settings),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        # A bucket stores an object whole or not at all, and has no fsync.
        temporary_path_class=SyncedPath if sync and not is_remote(directory) else None,
        # Orbax's threads wait for a directory that cannot be made, and the process for them.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    state_handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=settings.ocdbt, use_compression=settings.ocdbt
    )
    json_args = (ocp.args.JsonSave, ocp.args.JsonRestore)
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item, handler, kinds in (
        (STATE, state_handler, (ocp.args.PyTreeSave, ocp.args.PyTreeRestore)),
        (META, HashedJson(), json_args),
        (FILES, ocp.JsonCheckpointHandler(), json_args),
    ):
        for kind in kinds:
            handlers.add(item, kind, handler)
    return ocp.CheckpointManager(directory, options=options, handler_registry=handlers)


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


class HashedJson(ocp.JsonCheckpointHandler):
    """Orbax's handler of JSON, for a meta whose hashes are made in the thread that writes it.

    The value of "hashes" is a function without arguments.
    """

    async def async_save(
        self, directory: epath.Path, item: Any = None, args: Any = None
    ) -> list[future.Future]:
        meta: dict[str, Any] = args.item

        async def write() -> None:
            # Every process runs this; one writes, as with everything that is the same in all.
            if is_writer():
                whole = meta | {HASHES: meta[HASHES]()}
                (directory / "metadata").write_text(json.dumps(whole))

        return [future.CommitFutureAwaitingContractedSignals(write(), name="hashed_json_save")]

    @classmethod
    def typestr(cls) -> str:
        """Orbax's own name: to readers the meta is JSON like any other."""
        return str(ocp.JsonCheckpointHandler.typestr())
