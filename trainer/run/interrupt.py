"""Signals while training: remembered until the loop asks, so that a step or a save ends first.

SIGTERM and SIGINT are remembered. Several processes stop at the same step, because they tell each
other of their signals through `trainer.devices.hosts.Agreement`. What to do about a signal is the
loop's decision.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from trainer.devices.hosts import Agreement

REPEAT = 1.0  # seconds within which a second signal counts as the same one
HANDLED = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Remembers a SIGTERM or SIGINT until it is asked. Use as a context manager.

    A second signal acts at once, as it would have without this. Supervisors signal a process and
    then its group, so a signal repeated within REPEAT seconds counts as one.
    """

    def __enter__(self) -> Interrupt:
        self.received: int | None = None
        self.received_at = 0.0
        self.agreement = Agreement()
        self.agreed: int | None = None
        self.before: dict[signal.Signals, Any] = {}
        # Python delivers signals to the main thread only, and only there may a handler be set.
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                self.before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def stop(self) -> int | None:
        """The signal to stop by, None for none.

        Between two calls of `ask` it is the same in every process.
        """
        return self.received if self.agreement.single_process else self.agreed

    def ask(self, due: bool = False) -> bool:
        """Exchange signals with all processes. due: whether a save is due by this process's clock.

        Returns whether it is due by any process's clock.
        """
        number, any_due = self.agreement.exchange(self.received or 0, int(due))
        self.agreed = self.agreed or number or None
        return bool(any_due)

    def stopped(self) -> bool:
        """Exchange signals with all processes; whether there was one."""
        self.ask()
        return self.stop is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if now - self.received_at < REPEAT:
                return
            signal.signal(number, self.before[signal.Signals(number)])
            signal.raise_signal(number)
        self.received = number
        self.received_at = now
