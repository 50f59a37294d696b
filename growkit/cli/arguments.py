"""Values of the growing verbs' options: numbers, and sizes by the names of axes."""

from __future__ import annotations

from growkit.errors import UsageError


def parse_axes(texts: tuple[str, ...]) -> dict[str, str]:
    """NAME=SIZE, repeated, as sizes by name. Raises UsageError."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, size = text.partition("=")
        if not equals or not name or name in found:
            raise UsageError(f"--axis takes NAME=SIZE, each name once, as group=2x; got {text!r}")
        found[name] = size
    return found


def parse_number(option: str, text: str) -> float:
    """The number that an option's text is. Raises UsageError."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--{option} takes a number, got {text!r}") from None


def parse_whole(option: str, text: str) -> int:
    """The whole number that an option's text is. Raises UsageError."""
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--{option} takes a whole number, got {text!r}") from None
