"""Work spread over processes, its results in order.

Knows how processes are started, fed no faster than they work, and ended: by the end of the work, by an error,
by a signal to their parent, and by its death. Leaves what they do to the function it is given.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

from growkit.errors import GrowkitError

_AHEAD = 3  # tasks a process, done or to do: they bound the memory

_work: Callable[[Any], Any]


def count_cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    make: Callable[..., Callable], arguments: tuple, tasks: Iterable, processes: int
) -> Iterator:
    """The results of `make(*arguments)` on each task, in the order of the tasks.

    Each process makes its own function, once. One process, or one task, is done without starting any. Close
    the iterator, or use it up, to end the processes. Raises what the function raises, and GrowkitError when a
    process is killed.
    """
    tasks = iter(tasks)
    first = list(islice(tasks, 2))
    tasks = chain(first, tasks)
    if processes == 1 or len(first) < 2:
        yield from map(make(*arguments), tasks)
        return
    # Not fork: libraries loaded by now have threads, which a fork would leave with their locks held.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _begin, (make, arguments))
    try:
        yield from _results(pool, tasks, _AHEAD * processes)
    except BrokenProcessPool:
        raise GrowkitError(
            f"one of the {processes} processes was killed, perhaps for want of memory; use fewer with --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _results(pool: ProcessPoolExecutor, tasks: Iterator, ahead: int) -> Iterator:
    waiting: deque = deque()
    for task in tasks:
        # A process is started here when none is idle.
        with _signals_held():
            waiting.append(pool.submit(_run, task))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM; processes started meanwhile never get them, so that only their parent acts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {
        number: signal.signal(number, lambda number, frame: held.append(number))
        for number in numbers
    }
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held[:1]:
            signal.raise_signal(number)


def _begin(make: Callable[..., Callable], arguments: tuple) -> None:
    """Make this process's function; end with the parent, however it ends."""
    global _work
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    # The processes are the parallelism: threads of each would only get in one another's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = make(*arguments)


def _run(task: Any) -> Any:
    return _work(task)
