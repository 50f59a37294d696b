"""The errors that every command raises when it cannot go on, and the exit code of each kind.

A message is one sentence: the rule that was broken, the offending name and numbers, and the nearest
thing that would work. Two functions find that nearest name; the command line prints the message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Messages of other libraries are shown up to this many characters.
LONGEST = 300


class GrowkitError(Exception):
    """Something went wrong with good arguments (a broken file, a full disk): exit code 1."""

    exit_code = 1


class UsageError(GrowkitError):
    """The command was asked for something that cannot be done: exit code 2."""

    exit_code = 2


def find_nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known name most like `name`, or None if no likeness is at least `likeness` (0 to 1)."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The clause `; did you mean 'x'?` to end a sentence with, or an empty string."""
    best = find_nearest(name, known)
    return f"; did you mean {best!r}?" if best else ""


def first_line(problem: BaseException) -> str:
    """The first line of another library's message, shortened; its type's name if it has none."""
    lines = str(problem).strip().splitlines()
    return lines[0][:LONGEST] if lines else type(problem).__name__


def require_type(name: str, value: object, kind: type | tuple[type, ...], hint: str) -> None:
    """Raise TypeError unless `value`, given for the argument `name`, is of a kind.

    hint: the clause that says where a right one comes from.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(each.__name__ for each in kinds)
        got = type(value).__name__
        raise TypeError(f"{name} must be of type {wanted}, {hint}; got one of type {got}")
