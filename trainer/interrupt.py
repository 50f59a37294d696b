"""Signals while training: remembered until the loop asks, so that a step, a save or a compilation ends first.

Knows SIGTERM and SIGINT; leaves what to do about them to the loop.
"""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

REPEAT = 1.0


class Interrupt:
    """Remembers a SIGTERM or SIGINT until it is asked; a later one acts at once, as it would have before.

    Supervisors signal a process and then its group: a repeat within REPEAT seconds is the same signal.
    """

    def __enter__(self) -> Interrupt:
        self.received: int | None = None
        self.received_at = 0.0
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *problem) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number, frame) -> None:
        if self.received is not None and time.monotonic() - self.received_at < REPEAT:
            return
        if self.received is not None:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        self.received, self.received_at = number, time.monotonic()
