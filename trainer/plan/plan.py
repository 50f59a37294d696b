"""What a run needs before it is begun: its own train step, compiled for devices that need not be there.

The compiler of the target itself says how much memory the program takes; XLA compiles for a named slice of TPUs without
one. Knows memory, FLOPs, time, and which change of the configuration would make a step fit; leaves facts about chips
to `trainer.devices.accelerators` and tables to the command line.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from growkit.errors import GrowkitError, UsageError
from growkit.models.architecture import Architecture
from trainer.config.sections import Config, build_architecture, resolve
from trainer.config.values import apply_overrides
from trainer.devices.accelerators import GIB, parse_slice, peak_flops
from trainer.devices.sharding import Layout, make_layout
from trainer.model.kernels import Choice, select_kernel
from trainer.step.update import TrainStep, abstract_state, make_train_step

POLICIES = ("none", "dots", "full")  # of rematerialisation, the mildest first
SHORTEST = 128  # tokens of context below which no advice goes
# libtpu: ask no cloud what this machine is, take no lock and write no logs, for nothing here runs on a TPU.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Target:
    """Devices to compile for. available: bytes each of them has; peak: FLOP/s of all together, None if unknown."""

    name: str
    devices: Sequence[Any]
    chips: int
    available: int
    peak: float | None
    place: str  # what a device is called here


def find_target(name: str) -> Target:
    """The devices of a slice of TPUs, or with `cpu` and `gpu` those that JAX sees here.

    Raises UsageError for a name that means nothing and GrowkitError for a compiler or a device that is not here.
    """
    if name in ("cpu", "gpu"):
        return _here(name)
    part = parse_slice(name)
    accelerator = part.accelerator
    options: dict[str, Any] = (
        {} if accelerator.dimensions == 2 else {"chip_config_name": "megacore"}
    )
    if part.chips < 8 and accelerator.devices == 1:
        # One host with fewer chips than the compiler takes a host to have.
        options["chips_per_host_bounds"] = (*part.shape, 1)[:3]
    place = "core" if accelerator.devices > 1 else "chip"
    available = int(accelerator.usable * GIB)
    return Target(
        name,
        _compile_only(part.native, options),
        part.chips,
        available,
        part.chips * accelerator.peak,
        place,
    )


def _compile_only(native: str, options: dict[str, Any]) -> Sequence[Any]:
    """Devices that can only be compiled for."""
    from jax.experimental.topologies import get_topology_desc

    # Not setdefault: where there is no TPU, importing jax leaves texts in these that libtpu complains about.
    os.environ.update(ALONE)
    try:
        return get_topology_desc(native, "tpu", **options).devices
    except RuntimeError as problem:
        if "not installed" in str(problem):
            raise GrowkitError(
                "a plan for TPUs needs their compiler, libtpu, which works on any Linux machine: "
                "pip install 'growkit[tpu]'"
            ) from None
        raise GrowkitError(f"libtpu knows no slice {native}: {_one_line(problem)}") from None


def _here(platform: str) -> Target:
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        raise GrowkitError(f"there is no {platform} here that JAX could compile for") from None
    peak = peak_flops(devices[0])
    return Target(
        platform,
        devices,
        len(devices),
        find_available_memory(devices),
        peak and peak * len(devices),
        "device",
    )


def find_available_memory(devices: Sequence[Any]) -> int:
    """Bytes that a program may have on each of the devices: of a CPU, the machine's memory in equal parts."""
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // sum(device.process_index == devices[0].process_index for device in devices)


@dataclass(frozen=True)
class Memory:
    """Bytes a device. temporaries: activations, gradients, and what the compiler keeps besides.

    exact: whether the compiler gave a program; a refusal may name a lower bound.
    """

    parameters: int
    optimizer: int
    temporaries: int
    other: int
    available: int
    exact: bool = True

    @property
    def peak(self) -> int:
        return self.parameters + self.optimizer + self.temporaries + self.other

    @property
    def fits(self) -> bool:
        return self.exact and self.peak <= self.available


def abstract_batch(config: Config, made: Layout) -> jax.ShapeDtypeStruct:
    """The shape and place of a step's tokens."""
    parts = config.batch.accumulation
    shape = (parts, config.batch.sequences // parts, config.model.context + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=made.batch_sharding(1))


def _bytes(tree: Any) -> int:
    """Bytes of a tree on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def measure_memory(lowered: Any, like: Any, available: int) -> Memory:
    """Compile a step whose state is `like` and say what it takes on a device. Raises what is not about memory."""
    parameters, optimizer = _bytes(like.params), _bytes(like.optimizer)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as problem:
        if "RESOURCE_EXHAUSTED" not in str(problem):
            raise
        temporaries, limit = parse_refusal(str(problem), parameters + optimizer)
        return Memory(parameters, optimizer, temporaries, 0, limit or available, exact=False)
    stats = compiled.memory_analysis()
    temporaries = stats.temp_size_in_bytes
    needed = stats.argument_size_in_bytes + temporaries + stats.generated_code_size_in_bytes
    needed += stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(
        parameters, optimizer, temporaries, needed - parameters - optimizer - temporaries, available
    )


def parse_refusal(text: str, state: int) -> tuple[int, int | None]:
    """(bytes of temporaries, bytes there are) by the compiler's own words when a program does not fit.

    Its first check counts temporaries alone, its last all that lies in memory; the state is taken off there.
    """
    size = r"([\d.]+)([BKMGT])"
    if found := re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", text):
        return _size(found[1], found[2]), _size(found[3], found[4])
    if found := re.search(rf"Used {size} of {size} hbm", text):
        return max(0, _size(found[1], found[2]) - state), _size(found[3], found[4])
    return 0, None


def _size(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** "BKMGT".index(unit))


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300]


def count_product_flops(jaxpr: Any) -> float:
    """FLOPs of a program's matrix products, a loop's as often as it runs: what is computed again counts again.

    Of a kernel in Pallas every block counts, those that a causal mask spares too; cuDNN's are not seen.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += (
                2.0 * math.prod(shape[axis] for axis in contracted) * equation.outvars[0].aval.size
            )
        total += _times(equation) * sum(
            count_product_flops(inner) for inner in jaxprs_in_params(equation.params)
        )
    return total


def _times(equation: Any) -> int:
    """How often what is in an equation is computed, on all devices together."""
    match equation.primitive.name:
        case "scan":
            return equation.params["length"]
        case "pallas_call":
            return math.prod(equation.params["grid_mapping"].grid)
        case "shard_map":
            return equation.params["mesh"].size
    return 1


@dataclass(frozen=True)
class Plan:
    """A configuration on devices. flops: of a step, by the formula; computed: matrix products of the step's program."""

    config: Config
    model: Architecture
    target: Target
    mesh: dict[str, int]
    attention: Choice
    memory: Memory
    computed: float

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch.sequences * self.config.model.context

    @property
    def flops(self) -> float:
        """Of a step: PaLM's count, without what is computed again (arXiv 2204.02311, appendix B)."""
        return self.tokens_per_step * self.model.flops_per_token(self.config.model.context)

    def estimate_step_seconds(self, mfu: float) -> float | None:
        """flops / (mfu x peak FLOP/s of all chips); None where the peak is not known."""
        return self.flops / (mfu * self.target.peak) if self.target.peak else None

    def estimate_hours(self, mfu: float) -> float | None:
        """Of all steps, validation and saving left out."""
        seconds = self.estimate_step_seconds(mfu)
        return None if seconds is None else seconds * self.config.schedule.steps / 3600

    def estimate_cost(self, mfu: float, price: float) -> float | None:
        """Of all steps, at a price for each chip and hour."""
        hours = self.estimate_hours(mfu)
        return None if hours is None else hours * price * self.target.chips


def make_plan(config: Config, on: Target) -> Plan:
    """Compile a configuration's train step for devices. Raises UsageError for what does not divide over them."""
    if config.remat == "auto":
        plans: dict[str, Plan] = {}
        policy = select_remat(config, lambda each: plans.setdefault(each.remat, make_plan(each, on)).memory)
        return plans.get(policy.remat) or make_plan(policy, on)
    model = build_architecture(config.model)
    made = make_layout(config, model, on.devices)
    step, like = make_train_step(config, model, layout=made), abstract_state(config, model, made)
    traced = step.trace(like, abstract_batch(config, made))
    memory = measure_memory(traced.lower(), like, on.available)
    attention = select_kernel(config, model, made)
    return Plan(
        config, model, on, dict(made.mesh.shape), attention, memory, count_product_flops(traced.jaxpr)
    )


@dataclass(frozen=True)
class Trial:
    """A change of the configuration, as key=value, and what the step takes with it."""

    changes: tuple[str, ...]
    memory: Memory


def apply_changes(config: Config, changes: Sequence[str]) -> Config:
    """A configuration with key=value changes."""
    return resolve(apply_overrides(config.to_dict(), list(changes)))


def list_remedies(config: Config, mesh: dict[str, int]) -> list[list[tuple[str, ...]]]:
    """Changes that lower the peak, in the order to be tried: remat, sharding, microbatch, context; mildest first."""
    milder = POLICIES if config.remat == "auto" else POLICIES[: POLICIES.index(config.remat) + 1]
    shards = mesh["data"] * mesh["fsdp"]
    part = config.batch.sequences // config.batch.accumulation
    zero1 = [] if config.mesh.zero1 or shards == 1 else [("mesh.zero1=true",)]
    fsdp = [("mesh.data=1", f"mesh.fsdp={shards}")] if mesh["fsdp"] < shards else []
    more = (2**power for power in range(1, part.bit_length()))
    accumulation = [
        (f"batch.accumulation={config.batch.accumulation * times}",)
        for times in more
        if part % times == 0 and part // times % shards == 0
    ]
    halves = (config.model.context >> power for power in range(1, 20))
    return [
        [(f"remat={policy}",) for policy in POLICIES if policy not in milder],
        zero1 + fsdp,
        accumulation,
        [(f"model.context={length}",) for length in halves if length >= SHORTEST],
    ]


def try_remedies(
    config: Config, mesh: dict[str, int], measure: Callable[[Config], Memory]
) -> Iterator[Trial]:
    """What each remedy alone gives, then all together, one more at a time, up to the first that fits."""
    groups = [group for group in list_remedies(config, mesh) if group]
    together: tuple[str, ...] = ()
    combined = []
    for group in groups:
        combined += [together + changes for changes in group if together]
        together += group[-1]
    for changes in (*(changes for group in groups for changes in group), *combined):
        try:
            trial = Trial(changes, measure(apply_changes(config, changes)))
        except UsageError:
            continue  # what does not divide over the devices is no remedy
        yield trial
        if trial.memory.fits:
            return


def describe_shortage(memory: Memory, place: str) -> str:
    """By how much a step does not fit."""
    least = "" if memory.exact else "at least "
    return (
        f"the step does not fit: it needs {least}{memory.peak / GIB:.1f} GiB a {place} and there are "
        f"{memory.available / GIB:.1f}, {least}{(memory.peak - memory.available) / GIB:.1f} too few"
    )


def describe_remedy(tried: Sequence[Trial]) -> str:
    """The change that makes a step fit, or that none of those tried does."""
    if not tried or not tried[-1].memory.fits:
        return "no remat policy, sharding, microbatch or shorter context makes it fit; take more or larger devices"
    last = tried[-1]
    return f"{' '.join(last.changes)} would make it fit, at {last.memory.peak / GIB:.1f} GiB"


def select_remat(config: Config, measure: Callable[[Config], Memory]) -> Config:
    """The configuration with the mildest remat policy whose step fits, the last when none does; others as they are."""
    if config.remat != "auto":
        return config
    *milder, last = (replace(config, remat=policy) for policy in POLICIES)
    return next((each for each in milder if measure(each).fits), last)


def select_step(
    config: Config, made: Layout, like: Any, make: Callable[[Config], TrainStep]
) -> TrainStep:
    """The step that `make` makes of a configuration, its remat policy settled by the memory of a layout's devices."""
    steps = {
        policy: make(replace(config, remat=policy))
        for policy in POLICIES
        if config.remat in (policy, "auto")
    }
    return steps[select_remat(config, lambda each: measure_step(each, made, steps[each.remat], like)).remat]


def measure_step(config: Config, made: Layout, step: TrainStep, like: Any) -> Memory:
    """What a step takes of the devices that it is for, compiled if it was not yet."""
    available, batch = find_available_memory(made.mesh.local_devices), abstract_batch(config, made)
    asked = (batch.shape, available)
    if asked not in step.memory:
        step.memory[asked] = measure_memory(step.trace(like, batch).lower(), like, available)
    return step.memory[asked]


def require_fit(config: Config, made: Layout, step: TrainStep, like: Any) -> str:
    """Compile the step that a run is about to take; returns what it needs, in words.

    The step's first call finds it compiled. Raises GrowkitError, with advice, when its devices have not the memory.
    """
    memory = measure_step(config, made, step, like)
    available = memory.available
    if memory.fits:
        policy = f", with remat {step.remat}" if config.remat == "auto" else ""
        return f"memory: a step takes {memory.peak / GIB:.2f} of {available / GIB:.1f} GiB a device{policy}"
    devices = list(made.mesh.devices.flat)
    on = Target("here", devices, len(devices), available, None, "device")
    tried = list(try_remedies(config, dict(made.mesh.shape), lambda config: make_plan(config, on).memory))
    raise GrowkitError(f"{describe_shortage(memory, on.place)}; {describe_remedy(tried)}")
