"""FLOPs as time and money, at an assumed MFU (model FLOPs utilization) and price of a chip.

Imports jax only for devices that must be looked up on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from growkit.errors import UsageError
from trainer.devices.accelerators import parse_slice

MFU = 0.4  # assumed unless the user says otherwise
HOUR = 3600  # seconds
DAY = 24 * HOUR


def estimate_seconds(flops: float, mfu: float, peak: float | None) -> float | None:
    """Seconds that model FLOPs take: flops / (mfu x peak). None where the peak is not known."""
    if peak is None:
        return None
    return flops / (mfu * peak)


def estimate_price(hours: float, chips: int, price: float) -> float:
    """What chips cost for some hours, at a price of a chip and hour."""
    return hours * price * chips


def require_mfu(mfu: float) -> None:
    """Raise UsageError for an MFU outside (0, 1]."""
    if not 0 < mfu <= 1:
        raise UsageError(f"--mfu must be above 0 and at most 1, got {mfu:g}")


@dataclass(frozen=True)
class Devices:
    """Where training would happen.

    peak: FLOP/s of all chips together, None if unknown. price: of a chip and hour, None if not
    given.
    """

    name: str
    chips: int
    peak: float | None
    mfu: float
    price: float | None

    def estimate_days(self, flops: float | None) -> float | None:
        """Days that some FLOPs take; None where they or the peak FLOP/s are not known."""
        if flops is None:
            return None
        seconds = estimate_seconds(flops, self.mfu, self.peak)
        return None if seconds is None else seconds / DAY

    def estimate_cost(self, flops: float | None) -> float | None:
        """What some FLOPs cost; None where the time or the price is not known."""
        days = self.estimate_days(flops)
        if days is None or self.price is None:
            return None
        return estimate_price(days * 24, self.chips, self.price)


def find_devices(topology: str, mfu: float, price: float | None) -> Devices:
    """The devices of a TPU slice, or for `cpu` and `gpu` this machine's. Raises UsageError."""
    require_mfu(mfu)
    if topology in ("cpu", "gpu"):
        from trainer.plan.topology import find_target  # imports jax

        target = find_target(topology)
        return Devices(topology, target.chips, target.peak, mfu, price)
    tpu_slice = parse_slice(topology)
    peak = tpu_slice.chips * tpu_slice.accelerator.peak
    return Devices(topology, tpu_slice.chips, peak, mfu, price)
