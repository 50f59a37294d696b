"""Which part of each array each device holds: rules {logical axis: mesh axes} for the axis table.

A mesh has four axes. The sequences of a batch are split over data, fsdp and expert; parameters and
their moments over fsdp; heads, hidden units and the vocabulary over tensor; the experts of a
mixture over expert; with ZeRO-1 the moments over data too. A dimension that fuses several logical
axes is split by the first one, the outermost in memory: (head qkv head_dim) is split by heads, (kv
group head_dim) by key and value heads, so that a device has whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from growkit.errors import UsageError
from growkit.models.architecture import Architecture
from growkit.models.notation import Row
from trainer.config import sections as config

Rules = Mapping[str, tuple[str, ...]]

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
# The axes of heads, hidden units and the vocabulary.
WIDTHS = ("head", "kv", "mlp", "moe_intermediate_size", "vocab")
# A parameter in use: whole, except for tensor parallelism (Megatron-LM, arXiv 1909.08053) and for
# experts, of which each device has some (GShard, arXiv 2006.16668).
COMPUTE_RULES = {axis: ("tensor",) for axis in WIDTHS} | {"expert": ("expert",)}
# A parameter at rest: split (fully sharded data parallelism; ZeRO-3, arXiv 1910.02054).
PARAMETER_RULES = COMPUTE_RULES | {"embed": ("fsdp",)}
# Moments, and the gradients that update them (ZeRO-1 and 2). fsdp comes first, so that a part of a
# moment is of a part of its parameter.
ZERO_RULES = COMPUTE_RULES | {"embed": ("fsdp", "data")}


def make_mesh(settings: config.Mesh, devices: Sequence[Any]) -> jax.sharding.Mesh:
    """The mesh that a mesh section asks for; data 0 takes all devices that the others leave.

    A single process may use fewer devices than it has. Raises UsageError for sizes for which there
    are no devices.
    """
    others = (settings.fsdp, settings.expert, settings.tensor)
    rest = math.prod(others)
    if not settings.data and len(devices) % rest:
        allowed = _list_divisors(len(devices))
        raise UsageError(
            f"mesh.fsdp x mesh.expert x mesh.tensor = {' x '.join(map(str, others))} does not "
            f"divide the {len(devices)} devices; their product may be {allowed}"
        )
    data = settings.data or len(devices) // rest
    shape = (data, *others)
    size = math.prod(shape)
    several_processes = len({device.process_index for device in devices}) > 1
    if size > len(devices) or (several_processes and size < len(devices)):
        raise UsageError(
            f"mesh.data x mesh.fsdp x mesh.expert x mesh.tensor = {' x '.join(map(str, shape))} "
            f"asks for {size} devices, and there are {len(devices)}; mesh.data=0 takes as many as "
            f"are left"
        )
    # Neighbours on the mesh become neighbours on the chips' network; splitting axes over it is
    # slower than not, and better than refusing a shape.
    ordered = mesh_utils.create_device_mesh(shape, devices[:size], allow_split_physical_axes=True)
    return jax.sharding.Mesh(ordered, MESH_AXES)


@dataclass(frozen=True)
class Layout:
    """How a model's arrays lie on a mesh. Made by `make_layout`, which checks that they can."""

    mesh: jax.sharding.Mesh
    zero1: bool = True

    @property
    def batch_shards(self) -> int:
        """How many parts the sequences of a batch are split into."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    @property
    def platform(self) -> str:
        """The kind of the devices, which need not be on this machine: cpu, gpu or tpu."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of an array of which every device has a copy."""
        return self.make_sharding()

    @property
    def moment_rules(self) -> Rules:
        """The rules for moments, and for the gradients that update them."""
        return ZERO_RULES if self.zero1 else PARAMETER_RULES

    def make_sharding(self, *spec: Any) -> NamedSharding:
        """Sharding of an array by the mesh axes of each dimension."""
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def batch_sharding(self, dimension: int = 0) -> NamedSharding:
        """Sharding of a batch whose sequences are along `dimension`."""
        return self.make_sharding(*[None] * dimension, BATCH_AXES)

    def row_sharding(self, row: Row, rules: Rules, stacked: bool = True) -> NamedSharding:
        """Sharding of a row's parameter by rules.

        stacked: whether the array is of all layers, which come first, or of one layer.
        """
        # Layers are never split: every device has a part of each, so that all work on one layer at
        # once.
        units = [axis.name for axis in row.stacked if stacked or axis.name != "layer"]
        return self.make_sharding(*(rules.get(axis) for axis in (*units, *row.leading_axes)))

    def parameter_sharding(self, row: Row) -> NamedSharding:
        """Sharding of a parameter at rest."""
        return self.row_sharding(row, PARAMETER_RULES)

    def moment_sharding(self, row: Row) -> NamedSharding:
        """Sharding of a parameter's moments, and of the gradient that updates them."""
        return self.row_sharding(row, self.moment_rules)

    def constrain(self, array: jax.Array, sharding: NamedSharding) -> jax.Array:
        """Make the compiler use this sharding for an array; does nothing on one device."""
        if self.mesh.size == 1:
            return array
        return jax.lax.with_sharding_constraint(array, sharding)

    def gather_parameter(self, array: jax.Array, row: Row) -> jax.Array:
        """One layer's parameter as computing needs it; its gradient is sharded like the moments."""
        if self.mesh.size == 1:
            return array
        gathered = self.row_sharding(row, COMPUTE_RULES, stacked=False)
        gradient = self.row_sharding(row, self.moment_rules, stacked=False)
        return _reshard(array, gathered, gradient)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reshard(array: jax.Array, forward: NamedSharding, backward: NamedSharding) -> jax.Array:
    """The array with one sharding, its gradient with another."""
    return jax.lax.with_sharding_constraint(array, forward)


def _reshard_forward(
    array: jax.Array, forward: NamedSharding, backward: NamedSharding
) -> tuple[jax.Array, None]:
    return _reshard(array, forward, backward), None


def _reshard_backward(
    forward: NamedSharding, backward: NamedSharding, saved: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, backward),)


_reshard.defvjp(_reshard_forward, _reshard_backward)


def target_platform(layout: Layout | None) -> str:
    """The platform that a program is for: that of a layout, or without one this machine's."""
    return layout.platform if layout else jax.default_backend()


def make_single_device_layout() -> Layout:
    """The layout with everything on the first device."""
    return Layout(make_mesh(config.Mesh(data=1), jax.devices()[:1]))


def make_layout(
    settings: config.Config, model: Architecture, devices: Sequence[Any] | None = None
) -> Layout:
    """The layout of a run on some devices, by default all.

    Raises UsageError for sizes of the model or the batch that the mesh does not divide.
    """
    mesh = make_mesh(settings.mesh, jax.devices() if devices is None else devices)
    layout = Layout(mesh, settings.mesh.zero1)
    if mesh.shape["expert"] > 1 and "expert" not in model.sizes:
        raise UsageError(
            f"mesh.expert={mesh.shape['expert']} splits the experts of a mixture, and a "
            f"{model.family.title} model has none; leave it 1"
        )
    part = settings.batch.sequences // settings.batch.accumulation
    if part % layout.batch_shards:
        shape = " x ".join(str(mesh.shape[axis]) for axis in BATCH_AXES)
        raise UsageError(
            f"batch.sequences / batch.accumulation = {part} sequences do not divide over mesh.data "
            f"x mesh.fsdp x mesh.expert = {shape}; their product may be "
            f"{_list_divisors(part)}{_suggest_batch(settings, layout.batch_shards)}"
        )
    for rules in (COMPUTE_RULES, PARAMETER_RULES, layout.moment_rules):
        for axis, mesh_axes in rules.items():
            _check_divides(model, mesh, axis, mesh_axes)
    return layout


def _suggest_batch(settings: config.Config, shards: int) -> str:
    """The clause that names the nearest batch in tokens, where it was given so."""
    if not settings.batch.tokens:
        return ""
    step = settings.batch.accumulation * shards * settings.model.context
    return f", or batch.tokens={max(1, round(settings.batch.tokens / step)) * step}"


def _check_divides(
    model: Architecture, mesh: jax.sharding.Mesh, axis: str, mesh_axes: tuple[str, ...]
) -> None:
    """Refuse an axis of the model that some mesh axes do not split into equal parts."""
    if axis not in model.sizes:
        return
    size = model.sizes[axis]
    parts = math.prod(mesh.shape[name] for name in mesh_axes)
    if size % parts:
        names = " x ".join(f"mesh.{name}" for name in mesh_axes)
        without = ""
        if "data" in mesh_axes:
            without = ", or mesh.zero1=false keeps the optimizer state whole"
        raise UsageError(
            f"{axis} {size} does not divide over {names} = {parts}; it may be "
            f"{_list_divisors(size)}{without}"
        )


def _list_divisors(number: int) -> str:
    """The divisors of a number, in words: 1, 2 or 4."""
    divisors = [str(part) for part in range(1, number + 1) if number % part == 0]
    *others, last = divisors
    return f"{', '.join(others)} or {last}" if others else last


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on the mesh; each device gets its own part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
