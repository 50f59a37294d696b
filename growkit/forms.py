"""Values of JSON files that anybody may have written, taken by name: each of the kind it must be.

Every function raises KeyError for a name that is missing and ValueError, in words, for a value of
another kind. True is a number to Python, and to none of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# A file's whole numbers stay below this: the largest of 64 bits.
LARGEST = 1 << 63
# Counters of steps are kept as int32.
COUNTERS = ("count", "step", "schedule_step")


def take_text(stored: Mapping[str, Any], name: str) -> str:
    """A text. Halves of surrogate pairs, which JSON can spell and UTF-8 cannot, are none."""
    value = stored[name]
    if not isinstance(value, str):
        raise _say(name, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _say(name, "text", value) from None
    return value


def take_flag(stored: Mapping[str, Any], name: str) -> bool:
    """True or False."""
    value = stored[name]
    if not isinstance(value, bool):
        raise _say(name, "true or false", value)
    return value


def take_whole(stored: Mapping[str, Any], name: str, below: int = LARGEST) -> int:
    """A whole number from 0 to `below`."""
    value = stored[name]
    if type(value) is not int or not 0 <= value < below:
        raise _say(name, f"a whole number from 0 to {below - 1:,}", value)
    return value


def take_number(stored: Mapping[str, Any], name: str) -> float:
    """A finite number, as it is stored."""
    value = stored[name]
    if not is_number(value):
        raise _say(name, "a finite number", value)
    number: float = value
    return number


def take_object(stored: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object: values by name."""
    value = stored[name]
    if not isinstance(value, Mapping):
        raise _say(name, "an object", value)
    return value


def take_sizes(stored: Mapping[str, Any], name: str) -> Mapping[str, int]:
    """Whole numbers by name."""
    sizes = take_object(stored, name)
    return {axis: take_whole(sizes, axis) for axis in sizes}


def take_wholes(stored: Mapping[str, Any], name: str) -> list[int]:
    """A list of whole numbers from 0."""
    value = stored[name]
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        raise _say(name, "a list of whole numbers", value)
    return value


def take_numbers(stored: Mapping[str, Any], name: str) -> list[float]:
    """A list of finite numbers."""
    value = stored[name]
    if not isinstance(value, list) or not all(is_number(each) for each in value):
        raise _say(name, "a list of finite numbers", value)
    return value


def is_number(value: object) -> bool:
    """Whether a value is a finite number that fits a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < LARGEST


def check_record(record: Any) -> dict[str, Any]:
    """A checkpoint's record (see `trainer.run.position`) whose known values are of their kinds.

    A value may be missing or null; names that are not known may hold anything.
    """
    if not isinstance(record, Mapping):
        raise _say("record", "an object", record)
    stated = {name: value for name, value in record.items() if value is not None}
    for name in (*COUNTERS, "tokens"):
        if name in stated:
            take_whole(stated, name, 1 << 31 if name in COUNTERS else LARGEST)
    for name in ("flops", "reduction"):
        if name in stated:
            take_number(stated, name)
    if "validation_windows" in stated:
        take_text(stated, "validation_windows")
    loss = stated.get("validation_loss", 0.0)
    if not isinstance(loss, int | float) or isinstance(loss, bool):
        raise _say("validation_loss", "a number", loss)
    if "stream" in stated:
        _check_stream(take_object(stated, "stream"))
    return dict(record)


def _check_stream(stream: Mapping[str, Any]) -> None:
    for name in ("number", "seed", "drawn"):
        take_whole(stream, name)
    if stream["fingerprint"] is not None:
        take_text(stream, "fingerprint")


def _say(name: str, wanted: str, value: object) -> ValueError:
    shown = ascii(value) if isinstance(value, str | float | bool) else type(value).__name__
    return ValueError(f"{name} must be {wanted}, got {shown[:80]}")
