"""Where arrays lie on a mesh of devices: {logical axis: mesh axes}, applied to the rows of the axis table.

A mesh has three axes. Sequences are split over data and fsdp; parameters and their moments over fsdp; heads, the
mlp and the vocabulary over tensor; with ZeRO-1 the moments over data as well. A dimension of fused axes is split
by its first, the outermost in memory: (head qkv head_dim) by heads. Knows rows and meshes; leaves what is computed
to the step and files to checkpoints.
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

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# What a layer computes with: all of it but for tensor parallelism (Megatron-LM, arXiv 1909.08053).
COMPUTE_RULES = {"head": ("tensor",), "mlp": ("tensor",), "vocab": ("tensor",)}
# Between uses parameters lie in parts (fully sharded data parallelism; ZeRO-3, arXiv 1910.02054).
PARAMETER_RULES = COMPUTE_RULES | {"embed": ("fsdp",)}
# Optimizer state and the gradients that go into it (ZeRO-1 and 2). fsdp first: a part of a stored part.
ZERO_RULES = COMPUTE_RULES | {"embed": ("fsdp", "data")}


def make_mesh(settings: config.Mesh, devices: Sequence[Any]) -> jax.sharding.Mesh:
    """The mesh of a mesh section over `devices`: data 0 takes all that fsdp and tensor leave.

    One process may use fewer devices than it has. Raises UsageError for sizes that the devices do not give.
    """
    rest = settings.fsdp * settings.tensor
    if not settings.data and len(devices) % rest:
        raise UsageError(
            f"mesh.fsdp x mesh.tensor = {settings.fsdp} x {settings.tensor} does not divide the {len(devices)} "
            f"devices; their product may be {_either(_divisors(len(devices)))}"
        )
    shape = (settings.data or len(devices) // rest, settings.fsdp, settings.tensor)
    size = math.prod(shape)
    several = len({device.process_index for device in devices}) > 1
    if size > len(devices) or (several and size < len(devices)):
        raise UsageError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {' x '.join(map(str, shape))} asks for {size} devices, and there "
            f"are {len(devices)}; mesh.data=0 takes as many as are left"
        )
    ordered = mesh_utils.create_device_mesh(shape, devices[:size], allow_split_physical_axes=True)
    return jax.sharding.Mesh(ordered, MESH_AXES)


@dataclass(frozen=True)
class Layout:
    """How a model's arrays lie on a mesh. Made by `make_layout`, which checks that they can."""

    mesh: jax.sharding.Mesh
    zero1: bool = True

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch of sequences is split."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    @property
    def platform(self) -> str:
        """What the devices are: cpu, gpu or tpu, be they here or not."""
        return self.mesh.devices.flat[0].platform

    @property
    def replicated(self) -> NamedSharding:
        """A copy on every device."""
        return self.make_sharding()

    def make_sharding(self, *spec: Any) -> NamedSharding:
        """The sharding of an array by the mesh axes of each dimension."""
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def batch_sharding(self, dimension: int = 0) -> NamedSharding:
        """That of sequences that are counted in `dimension`, all others whole."""
        return self.make_sharding(*[None] * dimension, BATCH_AXES)

    def row_sharding(
        self, row: Row, rules: Mapping[str, tuple[str, ...]], layers: bool = True
    ) -> NamedSharding:
        """That of a row's parameter by rules, with the layers stacked first or of one layer."""
        spec = [rules.get(axis) for axis in row.leading_axes]
        return self.make_sharding(*[None] * (layers * len(row.stacked)), *spec)

    def parameter_sharding(self, row: Row) -> NamedSharding:
        """That of a row's parameter between steps."""
        return self.row_sharding(row, PARAMETER_RULES)

    def moment_sharding(self, row: Row) -> NamedSharding:
        """That of its moments, and of the gradient that they take in."""
        return self.row_sharding(row, self.moment_rules)

    @property
    def moment_rules(self) -> Mapping[str, tuple[str, ...]]:
        """The rules for moments and gradients."""
        return ZERO_RULES if self.zero1 else PARAMETER_RULES

    def constrain(self, array: jax.Array, sharding: NamedSharding) -> jax.Array:
        """Have the compiler lay an array out so. On one device nothing is said, and the program stays as it is."""
        return array if self.mesh.size == 1 else jax.lax.with_sharding_constraint(array, sharding)

    def gather_parameter(self, array: jax.Array, row: Row) -> jax.Array:
        """One layer's parameter as computing needs it; its gradient comes back as the moments lie."""
        if self.mesh.size == 1:
            return array
        return _gathered(
            array, self.row_sharding(row, COMPUTE_RULES, layers=False), self.row_sharding(row, self.moment_rules, layers=False)
        )


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(array: jax.Array, there: NamedSharding, back: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(array, there)


def _gathered_forward(array, there, back):
    return _gathered(array, there, back), None


def _gathered_backward(there, back, saved, gradient):
    return (jax.lax.with_sharding_constraint(gradient, back),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def target_platform(layout: Layout | None) -> str:
    """What a program is for: a layout's devices, which need not be here, or without one this machine's."""
    return layout.platform if layout else jax.default_backend()


def make_single_device_layout() -> Layout:
    """Everything on the first device."""
    return Layout(make_mesh(config.Mesh(data=1), jax.devices()[:1]))


def make_layout(settings: config.Config, model: Architecture, devices: Sequence[Any] | None = None) -> Layout:
    """The layout of a run on devices (all there are, unless told). Raises UsageError for what does not divide."""
    mesh = make_mesh(settings.mesh, jax.devices() if devices is None else devices)
    made = Layout(mesh, settings.mesh.zero1)
    part = settings.batch.sequences // settings.batch.accumulation
    if part % made.batch_shards:
        raise UsageError(
            f"batch.sequences / batch.accumulation = {part} sequences do not divide over mesh.data x mesh.fsdp = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']}; their product may be {_either(_divisors(part))}"
        )
    for rules in (COMPUTE_RULES, PARAMETER_RULES, made.moment_rules):
        for axis, over in rules.items():
            _check_divides(model, mesh, axis, over)
    return made


def _check_divides(model: Architecture, mesh: jax.sharding.Mesh, axis: str, over: tuple[str, ...]) -> None:
    size, parts = model.sizes[axis], math.prod(mesh.shape[name] for name in over)
    if size % parts:
        names = " x ".join(f"mesh.{name}" for name in over)
        without = ", or mesh.zero1=false keeps the optimizer state whole" if "data" in over else ""
        raise UsageError(
            f"{axis} {size} does not divide over {names} = {parts}; it may be {_either(_divisors(size))}{without}"
        )


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def _either(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on the mesh; each device is given its own part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
