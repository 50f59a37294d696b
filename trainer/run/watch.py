"""Stall detector: when one host hangs, the others block silently; this names the host.

Each process notes in RUN, now and then, how often it has met the others; the process that writes
compares the notes. It only names the host and waits on: ending the job is for the cluster to
decide.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping

import jax
from etils import epath

from trainer.devices.hosts import Agreement, is_writer

NOTES = ".met"  # the directory of the notes, in RUN


class Watch:
    """Says which processes have made no progress for `seconds` while others wait; 0 for never.

    Use as a context manager around what several processes do together. A single process is not
    watched.
    """

    def __init__(
        self, agreement: Agreement, seconds: float, say: Callable[[str], None], run: epath.Path
    ) -> None:
        self.agreement = agreement
        self.seconds = seconds
        self.say = say
        self.notes = run / NOTES
        self.least = -1  # how often the process that is furthest behind has met the others
        self.since = time.monotonic()  # when it was first seen there
        self.said = self.since
        self.ended = threading.Event()

    def __enter__(self) -> Watch:
        if not self.agreement.single_process and self.seconds:
            # A daemon, because the main thread may hang in a collective when the process is to end.
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.ended.set()
        if not self.agreement.single_process and is_writer():
            self.notes.rmtree(missing_ok=True)

    def _watch(self) -> None:
        # Four looks in the time after which a host counts as stalled: a note is never much too old.
        while not self.ended.wait(self.seconds / 4):
            try:
                self._write_note()
                words = self.look(self._read_notes(), time.monotonic()) if is_writer() else None
            except (OSError, ValueError):
                # A note that is being written, or a disk that does not answer. The next round
                # will tell.
                continue
            if words and not self.ended.is_set():
                self.say(words)

    def _write_note(self) -> None:
        self.notes.mkdir(parents=True, exist_ok=True)
        note = self.notes / str(jax.process_index())
        note.write_text(f"{self.agreement.calls} {socket.gethostname()}")

    def _read_notes(self) -> dict[int, tuple[int, str]]:
        """{process: (how often it has met the others, its host)} of those that have left a note."""
        found = {}
        for note in self.notes.iterdir():
            process = int(note.name)
            calls, host = note.read_text().split()
            # A run that was killed may have left notes of more processes than there are now.
            if process < jax.process_count():
                found[process] = (int(calls), host)
        return found

    def look(self, heard: Mapping[int, tuple[int, str]], now: float) -> str | None:
        """What to say at a time, in seconds: which processes have been behind for long enough.

        heard: {process: (how often it has met the others, its host)}. None for nothing to say.
        """
        counts = {calls for calls, _ in heard.values()}
        # All have met as often, or the last one has moved: the clock begins again.
        if len(counts) < 2 or min(counts) != self.least:
            self.least = min(counts, default=-1)
            self.since = now
            self.said = now
            return None
        if now - self.said < self.seconds:
            return None
        self.said = now
        behind = sorted(
            (process, host) for process, (calls, host) in heard.items() if calls == self.least
        )
        names = ", ".join(f"process {process} on {host}" for process, host in behind)
        has = "has" if len(behind) == 1 else "have"
        seconds = now - self.since
        return f"the others wait for {names}, which {has} made no progress for {seconds:.0f} s"
