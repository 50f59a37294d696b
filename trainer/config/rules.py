"""Rules for the values of a configuration, stated on the fields that they rule.

A field is declared with its default and its rule, as `steps: int = number(82000, at_least=1)`;
`check_rules` walks a dataclass and refuses the first value that breaks the rule of its field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from growkit.errors import UsageError, did_you_mean

RULE = "rule"  # key of a field's metadata: a Rule
NUMBERS = "numbers"  # key of a field's metadata: a whole number is accepted and kept as text
COUNT = "count"  # key of a field's metadata: 82k and 5B are accepted
PATH = "path"  # key of a field's metadata: text in which ~ is the home directory

Number = TypeVar("Number", int, float)


class Rule(Protocol):
    """What the value of a field must satisfy."""

    def check(self, key: str, value: Any) -> None:
        """Raise UsageError, naming the key and the value, when the value breaks the rule."""


@dataclass(frozen=True)
class Bounds:
    """An interval of numbers; a bound that is None is not there."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    whole: bool = False  # the numbers are whole, so that the interval needs no brackets

    def check(self, key: str, value: float) -> None:
        """Raise UsageError when the value is outside the interval."""
        inside = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        if not inside:
            raise UsageError(f"{key} must {self.describe()}, got {value}")

    def describe(self) -> str:
        """What must hold, as it follows "must": `be at least 1`, `lie in [0, 1)`."""
        if self.at_most is None and self.below is None:
            return (
                f"be above {self.above}"
                if self.at_least is None
                else f"be at least {self.at_least}"
            )
        if self.whole:
            return f"lie between {self.at_least} and {self.at_most}"
        left = f"({self.above}" if self.at_least is None else f"[{self.at_least}"
        right = f"{self.below})" if self.at_most is None else f"{self.at_most}]"
        return f"lie in {left}, {right}"


@dataclass(frozen=True)
class Choices:
    """The texts that a field may hold."""

    allowed: tuple[str, ...]

    def check(self, key: str, value: str) -> None:
        """Raise UsageError, with the nearest choice, when the value is none of them."""
        if value not in self.allowed:
            listed = ", ".join(self.allowed)
            near = did_you_mean(value, self.allowed)
            raise UsageError(f"{key} must be one of {listed}, got {value!r}{near}")


@dataclass(frozen=True)
class ChoicesOrCount:
    """The texts that a field may hold, or a whole number from 1 on as text."""

    allowed: tuple[str, ...]

    def check(self, key: str, value: str) -> None:
        """Raise UsageError, with the nearest choice, when the value is neither."""
        is_count = value.isdecimal() and int(value) >= 1
        if not is_count and value not in self.allowed:
            listed = ", ".join(self.allowed)
            near = did_you_mean(value, self.allowed)
            raise UsageError(f"{key} must be {listed} or a number from 1, got {value!r}{near}")


def number(
    default: Number,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Number:
    """Declare a field that holds a number within bounds."""
    bounds = Bounds(at_least, above, at_most, below, whole=isinstance(default, int))
    return dataclasses.field(default=default, metadata={RULE: bounds})


def count(default: int, *, at_least: int) -> int:
    """Declare a field that holds a count of steps, tokens or the like, which may be written 82k."""
    bounds = Bounds(at_least, whole=True)
    return dataclasses.field(default=default, metadata={RULE: bounds, COUNT: True})


def path(default: str = "") -> str:
    """Declare a field that holds a path on this machine, or nothing."""
    return dataclasses.field(default=default, metadata={PATH: True})


def choice(default: str, of: Sequence[str]) -> str:
    """Declare a field that holds one of some texts."""
    return dataclasses.field(default=default, metadata={RULE: Choices(tuple(of))})


def choice_or_count(default: str, of: Sequence[str]) -> str:
    """Declare a field that holds one of some texts, or a whole number from 1 on."""
    metadata = {RULE: ChoicesOrCount(tuple(of)), NUMBERS: True}
    return dataclasses.field(default=default, metadata=metadata)


def text_or_number(default: str = "") -> str:
    """Declare a field of text that YAML may read as a number: a width, a step, a part of them."""
    return dataclasses.field(default=default, metadata={NUMBERS: True})


def check_rules(section: Any, where: str = "") -> None:
    """Check every field of a dataclass, and of the dataclasses in it, against its rule.

    where: the keys that lead to the section, with a dot at the end. Raises UsageError.
    """
    for field in dataclasses.fields(section):
        key = f"{where}{field.name}"
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            check_rules(value, f"{key}.")
        elif RULE in field.metadata:
            field.metadata[RULE].check(key, value)
