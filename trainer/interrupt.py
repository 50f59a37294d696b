"""Signals while training: remembered until the loop asks, so that a step, a save or a compilation ends first.

Knows SIGTERM and SIGINT; leaves what to do about them to the loop.
"""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupt:
    """Remembers a SIGTERM or SIGINT until it is asked; a second one acts at once, as it would have before."""

    def __enter__(self) -> Interrupt:
        self.received: int | None = None
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *problem) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number, frame) -> None:
        if self.received is not None:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        self.received = number
