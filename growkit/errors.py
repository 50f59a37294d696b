"""The refusals: what every command raises when it cannot go on, and the exit code each one means.

Knows the two kinds of refusal and how to find the nearest known name. Leaves the wording to whoever
refuses (the rule broken, the offending name and numbers, the nearest thing that would work) and the
printing to the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GrowkitError(Exception):
    """Something went wrong with good arguments (a broken file, a full disk): exit code 1."""

    exit_code = 1


class UsageError(GrowkitError):
    """The command was asked for something that cannot be done: exit code 2."""

    exit_code = 2


def find_nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known name most like `name`, or None when none is at least as like as `likeness` (0 to 1)."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause `; did you mean 'x'?` to end a sentence with, or nothing."""
    best = find_nearest(name, known)
    return f"; did you mean {best!r}?" if best else ""
