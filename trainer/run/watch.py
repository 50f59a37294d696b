"""Names the processes that the others wait for: a host that stalls would leave all of them silent, and nobody told.

Each process notes in RUN now and then how often it has met the others; the one that writes compares. It names and
waits on; ending the job is the cluster's. Knows counts and names; leaves meeting to `trainer.devices.hosts`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping

import jax
from etils import epath

from trainer.devices.hosts import Agreement, is_writer

PLACE = ".met"


class Watch:
    """Says which processes have not gone on for so many seconds while others wait; 0 for never.

    Use as a context manager around what several processes do together. One process alone is not watched.
    """

    def __init__(
        self, agreement: Agreement, seconds: float, say: Callable[[str], None], run: epath.Path
    ):
        self.agreement, self.seconds, self.say, self.place = agreement, seconds, say, run / PLACE
        self.least = -1
        self.since = self.said = time.monotonic()
        self.ended = threading.Event()

    def __enter__(self) -> Watch:
        if not self.agreement.single_process and self.seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *problem) -> None:
        self.ended.set()
        if not self.agreement.single_process and is_writer():
            self.place.rmtree(missing_ok=True)

    def _watch(self) -> None:
        while not self.ended.wait(self.seconds / 4):
            try:
                self._tell()
                words = self.look(self._heard(), time.monotonic()) if is_writer() else None
            except (OSError, ValueError):
                continue  # a note that is being written, or a disk that does not answer: the next time will tell
            if words and not self.ended.is_set():
                self.say(words)

    def _tell(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        (self.place / str(jax.process_index())).write_text(
            f"{self.agreement.calls} {socket.gethostname()}"
        )

    def _heard(self) -> dict[int, tuple[int, str]]:
        """{process: (how often it has met the others, its host)} of those that have told."""
        told = {int(note.name): note.read_text().split() for note in self.place.iterdir()}
        # Notes of a run that was killed may be of more processes than there are now.
        return {
            number: (int(met), host)
            for number, (met, host) in told.items()
            if number < jax.process_count()
        }

    def look(self, heard: Mapping[int, tuple[int, str]], now: float) -> str | None:
        """What to say at a time `now`, in seconds: which processes are behind, when they have been for long enough."""
        counts = {met for met, _ in heard.values()}
        if len(counts) < 2 or min(counts) != self.least:
            self.least, self.since, self.said = min(counts, default=-1), now, now
            return None
        if now - self.said < self.seconds:
            return None
        waited, self.said = now - self.since, now
        behind = sorted(
            (process, host) for process, (met, host) in heard.items() if met == self.least
        )
        names = ", ".join(f"process {process} on {host}" for process, host in behind)
        return f"the others wait for {names}, which {'has' if len(behind) == 1 else 'have'} not gone on for {waited:.0f} s"
