"""A configuration as it is written: a preset or YAML file, with key=value overrides.

It becomes nested values; `trainer.config.sections` checks their keys and types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from growkit.errors import UsageError, did_you_mean

PRESETS = files("trainer.config").joinpath("presets")


class Loader(yaml.SafeLoader):
    """YAML in which 18:24 is text, as are on and off.

    YAML 1.1 reads 18:24 as a number to the base of 60 (1104), and on and off as true and false.
    """


INT_TAG = "tag:yaml.org,2002:int"
BOOL_TAG = "tag:yaml.org,2002:bool"
# Scalars get their type by patterns, which PyYAML keeps by the first character that may match.
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INT_TAG, BOOL_TAG)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(INT_TAG, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    BOOL_TAG, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def list_presets() -> list[str]:
    """The names of the presets that ship with the trainer."""
    return sorted(Path(entry.name).stem for entry in PRESETS.iterdir())


def read_values(name: str, overrides: list[str]) -> dict[str, Any]:
    """The nested values of a YAML file or preset with key=value overrides applied.

    Raises UsageError for a file or an override that cannot be read.
    """
    text = _read_text(name)
    try:
        values = yaml.load(text, Loader) or {}
    except yaml.YAMLError as problem:
        raise UsageError(f"{name} is not valid YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{name} must hold `section: values`, got {type(values).__name__}")
    return apply_overrides(values, overrides)


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The nested values, changed in place by key=value texts. Raises UsageError."""
    for override in overrides:
        _apply_override(values, override)
    return values


def merge_values(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with others laid over them, section by section."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, Mapping):
            merged[key] = merge_values(inner, value)
        else:
            merged[key] = value
    return merged


def _read_text(name: str) -> str:
    """The text of a file or, where there is no file of that name, of a preset."""
    path = Path(name)
    if path.is_file():
        try:
            return path.read_text()
        except UnicodeDecodeError:
            raise UsageError(f"{name} is not a YAML file: it is not text") from None
    known = list_presets()
    if name in known:
        return PRESETS.joinpath(f"{name}.yaml").read_text()
    raise UsageError(
        f"there is no configuration file {name!r} and no preset of that name; the presets are "
        f"{', '.join(known)}{did_you_mean(name, known)}"
    )


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one value of the nested values, making the sections on the way to it."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(
            f"an override is key=value, as optimizer.learning_rate=1e-4; got {override!r}"
        )
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError:
        raise UsageError(f"the value of {key} cannot be read: {text!r}") from None
    section = values
    *parents, last = key.split(".")
    for parent in parents:
        # A section without values is None in YAML.
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise UsageError(f"{key} has no place: {parent} is a value, not a section")
    section[last] = value
