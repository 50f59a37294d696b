"""How fast a run trains: tokens per second, in total and per device, and MFU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from growkit.quantity import format_count
from trainer.devices.accelerators import peak_flops

SHORTEST_TIME = 1e-9  # seconds; keeps a speed finite where the clock did not move


@dataclass(frozen=True)
class Utilization:
    """Model FLOPs utilization (MFU), after PaLM (arXiv 2204.02311, appendix B).

    devices: how many there are like `device`. flops_per_token: those of the
    model, without what rematerialisation computes again.
    """

    device: Any
    devices: int
    flops_per_token: float

    @property
    def formula(self) -> str:
        """The formula with its numbers; empty for devices whose peak is not known."""
        peak = peak_flops(self.device)
        if not peak:
            return ""
        return (
            f"MFU = FLOPs a token ({self.flops_per_token:.4g}) x tokens/s / "
            f"(devices ({self.devices}) x peak); "
            f"peak of {self.device.device_kind}, dense bfloat16: {peak / 1e12:g} TFLOP/s"
        )

    def compute_mfu(self, speed: float) -> float | None:
        """The MFU at `speed` tokens per second; None on devices whose peak is not known."""
        peak = peak_flops(self.device)
        if not peak:
            return None
        return self.flops_per_token * speed / (self.devices * peak)

    def describe(self, speed: float | None) -> str:
        """`speed` in tokens per second for a line of the log; None when it is not known yet."""
        if speed is None:
            return "tokens/s unknown yet"
        each = f" ({format_count(speed / self.devices)} a device)" if self.devices > 1 else ""
        mfu = self.compute_mfu(speed)
        share = "" if mfu is None else f"  MFU {mfu:.1%}"
        return f"{format_count(speed)} tokens/s{each}{share}"


class Stopwatch:
    """Tokens per second since it was last read or restarted."""

    def __init__(self, tokens: int):
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        """Count from here: compiling, saving and validating before this do not count."""
        self.begun = time.monotonic()
        self.tokens = tokens

    def read(self, tokens: int) -> float | None:
        """The speed up to `tokens`, and restart there; None when there were no tokens."""
        seconds = time.monotonic() - self.begun
        trained = tokens - self.tokens
        self.restart(tokens)
        if trained <= 0:
            return None
        return trained / max(seconds, SHORTEST_TIME)
