"""A function applied to many tasks by several processes, with the results in order.

Tasks are read only as fast as they are worked on. The processes end with the work, with an error,
with a signal to their parent, and with their parent's death.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from types import FrameType
from typing import Any

from growkit.errors import GrowkitError

# Tasks read ahead, for each process; unfinished and finished ones count. This bounds the memory.
_TASKS_AHEAD = 3
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"

_work: Callable[[Any], Any]  # in a worker process, the function that it applies


def count_cores() -> int:
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_in_order(
    make: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    tasks: Iterable[Any],
    processes: int,
) -> Generator[Any, None, None]:
    """The results of the function `make(*arguments)` on each task, in the order of the tasks.

    Each process makes its own function, once. With one process, or one task, none is started and
    the work is done here. Close the iterator, or use it up, to end the processes. Raises what the
    function raises, and GrowkitError when a process is killed.
    """
    tasks = iter(tasks)
    first = list(islice(tasks, 2))
    tasks = chain(first, tasks)
    if processes == 1 or len(first) < 2:
        yield from map(make(*arguments), tasks)
        return
    # Spawned, not forked: the libraries loaded by now have threads, and a fork would copy the locks
    # that those hold without the threads that release them.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (make, arguments))
    try:
        yield from _collect_results(pool, tasks, _TASKS_AHEAD * processes)
    except BrokenProcessPool:
        raise GrowkitError(
            f"one of the {processes} processes was killed, perhaps for want of memory; use fewer "
            f"with --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _collect_results(pool: ProcessPoolExecutor, tasks: Iterator[Any], ahead: int) -> Iterator[Any]:
    """Submit tasks, `ahead` at most before the result of the first is taken."""
    waiting: deque[Future[Any]] = deque()
    for task in tasks:
        # The pool starts a process here when none is idle.
        with _hold_signals(), _spare_threads():
            waiting.append(pool.submit(_run_task, task))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _hold_signals() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the end of the block.

    Processes started in the block inherit the mask and never get these signals, so that only their
    parent acts on them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, note) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        # Unblocking delivers what arrived to `note`; the real handlers are told after it.
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


@contextmanager
def _spare_threads() -> Iterator[None]:
    """Have the processes started in the block import numpy without the threads of its OpenBLAS.

    They multiply no matrices, and threads without work spin for a tenth of a second, on the cores
    that all of them start on. What the user asks for stays.
    """
    if _BLAS_THREADS in os.environ:
        yield
        return
    os.environ[_BLAS_THREADS] = "1"
    try:
        yield
    finally:
        del os.environ[_BLAS_THREADS]


def _start_worker(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    """Make the function of this worker process, and see to it that it ends with its parent."""
    global _work
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # The processes are the parallelism: threads of each would only compete with one another.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = make(*arguments)


def _exit_with_parent() -> None:
    """Wait for the end of the parent process, however it comes, and exit."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _run_task(task: Any) -> Any:
    return _work(task)
