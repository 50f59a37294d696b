"""What is known of accelerators before one is at hand: slices' names, cores, memory and peak FLOP/s.

Knows facts, each with its source; leaves what a program needs of them to the plan. Imports no jax.
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
    """A kind of TPU chip, of which JAX sees `devices`; `counted` of them are one in the number of a slice's name.

    memory: GiB of HBM a chip. usable: GiB a device that the compiler lets a program have, as it says itself when
    it refuses one (libtpu 0.0.42). peak: bfloat16 FLOP/s a chip. dimensions: of the grid in which chips are wired.
    """

    native: str
    devices: int
    counted: int
    memory: int
    usable: float
    peak: float
    dimensions: int


# Memory and peak: cloud.google.com/tpu/docs/v2, v3, v4, v5e, v5p, v6e. Cores are devices on v2 and v3; on v4 and v5p a
# chip's two cores work as one device ("megacore"), and names still count cores.
TPUS = {
    "v2": Accelerator("v2", 2, 2, 16, 7.48, 45e12, 2),
    "v3": Accelerator("v3", 2, 2, 32, 15.48, 123e12, 2),
    "v4": Accelerator("v4", 1, 2, 32, 30.75, 275e12, 3),
    "v5e": Accelerator("v5e", 1, 1, 16, 15.75, 197e12, 2),
    "v5p": Accelerator("v5", 1, 2, 95, 95.74, 459e12, 3),
    "v6e": Accelerator("v6e", 1, 1, 32, 31.25, 918e12, 2),
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v6lite": "v6e"}
# Peak dense bfloat16 FLOP/s of a device by what JAX calls it (`device.device_kind`); NVIDIA's from its data sheets.
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


@dataclass(frozen=True)
class Slice:
    """Some chips of one kind, wired in a grid."""

    accelerator: Accelerator
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """How many devices JAX sees."""
        return self.chips * self.accelerator.devices

    @property
    def native(self) -> str:
        """The name by which libtpu knows it."""
        return f"{self.accelerator.native}:{'x'.join(map(str, self.shape))}"


def parse_slice(name: str) -> Slice:
    """A slice by its usual name (v3-32, v5litepod-16) or its native one (v3:4x4). Raises UsageError."""
    found = re.fullmatch(r"(v\d[a-z]*)(?:-(\d+)|:(\d+(?:x\d+)*))", name.strip().lower())
    generation = ALIASES.get(found[1], found[1]) if found else ""
    if not found or generation not in TPUS:
        known = [f"{each}-{8 * accelerator.counted}" for each, accelerator in TPUS.items()]
        raise UsageError(
            f"--topology is cpu, gpu or a slice of TPUs as {', '.join(known)}, or natively v3:4x4; got {name!r}"
            f"{did_you_mean(name, known)}"
        )
    accelerator = TPUS[generation]
    if found[3]:
        return Slice(
            accelerator,
            _checked(tuple(map(int, found[3].split("x"))), name, accelerator.dimensions),
        )
    chips, rest = divmod(int(found[2]), accelerator.counted)
    if rest or chips < 1:
        raise UsageError(
            f"{generation} has {accelerator.counted} cores a chip, and {name!r} counts {found[2]} of them"
        )
    return Slice(accelerator, _grid(chips, accelerator.dimensions, name))


def _checked(shape: tuple[int, ...], name: str, dimensions: int) -> tuple[int, ...]:
    if len(shape) != dimensions or min(shape) < 1:
        raise UsageError(
            f"a slice like {name!r} has {dimensions} dimensions, as {'x'.join(['2', '2', '4'][:dimensions])}"
        )
    return shape


def _grid(chips: int, dimensions: int, name: str) -> tuple[int, ...]:
    """The grid of a slice by its number of chips: powers of two, as even as can be, the later dimensions longer.

    Four chips are a host's, 2x2 or 2x2x1. cloud.google.com/tpu/docs/v4#topologies lists the same shapes.
    """
    power = chips.bit_length() - 1
    if chips != 2**power:
        raise UsageError(f"{name!r} is {chips} chips, no power of two; name its grid, as v4:4x4x12")
    if dimensions == 3 and power <= 2:
        return (2,) * power + (1,) * (3 - power)
    short, longer = divmod(power, dimensions)
    return tuple(2 ** (short + (place >= dimensions - longer)) for place in range(dimensions))


def peak_flops(device: Any) -> float | None:
    """The peak dense bfloat16 FLOP/s of a device of JAX's; None for one that is not known."""
    kind = str(device.device_kind)
    return next(
        (peak for name, peak in sorted(PEAKS.items(), reverse=True) if kind.startswith(name)), None
    )


def tpu_generation(device: Any) -> int:
    """4 of a "TPU v4", 5 of a "TPU v5 lite", 7 of a "TPU7x"; 0 of what is no TPU."""
    found = re.match(r"TPU ?v?(\d+)", str(device.device_kind))
    return int(found[1]) if found else 0


def compute_capability(device: Any) -> float:
    """Of an NVIDIA GPU: 8.0 and more from Ampere on, 9.0 from Hopper on; 0 of what is none."""
    if not str(device.device_kind).startswith("NVIDIA"):
        return 0.0
    return float(device.compute_capability)
