"""Signals while training: remembered until the loop asks, so that a step or a save ends first.

SIGTERM, SIGINT and SIGHUP (a closed terminal) are remembered. Several processes stop at the same
step, because they tell each other of their signals through `trainer.devices.hosts.Agreement`. What
to do about a signal is the loop's decision.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Generic, TypeVar

from trainer.devices.hosts import Agreement

REPEAT = 1.0  # seconds within which a second signal counts as the same one
POLLED = 0.1  # seconds between two looks for a signal while something compiles
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
T = TypeVar("T")


class AbandonedError(Exception):
    """A signal arrived while a program was compiled."""


class Interrupt:
    """Remembers a SIGTERM, SIGINT or SIGHUP until it is asked. Use as a context manager.

    A second signal acts at once, as it would have without this. Supervisors signal a process and
    then its group, so a signal repeated within REPEAT seconds counts as one. A hangup is never the
    second one: nobody closes a terminal twice. Under nohup, which ignores hangups, so does this.
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
                if signal.getsignal(number) is not signal.SIG_IGN:
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
        # The largest of all processes at the call before: 0 where none had a signal.
        number, any_due = self.agreement.exchange(self.received or 0, int(due))
        self.agreed = self.agreed or number or None
        return bool(any_due)

    def stopped(self) -> bool:
        """Exchange signals with all processes; whether there was one."""
        self.ask()
        return self.stop is not None

    def compile(self, work: Callable[[], T], say: Callable[[str], None]) -> T:
        """The result of `work`, which compiles, unless a signal arrives meanwhile.

        Python sees a signal only between two steps of its own, and compiling is one step of
        minutes: it goes on in a thread of its own, and this one waits for both. Raises
        AbandonedError on a signal. Several processes must compile to the end, because the others
        wait in what follows; there the signal is only said.
        """
        if not self.before:
            return work()
        task = _Task(work)
        said = False
        while not task.done.wait(POLLED):
            if self.received is None:
                continue
            if self.agreement.single_process:
                raise AbandonedError
            if not said:
                say(f"{signal.Signals(self.received).name}: stopping when the program is compiled")
                said = True
        return task.result()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if number == signal.SIGHUP:
                return
            if now - self.received_at < REPEAT:
                return
            # What stood there before us: Python's KeyboardInterrupt, or the end of the process.
            signal.signal(number, self.before[signal.Signals(number)])
            signal.raise_signal(number)
        self.received = number
        self.received_at = now


class _Task(Generic[T]):
    """Work in a thread that the process does not wait for when it ends."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work
        self.done = threading.Event()
        self.results: list[T] = []
        self.problem: BaseException | None = None
        threading.Thread(target=self._run, daemon=True, name="compile").start()

    def _run(self) -> None:
        try:
            self.results.append(self.work())
        except BaseException as problem:  # the thread that waits raises it
            self.problem = problem
        finally:
            self.done.set()

    def result(self) -> T:
        """What the work gave. Raises what it raised."""
        if self.problem is None:
            return self.results[0]
        try:
            raise self.problem
        finally:
            # Its traceback leads to this object: as a cycle it would keep RUN locked.
            self.problem = None
