"""A configuration as it is written: a preset or a YAML file, and key=value overrides, as nested values.

Knows the presets and how YAML is read; leaves which keys there are and what they may hold to `trainer.config.sections`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from growkit.errors import UsageError, did_you_mean


class Loader(yaml.SafeLoader):
    """YAML without numbers to the base of 60, which 18:24 would be, and with on and off as text."""


WHOLE, TRUTH = "tag:yaml.org,2002:int", "tag:yaml.org,2002:bool"
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (WHOLE, TRUTH)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(WHOLE, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    TRUTH, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def list_presets() -> list[str]:
    """The names of the presets that ship with the trainer."""
    return sorted(
        Path(entry.name).stem for entry in files("trainer.config").joinpath("presets").iterdir()
    )


def read_values(name: str, overrides: list[str]) -> dict[str, Any]:
    """The nested values of a YAML file or preset with key=value overrides applied. Raises UsageError."""
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
        _apply(values, override)
    return values


def merge_values(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with others laid over them, section by section."""
    both = dict(below)
    for key, value in above.items():
        inner = both.get(key)
        both[key] = (
            merge_values(inner, value)
            if isinstance(inner, dict) and isinstance(value, Mapping)
            else value
        )
    return both


def _read_text(name: str) -> str:
    path = Path(name)
    if path.is_file():
        try:
            return path.read_text()
        except UnicodeDecodeError:
            raise UsageError(f"{name} is not a YAML file: it is not text") from None
    if name in list_presets():
        return files("trainer.config").joinpath("presets", f"{name}.yaml").read_text()
    raise UsageError(
        f"there is no configuration file {name!r} and no preset of that name; the presets are "
        f"{', '.join(list_presets())}{did_you_mean(name, list_presets())}"
    )


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(
            f"an override is key=value, as optimizer.learning_rate=1e-4; got {override!r}"
        )
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError:
        raise UsageError(f"the value of {key} cannot be read: {text!r}") from None
    node = values
    *parents, last = key.split(".")
    for parent in parents:
        # A section without values is None in YAML.
        node[parent] = node[parent] if node.get(parent) is not None else {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UsageError(f"{key} has no place: {parent} is a value, not a section")
    node[last] = value
