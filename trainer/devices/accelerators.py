"""Facts about accelerators: memory, peak FLOP/s, and the names and shapes of TPU slices.

They are known without a device at hand, so that a plan can be made on any machine. Imports no jax.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from growkit.errors import UsageError, did_you_mean

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """A kind of TPU chip."""

    native: str  # libtpu's name
    devices: int  # devices that JAX sees, of one chip
    cores: int  # what a chip counts for in the number of a slice's name
    memory: int  # HBM, GiB a chip
    usable: float  # GiB a device that programs get, as the compiler's refusals say (libtpu 0.0.42)
    peak: float  # bfloat16 FLOP/s a chip
    dimensions: int  # of the grid in which chips are wired


# Memory and peak: cloud.google.com/tpu/docs/v2, v3, v4, v5e, v5p, v6e. Cores are devices on v2 and
# v3. On v4 and v5p a chip's two cores work as one device ("megacore"), and names still count cores.
TPUS = {
    "v2": Accelerator("v2", 2, 2, 16, 7.48, 45e12, 2),
    "v3": Accelerator("v3", 2, 2, 32, 15.48, 123e12, 2),
    "v4": Accelerator("v4", 1, 2, 32, 30.75, 275e12, 3),
    "v5e": Accelerator("v5e", 1, 1, 16, 15.75, 197e12, 2),
    "v5p": Accelerator("v5", 1, 2, 95, 95.74, 459e12, 3),
    "v6e": Accelerator("v6e", 1, 1, 32, 31.25, 918e12, 2),
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v6lite": "v6e"}
# Peak dense bfloat16 FLOP/s of a device, by the beginning of JAX's name for it
# (`device.device_kind`). NVIDIA's are from its data sheets.
PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}

# A generation, then cores (v3-32) or a grid (v3:4x4).
_SLICE = re.compile(r"(v\d[a-z]*)(?:-(\d+)|:(\d+(?:x\d+)*))")


@dataclass(frozen=True)
class Slice:
    """Some chips of one kind, wired in a grid."""

    accelerator: Accelerator
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many chips the grid has."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """How many devices JAX sees."""
        return self.chips * self.accelerator.devices

    @property
    def native(self) -> str:
        """libtpu's name, as v3:4x4."""
        return f"{self.accelerator.native}:{'x'.join(map(str, self.shape))}"


def parse_slice(name: str) -> Slice:
    """A slice by its usual name (v3-32, v5litepod-16) or its native one (v3:4x4).

    Raises UsageError for names and grids that no slice has.
    """
    found = _SLICE.fullmatch(name.strip().lower())
    if not found:
        raise UsageError(_describe_unknown(name))
    generation, cores, grid = found.groups()
    generation = ALIASES.get(generation, generation)
    if generation not in TPUS:
        raise UsageError(_describe_unknown(name))
    accelerator = TPUS[generation]
    if grid:
        shape = tuple(int(size) for size in grid.split("x"))
        _check_shape(shape, name, accelerator.dimensions)
        return Slice(accelerator, shape)
    chips, rest = divmod(int(cores), accelerator.cores)
    if rest or chips < 1:
        raise UsageError(
            f"{generation} has {accelerator.cores} cores a chip, and {name!r} counts {cores} of "
            f"them"
        )
    return Slice(accelerator, _find_shape(chips, accelerator.dimensions, name))


def _describe_unknown(name: str) -> str:
    """The sentence that no slice has this name."""
    known = [f"{each}-{8 * accelerator.cores}" for each, accelerator in TPUS.items()]
    return (
        f"--topology is cpu, gpu or a slice of TPUs as {', '.join(known)}, or natively v3:4x4; "
        f"got {name!r}{did_you_mean(name, known)}"
    )


def _check_shape(shape: tuple[int, ...], name: str, dimensions: int) -> None:
    if len(shape) != dimensions or min(shape) < 1:
        example = "x".join(["2", "2", "4"][:dimensions])
        raise UsageError(f"a slice like {name!r} has {dimensions} dimensions, as {example}")


def _find_shape(chips: int, dimensions: int, name: str) -> tuple[int, ...]:
    """The grid of a slice with so many chips: powers of two, nearly equal, later ones larger.

    Four chips are one host's, 2x2 or 2x2x1. The shapes are those listed at
    cloud.google.com/tpu/docs/v4#topologies.
    """
    power = chips.bit_length() - 1
    if chips != 2**power:
        raise UsageError(
            f"{name!r} is {chips} chips, which is not a power of two; name its grid, as v4:4x4x12"
        )
    if dimensions == 3 and power <= 2:
        return (2,) * power + (1,) * (3 - power)
    smaller, extra = divmod(power, dimensions)
    powers = [smaller] * (dimensions - extra) + [smaller + 1] * extra
    return tuple(2**each for each in powers)


def peak_flops(device: Any) -> float | None:
    """The peak dense bfloat16 FLOP/s of one of JAX's devices; None for one that is not known."""
    kind = str(device.device_kind)
    # In reverse order "TPU v5 lite" comes before "TPU v5", which it begins with.
    for name in sorted(PEAKS, reverse=True):
        if kind.startswith(name):
            return PEAKS[name]
    return None


def tpu_generation(device: Any) -> int:
    """4 for a "TPU v4", 5 for a "TPU v5 lite", 7 for a "TPU7x"; 0 for what is not a TPU."""
    found = re.match(r"TPU ?v?(\d+)", str(device.device_kind))
    return int(found[1]) if found else 0


def compute_capability(device: Any) -> float:
    """The compute capability of an NVIDIA GPU: 8.0 for Ampere, 9.0 for Hopper; 0 for others."""
    if not str(device.device_kind).startswith("NVIDIA"):
        return 0.0
    return float(device.compute_capability)
