"""Several processes, usually one a host, that train as one: how they meet, who writes, and what all agree on.

Every process runs the same command and reaches the same collective operations in the same order. Knows processes;
leaves devices to `trainer.devices.sharding` and signals to `trainer.run.interrupt`.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from growkit.checkpoint.files import write_atomically
from growkit.errors import GrowkitError, UsageError

COORDINATOR, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


@cache
def join_cluster() -> None:
    """Meet the other processes of the cluster that this one was started in; without a cluster, do nothing.

    jax.distributed finds out about TPU pods, Slurm, Open MPI and Kubernetes itself; anywhere else the address
    (host:port) of process 0, how many there are and which this is stand in the environment, by the names above. Must
    come before anything is computed. Raises UsageError, or GrowkitError when the others cannot be reached.
    """
    stated = {name: os.environ.get(name) for name in (COORDINATOR, COUNT, NUMBER)}
    try:
        if stated[COUNT] is None and stated[NUMBER] is None:
            jax.distributed.initialize()
        elif not all(stated.values()) or not all(
            stated[name].isdecimal() for name in (COUNT, NUMBER)
        ):
            raise UsageError(
                f"processes are told of each other by {', '.join(stated)}, all three; got {stated}"
            )
        else:
            jax.distributed.initialize(stated[COORDINATOR], int(stated[COUNT]), int(stated[NUMBER]))
    except ValueError as problem:
        # Without any of it there is no cluster; jax has no other way to ask.
        if any(stated.values()):
            raise UsageError(f"the processes cannot meet: {problem}") from None
    except RuntimeError as problem:
        # A process that has computed already, as a program that calls the command line may, goes on alone.
        if "before any JAX" not in str(problem):
            raise GrowkitError(
                f"the other processes could not be reached: {str(problem).splitlines()[0]}"
            ) from None


def is_writer() -> bool:
    """Whether this process is the one that writes to RUN and to the terminal; checkpoints are written by all."""
    return jax.process_index() == 0


class Agreement:
    """Numbers on which several processes agree: each tells its own, and all hear the largest, one call later.

    They meet on the devices, behind the step that was dispatched before, so that nobody waits for them. All processes
    must call alike often. One process hears at once what it tells. calls: how often this one has called.
    """

    def __init__(self):
        self.single_process = jax.process_count() == 1
        self.calls = 0
        self.pending: jax.Array | None = None

    def exchange(self, *numbers: int) -> tuple[int, ...]:
        """Tell numbers of at least 0, and hear those of the call before; zeros at the first."""
        self.calls += 1
        if self.single_process:
            return numbers
        before, self.pending = self.pending, _largest(_everyone(numbers))
        return (
            tuple(0 for _ in numbers)
            if before is None
            else tuple(int(number) for number in np.asarray(before))
        )


@cache
def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("device",))


def _everyone(numbers: tuple[int, ...]) -> jax.Array:
    """What every process tells, once for each of its devices [devices, numbers]."""
    each = NamedSharding(_mesh(), PartitionSpec("device"))
    return jax.make_array_from_callback(
        (_mesh().size, len(numbers)), each, lambda _: np.array([numbers], np.int32)
    )


@jax.jit
def _largest(told: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(told.max(0), NamedSharding(_mesh(), PartitionSpec()))


def write_once(path: Any, content: bytes) -> None:
    """Replace a file as a whole. Of several processes that train together, the first one writes."""
    if is_writer():
        write_atomically(path, content)
