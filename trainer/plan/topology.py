"""The devices that a plan compiles for: a TPU slice by name, or the CPU or GPUs of this machine.

XLA compiles for a TPU slice without a TPU: only its compiler, libtpu, must be installed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from growkit.errors import GrowkitError
from trainer.devices.accelerators import GIB, Slice, parse_slice, peak_flops

# Settings for a libtpu that only compiles: ask no cloud service what this machine is, take no lock,
# write no logs.
COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
}
# libtpu assumes that a host of chips with one core each has at least this many of them.
CHIPS_PER_HOST = 8
ERROR_LENGTH = 300  # characters of a compiler's error that are shown


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    available: bytes on each device. peak: FLOP/s of all devices together, None if unknown.
    place: what a device is called here (core, chip or device).
    """

    name: str
    devices: Sequence[Any]
    chips: int
    available: int
    peak: float | None
    place: str


def find_target(name: str) -> Target:
    """The devices of a TPU slice, or for `cpu` and `gpu` those that JAX finds on this machine.

    Raises UsageError for a name that is not a slice, and GrowkitError when libtpu or the device is
    missing.
    """
    if name in ("cpu", "gpu"):
        return _find_local_target(name)
    tpu_slice = parse_slice(name)
    accelerator = tpu_slice.accelerator
    return Target(
        name=name,
        devices=_describe_devices(tpu_slice),
        chips=tpu_slice.chips,
        available=int(accelerator.usable * GIB),
        peak=tpu_slice.chips * accelerator.peak,
        place="core" if accelerator.devices > 1 else "chip",
    )


def _describe_devices(tpu_slice: Slice) -> Sequence[Any]:
    """Devices that programs can be compiled for, but not run on."""
    from jax.experimental.topologies import get_topology_desc

    # Not setdefault: where there is no TPU, importing jax sets some of these to values that
    # libtpu rejects.
    os.environ.update(COMPILE_ONLY)
    native = tpu_slice.native
    try:
        return get_topology_desc(native, "tpu", **_topology_options(tpu_slice)).devices
    except RuntimeError as problem:
        if "not installed" in str(problem):
            raise GrowkitError(
                "a plan for TPUs needs their compiler, libtpu, which runs on any Linux machine: "
                "pip install 'growkit[tpu]'"
            ) from None
        words = " ".join(str(problem).split())[:ERROR_LENGTH]
        raise GrowkitError(f"libtpu does not know the slice {native}: {words}") from None


def _topology_options(tpu_slice: Slice) -> dict[str, Any]:
    """The options by which libtpu describes a slice as it is usually run."""
    accelerator = tpu_slice.accelerator
    options: dict[str, Any] = {}
    if accelerator.dimensions == 3:
        # The two cores of a v4 or v5p chip work as one device.
        options["chip_config_name"] = "megacore"
    if tpu_slice.chips < CHIPS_PER_HOST and accelerator.devices == 1:
        options["chips_per_host_bounds"] = (*tpu_slice.shape, 1)[:3]
    return options


def _find_local_target(platform: str) -> Target:
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        raise GrowkitError(f"JAX finds no {platform} on this machine to compile for") from None
    peak = peak_flops(devices[0])
    return Target(
        name=platform,
        devices=devices,
        chips=len(devices),
        available=find_available_memory(devices),
        peak=None if peak is None else peak * len(devices),
        place="device",
    )


def find_available_memory(devices: Sequence[Any]) -> int:
    """Bytes that a program may use on each device.

    CPU devices share the machine's memory in equal parts.
    """
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    process = devices[0].process_index
    sharing = sum(device.process_index == process for device in devices)
    return memory // sharing
