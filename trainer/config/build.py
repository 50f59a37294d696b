"""Nested values become dataclasses: unknown keys and wrong types are refused by name.

The type of a field decides: YAML reads 2e-4 as text and 1 as a whole number, and both become
floats where the field is a float.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from growkit.errors import UsageError, did_you_mean
from trainer.config.rules import NUMBERS

WEIGHTS = (dict[str, float], dict[str, float] | None)
WANTED = {int: "a whole number", bool: "true or false", str: "text"}


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
            near = did_you_mean(str(key), types)
            raise UsageError(
                f"unknown key {where}{key}; the keys here are {', '.join(types)}{near}"
            )
        if NUMBERS in metadata[key] and type(value) is int:
            value = str(value)
        converted[key] = _convert_value(types[key], value, f"{where}{key}")
    return kind(**converted)


def _convert_value(kind: Any, value: Any, key: str) -> Any:
    """The value as the type of its field wants it."""
    if dataclasses.is_dataclass(kind):
        return build_dataclass(kind, value, f"{key}.")
    if kind in WEIGHTS:
        return None if value is None else _convert_weights(value, key)
    if kind is float:
        return _convert_number(value, key)
    if type(value) is kind:
        return value
    raise UsageError(f"{key} must be {WANTED[kind]}, got {value!r}")


def _convert_number(value: Any, key: str) -> float:
    """A finite number."""
    if isinstance(value, float | int | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise UsageError(f"{key} must be a number, got {value!r}")


def _convert_weights(value: Any, key: str) -> dict[str, float]:
    """{path: weight} of that form, of one path, or of a list of paths, which all weigh 1."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        value = dict.fromkeys(value, 1.0)
    if not isinstance(value, dict):
        raise UsageError(
            f"{key} must be a path, a list of paths or {{path: weight}}, got {value!r}"
        )
    weights = {}
    for path, weight in value.items():
        weights[str(path)] = _convert_number(weight, f"{key}.{path}")
    for path, weight in weights.items():
        if weight <= 0:
            raise UsageError(f"{key}: a weight must be above 0, {path} has {weight}")
    return weights
