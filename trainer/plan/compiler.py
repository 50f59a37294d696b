"""What XLA says of a training step: the memory a device needs, and the FLOPs of its products.

The memory is that of the target's own compiler, so it includes the buffers that the compiler adds
and those it reuses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from growkit.models.architecture import Architecture
from trainer.config.sections import Config, build_architecture
from trainer.devices.sharding import Layout, make_layout
from trainer.plan.estimate import count_kept_bytes
from trainer.step.update import State, abstract_state, make_train_step

# Rematerialisation policies, mildest first: each recomputes more and keeps less than the one
# before.
POLICIES = ("none", "dots", "half", "full")
UNITS = "BKMGT"  # of the sizes in the compiler's messages, each 1024 times the one before


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs on one device.

    temporaries: activations, gradients and the compiler's own buffers. exact: False when the
    compiler refused the program; `temporaries` is then a lower bound. estimated: whether the
    compiler was not asked, because the lower bound is more than there is.
    """

    parameters: int
    optimizer: int
    temporaries: int
    other: int
    available: int
    exact: bool = True
    estimated: bool = False

    @property
    def peak(self) -> int:
        return self.parameters + self.optimizer + self.temporaries + self.other

    @property
    def fits(self) -> bool:
        return self.exact and self.peak <= self.available


@dataclass(frozen=True)
class CompiledStep:
    """A compiled training step. config: the step's configuration, with `remat: auto` resolved."""

    config: Config
    model: Architecture
    layout: Layout
    jaxpr: Any
    memory: Memory


def compile_step(config: Config, devices: Sequence[Any], available: int) -> CompiledStep:
    """Compile a configuration's training step for devices with `available` bytes each.

    With `remat: auto` this is the mildest policy that fits, or the harshest when none does. Raises
    UsageError for sizes that cannot be divided over the devices.
    """
    *milder, harshest = list_policies(config)
    for policy in milder:
        compiled = _compile(replace(config, remat=policy), devices, available)
        if compiled.memory.fits:
            return compiled
    return _compile(replace(config, remat=harshest), devices, available)


def _compile(config: Config, devices: Sequence[Any], available: int) -> CompiledStep:
    model = build_architecture(config.model)
    layout = make_layout(config, model, devices)
    step = make_train_step(config, model, layout=layout)
    like = abstract_state(config, model, layout)
    traced = step.trace(like, abstract_batch(config, layout))
    memory = estimate_shortage(traced.jaxpr, like, layout, available)
    if memory is None:
        memory = measure_memory(traced.lower(), like, available)
    return CompiledStep(config, model, layout, traced.jaxpr, memory)


def list_policies(config: Config) -> tuple[str, ...]:
    """The rematerialisation policies that a configuration allows, mildest first."""
    if config.remat == "auto":
        return POLICIES
    return (config.remat,)


def abstract_batch(config: Config, layout: Layout) -> jax.ShapeDtypeStruct:
    """The shape and sharding of a step's tokens: [accumulation, sequences, context + 1]."""
    parts = config.batch.accumulation
    shape = (parts, config.batch.sequences // parts, config.model.context + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.batch_sharding(1))


def estimate_step(config: Config, devices: Sequence[Any], available: int) -> Memory:
    """The least memory that a configuration's step needs; nothing is compiled.

    Raises UsageError for sizes that cannot be divided over the devices.
    """
    model = build_architecture(config.model)
    layout = make_layout(config, model, devices)
    like = abstract_state(config, model, layout)
    step = make_train_step(config, model, layout=layout)
    traced = step.trace(like, abstract_batch(config, layout))
    return _estimate_memory(traced.jaxpr, like, layout, available)


def estimate_shortage(jaxpr: Any, like: State, layout: Layout, available: int) -> Memory | None:
    """A lower bound of what a step needs where that is more than there is, else None.

    A TPU's compiler refuses such a step itself, with better figures; a CPU's compiles it, for
    minutes.
    """
    if layout.mesh.devices.flat[0].platform == "tpu":
        return None
    least = _estimate_memory(jaxpr, like, layout, available)
    return None if least.fits else least


def _estimate_memory(jaxpr: Any, like: State, layout: Layout, available: int) -> Memory:
    """A lower bound: the state, and what the loop over layers keeps, divided over all devices."""
    parameters = count_bytes(like.params)
    optimizer = count_bytes(like.optimizer)
    kept = count_kept_bytes(jaxpr) // layout.mesh.devices.size
    exact = parameters + optimizer + kept <= available
    return Memory(parameters, optimizer, kept, 0, available, exact, estimated=True)


def measure_memory(lowered: Any, like: State, available: int) -> Memory:
    """Compile a lowered step and read how much memory it needs on a device.

    like: the abstract state that the step takes. Raises the compiler's error when it is not about
    memory.
    """
    parameters = count_bytes(like.params)
    optimizer = count_bytes(like.optimizer)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as problem:
        if "RESOURCE_EXHAUSTED" not in str(problem):
            raise
        temporaries, limit = parse_refusal(str(problem), parameters + optimizer)
        return Memory(parameters, optimizer, temporaries, 0, limit or available, exact=False)
    stats = compiled.memory_analysis()
    temporaries = stats.temp_size_in_bytes
    # Donated arguments share their bytes with the outputs, so aliases are counted once.
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    needed = (
        stats.argument_size_in_bytes + outputs + temporaries + stats.generated_code_size_in_bytes
    )
    other = needed - parameters - optimizer - temporaries
    return Memory(parameters, optimizer, temporaries, other, available)


def count_bytes(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def parse_refusal(text: str, state: int) -> tuple[int, int | None]:
    """(bytes of temporaries, bytes available) from the compiler's error for a large program.

    The compiler checks twice. Its first check counts temporaries alone; its last counts everything
    in memory, so the bytes of the state are subtracted. (0, None) for an error of another form.
    """
    size = r"([\d.]+)([BKMGT])"
    first = re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", text)
    if first:
        return _parse_size(first[1], first[2]), _parse_size(first[3], first[4])
    last = re.search(rf"Used {size} of {size} hbm", text)
    if last:
        used = _parse_size(last[1], last[2])
        return max(0, used - state), _parse_size(last[3], last[4])
    return 0, None


def _parse_size(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** UNITS.index(unit))


def count_product_flops(jaxpr: Any) -> float:
    """FLOPs of a program's matrix products, with those of a loop counted at each iteration.

    Products that rematerialisation computes again count again. In a Pallas kernel every block
    counts, including those that a causal mask skips. cuDNN's kernels are opaque and count nothing.
    A loop whose number of turns the data tell, as that over a CPU's blocks of experts, counts once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _count_dot_flops(equation)
        if equation.primitive.name == "ragged_dot_general":
            total += _count_ragged_flops(equation)
        inner = sum(count_product_flops(each) for each in jaxprs_in_params(equation.params))
        total += _count_repeats(equation) * inner
    return total


def _count_dot_flops(equation: Any) -> float:
    """2 FLOPs (multiply and add) for each element of the result and each contracted element."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    terms = math.prod(shape[axis] for axis in contracted)
    return 2.0 * terms * equation.outvars[0].aval.size


def _count_ragged_flops(equation: Any) -> float:
    """The same for rows in groups, each of which is multiplied by its own group's matrix alone."""
    rows, matrix = (variable.aval.shape for variable in equation.invars[:2])
    (contracted, other), _ = equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    groups = equation.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
    columns = [size for axis, size in enumerate(matrix) if axis not in (*other, *groups)]
    return 2.0 * math.prod(rows) * math.prod(columns)


def _count_repeats(equation: Any) -> int:
    """How often the programs inside an equation run, on all devices together."""
    match equation.primitive.name:
        case "scan":
            return equation.params["length"]
        case "pallas_call":
            return math.prod(equation.params["grid_mapping"].grid)
        case "shard_map":
            return equation.params["mesh"].size
    return 1
