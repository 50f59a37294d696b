"""Signals during calls that last for minutes and have nothing to save, as compiling.

Python runs its own handlers between two of its steps, and a call of a compiler is one step. The
handler beneath them, in C, writes each signal's number to a pipe at once, and a thread reads it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

TERMINATED = 75
INTERRUPTED = 130
GRACE = 1.0  # seconds in which Python may act on a signal itself
ENDS = {
    signal.SIGTERM: ("terminated", TERMINATED),
    signal.SIGINT: ("interrupted", INTERRUPTED),
}


@contextmanager
def leave_on_signal() -> Iterator[None]:
    """End the process on SIGTERM or Ctrl-C, also within a call that Python cannot interrupt.

    For what has nothing to save. In another thread than the main one, which gets no signals, this
    does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    end, beginning = os.pipe()
    os.set_blocking(beginning, False)
    left = threading.Event()
    before = signal.set_wakeup_fd(beginning, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(end, left), daemon=True, name="signals")
    watcher.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        # The watcher reads the end of the pipe, and ends.
        os.close(beginning)
        watcher.join()
        os.close(end)


def _watch(end: int, left: threading.Event) -> None:
    """Wait for signals until the pipe is closed; end the process where Python does not act."""
    while numbers := os.read(end, 1):
        number = numbers[0]
        if number in ENDS and not left.wait(GRACE):
            _leave(number)


def _leave(number: int) -> NoReturn:
    """End the process without Python's own end, which would wait for the call."""
    words, code = ENDS[signal.Signals(number)]
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    with suppress(OSError):
        os.write(2, f"growkit: {words}\n".encode())
    os._exit(code)
