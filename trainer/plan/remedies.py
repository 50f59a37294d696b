"""Which changes of a configuration would make its training step fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from growkit.errors import UsageError
from trainer.config.sections import Config, resolve
from trainer.config.values import apply_overrides
from trainer.devices.accelerators import GIB
from trainer.devices.sharding import BATCH_AXES
from trainer.plan.compiler import POLICIES, Memory

SHORTEST_CONTEXT = 128  # tokens; no shorter context is proposed

Changes = tuple[str, ...]  # as on the command line: key=value


@dataclass(frozen=True)
class Trial:
    """Changes of the configuration, and the memory that the step needs with them."""

    changes: Changes
    memory: Memory


def apply_changes(config: Config, changes: Sequence[str]) -> Config:
    """The configuration with key=value changes."""
    return resolve(apply_overrides(config.to_dict(), list(changes)))


def list_remedies(config: Config, mesh: dict[str, int]) -> list[list[Changes]]:
    """Changes that lower the peak, in groups, each with its mildest change first.

    The order is that in which they are tried: the loss, remat, sharding, accumulation, context.
    mesh: the number of devices along each mesh axis.
    """
    return [
        _list_loss_changes(config),
        _list_remat_changes(config),
        _list_sharding_changes(config, mesh),
        _list_accumulation_changes(config, mesh),
        _list_context_changes(config),
    ]


def _list_loss_changes(config: Config) -> list[Changes]:
    return [("loss_chunk=auto",)] if config.loss_chunk == "none" else []


def _list_remat_changes(config: Config) -> list[Changes]:
    if config.remat == "auto":
        return []
    harsher = POLICIES[POLICIES.index(config.remat) + 1 :]
    return [(f"remat={policy}",) for policy in harsher]


def _count_batch_shards(mesh: dict[str, int]) -> int:
    return math.prod(mesh[axis] for axis in BATCH_AXES)


def _list_sharding_changes(config: Config, mesh: dict[str, int]) -> list[Changes]:
    shards = mesh["data"] * mesh["fsdp"]
    changes: list[Changes] = []
    if shards > 1 and not config.mesh.zero1:
        changes.append(("mesh.zero1=true",))
    if mesh["fsdp"] < shards:
        changes.append(("mesh.data=1", f"mesh.fsdp={shards}"))
    return changes


def _list_accumulation_changes(config: Config, mesh: dict[str, int]) -> list[Changes]:
    """2, 4, 8, ... times as many parts, where each of them still divides over the devices."""
    shards = _count_batch_shards(mesh)
    parts = config.batch.accumulation
    sequences = config.batch.sequences // parts
    changes: list[Changes] = []
    times = 2
    while times <= sequences:
        if sequences % times == 0 and sequences // times % shards == 0:
            changes.append((f"batch.accumulation={parts * times}",))
        times *= 2
    return changes


def _list_context_changes(config: Config) -> list[Changes]:
    changes: list[Changes] = []
    length = config.model.context // 2
    while length >= SHORTEST_CONTEXT:
        changes.append((f"model.context={length}",))
        length //= 2
    return changes


def try_remedies(
    config: Config, mesh: dict[str, int], measure: Callable[[Config], Memory]
) -> Iterator[Trial]:
    """Measure each remedy alone, then more and more of them together, up to the first that fits."""
    for changes in _order_trials(list_remedies(config, mesh)):
        try:
            memory = measure(apply_changes(config, changes))
        except UsageError:
            continue  # These sizes cannot be divided over the devices.
        yield Trial(changes, memory)
        if memory.fits:
            return


def _order_trials(groups: list[list[Changes]]) -> list[Changes]:
    """Every remedy alone, then each on top of the strongest of all groups before its own."""
    alone: list[Changes] = []
    combined: list[Changes] = []
    strongest: Changes = ()
    for group in groups:
        if not group:
            continue
        alone += group
        if strongest:
            combined += [strongest + changes for changes in group]
        strongest += group[-1]
    return alone + combined


def describe_shortage(memory: Memory, place: str) -> str:
    """By how much a step does not fit, in words. place: what a device is called."""
    least = "" if memory.exact else "at least "
    needed = memory.peak / GIB
    available = memory.available / GIB
    return (
        f"the step does not fit: it needs {least}{needed:.1f} GiB a {place} and there are "
        f"{available:.1f}, {least}{needed - available:.1f} too few"
    )


def describe_remedy(tried: Sequence[Trial]) -> str:
    """The changes that make a step fit, or that none of those tried does."""
    if not tried or not tried[-1].memory.fits:
        return (
            "no remat policy, sharding, microbatch or shorter context makes it fit; "
            "use more or larger devices"
        )
    last = tried[-1]
    needed = f"{last.memory.peak / GIB:.1f} GiB"
    if last.memory.estimated:
        return (
            f"{' '.join(last.changes)} may make it fit, which takes at least {needed} and was not "
            f"compiled"
        )
    return f"{' '.join(last.changes)} would make it fit, at {needed}"
