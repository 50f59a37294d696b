"""Nested values become dataclasses: unknown keys and wrong types are refused by name.

The type of a field decides: YAML reads 2e-4 as text and 1 as a whole number, and both become
floats where the field is a float.
"""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Mapping
from typing import Any

from growkit.errors import UsageError, did_you_mean
from growkit.quantity import parse_count
from trainer.config.rules import COUNT, NUMBERS, PATH

WEIGHTS = (dict[str, float], dict[str, float] | None)
WANTED: dict[Any, str] = {
    int: "a whole number",
    bool: "true or false",
    str: "text",
    float | str: "a number or text",
}


def build_dataclass(kind: Any, values: Any, where: str = "") -> Any:
    """The dataclass `kind` with these values for its fields; None stands for no values.

    where: the keys that lead to the section, with a dot at the end. Raises UsageError.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UsageError(f"{where.rstrip('.')} is a section of values, got {values!r}")
    types = typing.get_type_hints(kind)
    metadata = {field.name: field.metadata for field in dataclasses.fields(kind)}
    converted = {}
    for key, value in values.items():
        if key not in types:
            near = _name_section(str(key), types, where) or did_you_mean(str(key), types)
            raise UsageError(
                f"unknown key {where}{key}; the keys here are {', '.join(types)}{near}"
            )
        value = _read_as_written(value, metadata[key], f"{where}{key}")
        converted[key] = _convert_value(types[key], value, f"{where}{key}")
    return kind(**converted)


def _name_section(key: str, types: Mapping[str, Any], where: str) -> str:
    """The clause that names the sections which have a key that was given without one."""
    sections = {name: kind for name, kind in types.items() if dataclasses.is_dataclass(kind)}
    found = [
        f"{where}{name}.{key}"
        for name, kind in sections.items()
        if any(field.name == key for field in dataclasses.fields(kind))
    ]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def _read_as_written(value: Any, metadata: Mapping[str, Any], key: str) -> Any:
    """The value that a text stands for, by what its field says of itself."""
    if NUMBERS in metadata and type(value) in (int, float):
        return str(value)
    if PATH in metadata and isinstance(value, str):
        return os.path.expanduser(value)
    if COUNT in metadata and isinstance(value, str) and value[:1].isdigit():
        return parse_count(value, key)
    return value


def _convert_value(kind: Any, value: Any, key: str) -> Any:
    """The value as the type of its field wants it."""
    if dataclasses.is_dataclass(kind):
        return build_dataclass(kind, value, f"{key}.")
    if kind in WEIGHTS:
        return None if value is None else _convert_weights(value, key)
    if kind == dict[str, Any]:
        return _require_fields(value, key)
    if kind is float or (kind == float | str and _is_number(value)):
        return _convert_number(value, key)
    if kind == float | str and isinstance(value, str):
        return value
    if type(value) is kind:
        return value
    if kind is int and isinstance(value, str) and _is_plain_number(value.removeprefix("+")):
        return parse_count(value.removeprefix("+"), key)
    raise UsageError(f"{key} must be {WANTED[kind]}, got {_shorten(value)}")


def _is_number(value: Any) -> bool:
    """Whether a value is a number, or a text that is one."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _require_fields(value: Any, key: str) -> dict[str, Any]:
    """Fields by name, with any values."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"{key} must be fields by name, as {{name: value}}, got {_shorten(value)}")
    return value


def _is_plain_number(text: str) -> bool:
    """Whether a text is a number that is not read as one: 1e6, 50_304.

    One with a unit is a count of something, and not 8k for a context of 8192.
    """
    return text[:1].isdigit() and text[-1:].isdigit()


def _shorten(value: Any, longest: int = 200) -> str:
    """A value as it is shown in a message."""
    words = repr(value)
    return words if len(words) <= longest else f"{words[:longest]}..."


def _convert_number(value: Any, key: str) -> float:
    """A finite number."""
    if isinstance(value, float | int | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise UsageError(f"{key} must be a number, got {_shorten(value)}")


def _refuse_repeated(paths: list[Any], key: str) -> None:
    """Raise UsageError for a path that a list names twice: a dict would keep it once in silence."""
    written = [str(path) for path in paths]
    for path in written:
        if written.count(path) > 1:
            raise UsageError(
                f"{key} names {path} twice; give it once, or a weight to each as {{path: weight}}"
            )


def _convert_weights(value: Any, key: str) -> dict[str, float]:
    """{path: weight} of that form, of one path, or of a list of paths, which all weigh 1."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        _refuse_repeated(value, key)
        value = dict.fromkeys(value, 1.0)
    if not isinstance(value, dict):
        raise UsageError(
            f"{key} must be a path, a list of paths or {{path: weight}}, got {_shorten(value)}"
        )
    weights = {}
    for path, weight in value.items():
        expanded = os.path.expanduser(str(path))
        if expanded in weights:
            raise UsageError(f"{key} names {expanded} twice; give it once")
        weights[expanded] = _convert_number(weight, f"{key}.{path}")
    for path, weight in weights.items():
        if weight <= 0:
            raise UsageError(f"{key}: a weight must be above 0, {path} has {weight}")
    return weights
