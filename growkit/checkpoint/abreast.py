"""The same work on many things by a few threads: results in order, and few of them waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

THREADS = 2
# Results that may wait for an earlier one. This bounds the memory: a future takes about a kilobyte.
AHEAD = 32

T = TypeVar("T")
R = TypeVar("R")


def map_abreast(
    work: Callable[[T], R], things: Iterable[T], threads: int = THREADS
) -> Generator[R, None, None]:
    """What `work` makes of each thing, in the order of the things.

    For work that lets go of Python's lock: reading, hashing, arithmetic on arrays. Raises what the
    work raises; of what was not begun by then, nothing is done.
    """
    from concurrent.futures import ThreadPoolExecutor

    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for thing in things:
                waiting.append(pool.submit(work, thing))
                if len(waiting) == AHEAD:
                    yield _take_first(waiting)
            while waiting:
                yield _take_first(waiting)
        finally:
            for each in waiting:
                each.cancel()


def _take_first(waiting: deque[Future[R]]) -> R:
    """The result of the one that was begun first."""
    from concurrent.futures import wait

    first = waiting.popleft()
    # The kernel may deliver a signal to another thread; this one handles it on waking up.
    while wait([first], timeout=0.1).not_done:
        pass
    return first.result()
