"""Signals while training: remembered until the loop asks, so that a step, a save or a compilation ends first.

Knows SIGTERM and SIGINT, and that several processes stop at the same step; leaves what to do to the loop.
"""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from trainer.devices.hosts import Agreement

REPEAT = 1.0


class Interrupt:
    """Remembers a SIGTERM or SIGINT until it is asked; a later one acts at once, as it would have before.

    Supervisors signal a process and then its group: a repeat within REPEAT seconds is the same signal.
    """

    def __enter__(self) -> Interrupt:
        self.received: int | None = None
        self.received_at = 0.0
        self.agreement = Agreement()
        self.agreed: int | None = None
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {
                number: signal.signal(number, self._remember)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *problem) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def stop(self) -> int | None:
        """The signal to stop by, None for none; the same in every process between two calls of `ask`."""
        return self.received if self.agreement.single_process else self.agreed

    def ask(self, due: bool = False) -> bool:
        """Hear of the signals of all processes, and whether anything is due in any of them, by its clock."""
        number, due = self.agreement.exchange(self.received or 0, int(due))
        self.agreed = self.agreed or number or None
        return bool(due)

    def stopped(self) -> bool:
        """Hear of the signals of all processes; whether there was one."""
        self.ask()
        return self.stop is not None

    def _remember(self, number, frame) -> None:
        if self.received is not None and time.monotonic() - self.received_at < REPEAT:
            return
        if self.received is not None:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        self.received, self.received_at = number, time.monotonic()
