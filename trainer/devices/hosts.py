"""Several processes, usually one per host, that train as one.

Every process runs the same command and reaches the same collective operations in the same order.
This file has how they find each other, which of them writes files, and how they agree on numbers.
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

COORDINATOR = "JAX_COORDINATOR_ADDRESS"
COUNT = "JAX_NUM_PROCESSES"
NUMBER = "JAX_PROCESS_ID"


@cache
def join_cluster() -> None:
    """Connect to the other processes of the cluster; without a cluster, do nothing.

    jax.distributed detects TPU pods, Slurm, Open MPI and Kubernetes. Elsewhere three environment
    variables state the address (host:port) of process 0, how many processes there are, and which
    one this is; their names are above. Must come before anything is computed. Raises UsageError, or
    GrowkitError when the others cannot be reached.
    """
    stated = {name: os.environ.get(name) for name in (COORDINATOR, COUNT, NUMBER)}
    try:
        _initialize(stated)
    except ValueError as problem:
        # jax raises this where it detects no cluster; there is no other way to ask it.
        if any(stated.values()):
            raise UsageError(f"the processes cannot meet: {problem}") from None
    except RuntimeError as problem:
        # A process that has computed before, such as a program that calls the command line, goes
        # on by itself.
        if "before any JAX" not in str(problem):
            first_line = str(problem).splitlines()[0]
            raise GrowkitError(f"the other processes could not be reached: {first_line}") from None


def _initialize(stated: dict[str, str | None]) -> None:
    """Initialise jax.distributed by what is stated, or let it detect the cluster."""
    coordinator, count, number = stated.values()
    if count is None and number is None:
        jax.distributed.initialize()
        return
    if not (coordinator and count and number and count.isdecimal() and number.isdecimal()):
        raise UsageError(
            f"processes are told of each other by {', '.join(stated)}, all three; got {stated}"
        )
    jax.distributed.initialize(coordinator, int(count), int(number))


def is_writer() -> bool:
    """Whether this process writes to the run's directory and to the terminal.

    Only the first process does. Checkpoints are written by all.
    """
    return jax.process_index() == 0


class Agreement:
    """Numbers on which several processes agree: each gives its own, all get the largest.

    The answer comes one call later: the numbers meet on the devices, behind the step that was
    dispatched before, so that no process waits for them. All processes must call equally often. A
    single process gets its own numbers at once.
    """

    def __init__(self) -> None:
        self.single_process = jax.process_count() == 1
        self.calls = 0  # how often this process has called `exchange`
        self.pending: jax.Array | None = None  # the largest numbers of the last call

    def exchange(self, *numbers: int) -> tuple[int, ...]:
        """Give numbers of at least 0; returns the largest of the call before, at first zeros."""
        self.calls += 1
        if self.single_process:
            return numbers
        previous = self.pending
        self.pending = _find_largest(_spread(numbers))
        if previous is None:
            return (0,) * len(numbers)
        return tuple(int(number) for number in np.asarray(previous))


@cache
def _make_mesh() -> Mesh:
    """All devices in a row."""
    return Mesh(np.array(jax.devices()), ("device",))


def _spread(numbers: tuple[int, ...]) -> jax.Array:
    """The numbers of every process, once for each of its devices: int32 [devices, numbers]."""
    mesh = _make_mesh()
    sharding = NamedSharding(mesh, PartitionSpec("device"))
    row = np.array([numbers], np.int32)
    return jax.make_array_from_callback((mesh.size, len(numbers)), sharding, lambda index: row)


@jax.jit
def _find_largest(numbers: jax.Array) -> jax.Array:
    """The largest of each number over all devices, on every device."""
    replicated = NamedSharding(_make_mesh(), PartitionSpec())
    return jax.lax.with_sharding_constraint(numbers.max(0), replicated)


def write_once(path: Any, content: bytes) -> None:
    """Replace a file atomically. Of several processes, only the first one writes."""
    if is_writer():
        write_atomically(path, content)
