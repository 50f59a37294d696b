"""How fast a run goes: tokens a second, of all devices and of one, and their share of what the devices could do.

Knows the formula and the peak it is measured by; leaves when to take the time to the loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from growkit.quantity import format_count
from trainer.devices.accelerators import peak_flops


@dataclass(frozen=True)
class Utilization:
    """Model FLOPs utilization (MFU) on `devices` like `device`, after PaLM (arXiv 2204.02311), appendix B.

    flops_per_token: those that the model needs, and not those that recomputation (remat) adds.
    """

    device: Any
    devices: int
    flops_per_token: float

    @property
    def formula(self) -> str:
        """The formula with its numbers."""
        peak, kind = peak_flops(self.device), self.device.device_kind
        known = f"{peak / 1e12:g} TFLOP/s" if peak else "unknown"
        return (
            f"MFU = FLOPs a token ({self.flops_per_token:.4g}) x tokens/s / (devices ({self.devices}) x peak); "
            f"peak of {kind}, dense bfloat16: {known}"
        )

    def compute_mfu(self, speed: float) -> float | None:
        """The MFU at `speed` tokens a second; None on devices whose peak is not known."""
        peak = peak_flops(self.device)
        return self.flops_per_token * speed / (self.devices * peak) if peak else None

    def describe(self, speed: float | None) -> str:
        """`speed` in tokens a second, for a line of the log; None for one that is not known yet."""
        if speed is None:
            return "tokens/s unknown yet"
        each = f" ({format_count(speed / self.devices)} a device)" if self.devices > 1 else ""
        share = self.compute_mfu(speed)
        return f"{format_count(speed)} tokens/s{each}  MFU {'unknown' if share is None else f'{share:.1%}'}"


class Stopwatch:
    """Tokens a second since the last time they were asked for, or since it was set."""

    def __init__(self, tokens: int):
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        """Start from here: what was before, as compiling, saving and validating, does not count."""
        self.begun, self.tokens = time.monotonic(), tokens

    def read(self, tokens: int) -> float | None:
        """The speed up to `tokens`, from where the next one counts; None when there were none."""
        seconds, more = time.monotonic() - self.begun, tokens - self.tokens
        self.restart(tokens)
        return more / max(seconds, 1e-9) if more > 0 else None
