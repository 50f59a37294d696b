"""Windows: equal pieces of a token file, each the inputs and targets of one sequence.

A file is cut into windows without gaps or overlaps; the last ones can be held out for validation.
Several files, such as the shards of one tokenization, are joined into one data set.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from growkit.errors import UsageError
from trainer.data.tokens import TokenFile

# Data fingerprint, context, first window, end.
Identity = tuple[str, int, int, int]


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows `start` to `stop` (exclusive) of a token file: int32 arrays [context + 1].

    Window i of the file is tokens i * context to i * context + context, both included. Its inputs
    are the first `context` of them and its targets the last `context`. Neighbours share one token,
    so that every token but the first one of the file is predicted exactly once.
    """

    token_file: TokenFile
    context: int
    start: int
    stop: int

    @classmethod
    def all(cls, token_file: TokenFile, context: int, at_least: int = 1) -> Windows:
        """All windows of a file.

        Raises UsageError when there are fewer than `at_least` (1, or 2 when one is held out).
        """
        if context < 1:
            raise UsageError(f"the context must be at least 1 token, not {context}")
        count = (len(token_file) - 1) // context
        if count < at_least:
            raise UsageError(_describe_shortage(token_file, context, at_least))
        return cls(token_file, context, 0, count)

    @cached_property
    def _tokens(self) -> np.ndarray:
        """The file's tokens, mapped: a plain array, because np.memmap runs Python at every cut."""
        return np.asarray(self.token_file.tokens)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        first = (self.start + number) * self.context
        return self._tokens[first : first + self.context + 1].astype(np.int32)

    @property
    def identity(self) -> Identity:
        """What these windows are, whatever the file is called."""
        return self.token_file.fingerprint, self.context, self.start, self.stop

    def take_fraction(self, fraction: float) -> Windows:
        """The first windows: a fraction in (0, 1] of them, but at least one."""
        count = max(1, round(fraction * len(self)))
        return replace(self, stop=self.start + count)


def _describe_shortage(token_file: TokenFile, context: int, at_least: int) -> str:
    """The sentence that a file is too short for so many windows."""
    tokens = len(token_file)
    needed = "one window" if at_least == 1 else "one window to train on and one held out"
    largest = (tokens - 1) // at_least
    advice = "no context is that short"
    if largest:
        advice = f"the largest context that would work is {largest}"
    return (
        f"{token_file.name} has {tokens} tokens, too few for {needed} at context {context}; "
        f"{advice}"
    )


@dataclass(frozen=True, eq=False)
class JoinedWindows:
    """The windows of several token files, one after the other, as one data set."""

    parts: tuple[Windows, ...]

    @cached_property
    def _ends(self) -> list[int]:
        """How many windows there are up to the end of each part."""
        return list(itertools.accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        part = bisect.bisect_right(self._ends, number)
        before = self._ends[part - 1] if part else 0
        return self.parts[part][number - before]

    @property
    def context(self) -> int:
        """Tokens that a window predicts."""
        return self.parts[0].context

    @cached_property
    def identity(self) -> Identity:
        """As `Windows.identity`, with a digest of the parts' identities for the fingerprint."""
        identities = json.dumps([part.identity for part in self.parts])
        digest = hashlib.sha256(identities.encode()).hexdigest()
        return digest[:16], self.context, 0, len(self)


AnyWindows = Windows | JoinedWindows


def join_windows(parts: Sequence[Windows]) -> AnyWindows:
    """The windows of one file or several as one data set."""
    if len(parts) == 1:
        return parts[0]
    return JoinedWindows(tuple(parts))


def split_windows(token_file: TokenFile, context: int, held_out: float) -> tuple[Windows, Windows]:
    """The windows to train on, and the held-out windows to validate on.

    The last windows are held out: a fraction `held_out` (at most one half) of all, but at least
    one. Raises UsageError when the text is too short for one window of each kind.
    """
    if not 0 <= held_out <= 0.5:
        raise UsageError(f"the held-out fraction must lie between 0 and 0.5, not {held_out}")
    windows = Windows.all(token_file, context, at_least=2)
    held = max(1, round(len(windows) * held_out))
    boundary = windows.stop - held
    return replace(windows, stop=boundary), replace(windows, start=boundary)
