"""The fields of a config.json: values with defaults, and sizes that one field or the ratio of two
states.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from growkit.errors import GrowkitError

RATIO = re.compile(r"(\w+) / (\w+)")
_MULTIPLE = re.compile(r"(\d+) \* (\w+)")


@dataclass(frozen=True)
class Same:
    """A default that is the value of another field: Same("a"), Same("4 * a") or Same("a / b")."""

    path: str


class Frozen(dict[str, Any]):
    """A dict that is not changed, so that what holds it can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        # Values may be lists and dicts (rope parameters), which have no hash of their own.
        return hash(json.dumps(self, sort_keys=True, default=str))


def read_number(name: str, value: Any) -> float:
    """A finite number, or a text of one. Raises ValueError for any other value of the field."""
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise ValueError(f"{name} must be a finite number, got {str(value)[:80]!r}")
    return number


class Fields:
    """The fields of a config.json, with the defaults of those that it leaves out."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.given = given
        self.defaults = defaults

    def get(self, name: str) -> Any:
        """The value of a field, or its default."""
        if name in self.given:
            return self.given[name]
        if name not in self.defaults:
            raise GrowkitError(f"config.json lacks {name}, which has no default")
        default = self.defaults[name]
        # A default may follow another default: head_dim from heads that are left out too.
        return self.size(default.path) if isinstance(default, Same) else default

    def states(self, name: str, value: Any) -> bool:
        """Whether a field has this value; a default that follows others may have none at all."""
        try:
            return bool(self.get(name) == value)
        except GrowkitError:
            return False

    def whole(self, name: str) -> int:
        """A field that holds a whole number of at least 1."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise GrowkitError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise GrowkitError(f"{name} must be a whole number of at least 1, got {value!r}")
        return value

    def size(self, path: str) -> int:
        """The size that a field states, a multiple of it, or two of them by their ratio."""
        multiple = _MULTIPLE.fullmatch(path)
        if multiple:
            return int(multiple[1]) * self.whole(multiple[2])
        ratio = RATIO.fullmatch(path)
        if ratio is None:
            return self.whole(path)
        whole, part = self.whole(ratio[1]), self.whole(ratio[2])
        if whole % part:
            low = whole - whole % part
            raise GrowkitError(
                f"{ratio[1]} must be a multiple of {ratio[2]}, got {whole} and {part}; the nearest "
                f"for {ratio[1]} are {low or part} and {low + part}"
            )
        return whole // part

    def option(self, path: str) -> Any:
        """An option's value, of the kind that its default is."""
        default = self.defaults[path]
        value = self.get(path)
        if isinstance(default, bool):
            if not isinstance(value, bool) and value not in (0, 1):
                raise ValueError(f"{path} must be true or false, got {value!r}")
            return bool(value)
        if isinstance(default, int):
            return self.whole(path)
        if isinstance(default, float):
            return read_number(path, value)
        kind: Callable[[Any], Any] = type(default)
        return kind(value)
