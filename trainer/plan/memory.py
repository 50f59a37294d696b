"""What the training loop checks before its first step: does it fit, and with which remat policy.

The program that is measured here is the one that the run's first step then executes, so it is
compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from growkit.errors import GrowkitError
from trainer.config.sections import Config
from trainer.devices.accelerators import GIB
from trainer.devices.sharding import Layout
from trainer.plan.compiler import (
    Memory,
    abstract_batch,
    compile_step,
    count_bytes,
    estimate_shortage,
    estimate_step,
    list_policies,
    measure_memory,
)
from trainer.plan.remedies import describe_remedy, describe_shortage, try_remedies
from trainer.plan.topology import find_available_memory
from trainer.step.update import State, TrainStep


def select_step(
    config: Config, layout: Layout, like: State, make: Callable[[Config], TrainStep]
) -> TrainStep:
    """The run's training step, made by `make`; with `remat: auto`, of the mildest policy that fits.

    The harshest policy is not measured here: `require_fit` refuses it where it does not fit either.
    """
    *milder, harshest = [make(replace(config, remat=policy)) for policy in list_policies(config)]
    for step in milder:
        if measure_step(config, layout, step, like).fits:
            return step
    return harshest


def measure_step(config: Config, layout: Layout, step: TrainStep, like: State) -> Memory:
    """The memory that a step needs on its devices. Compiles it unless that was done before."""
    available = find_available_memory(layout.mesh.local_devices)
    batch = abstract_batch(config, layout)
    key = (batch.shape, available)
    if key not in step.memory:
        traced = step.trace(like, batch)
        memory = estimate_shortage(traced.jaxpr, like, layout, available)
        if memory is None:
            memory = measure_memory(traced.lower(), like, available)
        step.memory[key] = memory
    return step.memory[key]


def require_fit(config: Config, layout: Layout, step: TrainStep, like: State) -> str:
    """Compile the step that a run is about to take; returns, in words, the memory it needs.

    Raises GrowkitError, with advice, when the devices do not have that memory.
    """
    memory = measure_step(config, layout, step, like)
    if not memory.fits:
        raise GrowkitError(_explain_refusal(config, layout, memory))
    policy = f", with remat {step.remat}" if config.remat == "auto" else ""
    needed = f"{memory.peak / GIB:.2f} of {memory.available / GIB:.1f} GiB"
    return f"memory: a step takes {needed} a device{policy}"


def require_state_fit(layout: Layout, like: State) -> None:
    """Refuse, before anything is compiled, a state that alone takes more memory than there is.

    Raises GrowkitError. Whether the whole step fits is `require_fit`'s to find out, in minutes.
    """
    available = find_available_memory(layout.mesh.local_devices)
    parameters = count_bytes(like.params)
    optimizer = count_bytes(like.optimizer)
    if parameters + optimizer <= available:
        return
    raise GrowkitError(
        f"the model does not fit: its parameters take {parameters / GIB:.1f} GiB a device and its "
        f"optimizer {optimizer / GIB:.1f}, and there are {available / GIB:.1f} GiB; shard it over "
        f"more devices (mesh.fsdp, mesh.tensor), or take a smaller model"
    )


def _explain_refusal(config: Config, layout: Layout, memory: Memory) -> str:
    """By how much the step does not fit, and what would make it fit."""
    devices = list(layout.mesh.devices.flat)

    def measure(changed: Config) -> Memory:
        if memory.estimated:
            return estimate_step(changed, devices, memory.available)
        return compile_step(changed, devices, memory.available).memory

    tried = list(try_remedies(config, dict(layout.mesh.shape), measure))
    return f"{describe_shortage(memory, 'device')}; {describe_remedy(tried)}"
