"""A configuration as it is written: a preset or YAML file, with key=value overrides.

It becomes nested values; `trainer.config.sections` checks their keys and types.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from growkit.checkpoint.files import refuse_pointer
from growkit.errors import UsageError, did_you_mean
from trainer.config.sections import Config

_LARGEST_FILE = 1 << 20  # bytes of a configuration
_MOST_NODES = 100_000  # values in it, with its aliases written out

# Keys of a count, and what their sections call the same in tokens, which a resolved configuration
# holds beside it.
OVERRULES = {"batch.sequences": "tokens", "schedule.steps": "tokens"}

# The keys of the file that a run keeps of its configuration.
OF_RUN = {"growkit", "from", "config"}

PRESETS = files("trainer.config").joinpath("presets")


class Loader(yaml.SafeLoader):
    """YAML in which 18:24 is text, as are +64, on and off.

    YAML 1.1 reads 18:24 as a number to the base of 60 (1104), +64 as 64, and on and off as true and
    false.
    """


INT_TAG = "tag:yaml.org,2002:int"
BOOL_TAG = "tag:yaml.org,2002:bool"
# Scalars get their type by patterns, which PyYAML keeps by the first character that may match.
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INT_TAG, BOOL_TAG)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(INT_TAG, re.compile(r"-?[0-9]+$"), list("-0123456789"))
Loader.add_implicit_resolver(
    BOOL_TAG, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def list_presets() -> list[str]:
    """The names of the presets that ship with the trainer."""
    return sorted(Path(entry.name).stem for entry in PRESETS.iterdir())


def read_values(name: str, overrides: list[str]) -> dict[str, Any]:
    """The nested values of a YAML file or preset with key=value overrides applied.

    The file may be the config.yaml of a run. Raises UsageError for a file or an override that
    cannot be read.
    """
    values = _read_yaml(name)
    if _is_of_run(values):
        values = values["config"]
    return apply_overrides(values, overrides)


def read_origin(name: str) -> dict[str, str] | None:
    """{path, fingerprint} of the source that a run began with, where `name` is its config.yaml.

    None for the config.yaml of a run that began with a new model, and for any other file.
    """
    values = _read_yaml(name)
    origin = values["from"] if _is_of_run(values) else None
    if not isinstance(origin, dict) or not {"path", "fingerprint"} <= origin.keys():
        return None
    return {key: str(value) for key, value in origin.items()}


def _is_of_run(values: dict[str, Any]) -> bool:
    """Whether a file is what a run writes as its config.yaml; see `trainer.run.directory`."""
    return values.keys() == OF_RUN and isinstance(values["config"], dict)


def _read_yaml(name: str) -> dict[str, Any]:
    """The values of a YAML file or preset. Raises UsageError."""
    text = _read_text(name)
    refuse_pointer(text.encode(), name)
    try:
        values = load_yaml(text) or {}
    except (yaml.YAMLError, ValueError) as problem:
        raise UsageError(f"{name} is not valid YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{name} must hold `section: values`, got {type(values).__name__}")
    return values


def load_yaml(text: str) -> Any:
    """The values of a YAML text.

    Raises YAMLError, or ValueError for what is valid and has no place in a configuration: values
    within values without end, and aliases that stand for many.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_nodes(node, {}) > _MOST_NODES:
            raise ValueError(f"its aliases stand for more than {_MOST_NODES:,} values")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    finally:
        loader.dispose()


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, with each alias written out.

    known: the counts by the identity of the node, -1 while they are counted.
    """
    count = known.get(id(node))
    if count is not None and count >= 0:
        return count
    if count is not None:
        raise ValueError("an alias stands for a value that it is a part of")
    known[id(node)] = -1
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        _refuse_repeated_keys(node)
        inner = [each for pair in node.value for each in pair]
    known[id(node)] = 1 + sum(_count_nodes(each, known) for each in inner)
    return known[id(node)]


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    """Raise ValueError for a key that is there twice: YAML would take the last one in silence."""
    keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
    for key, count in keys.items():
        if count > 1:
            raise ValueError(f"the key {key!r} is there {count} times in one section")


def place_key(key: str) -> str:
    """A key in full: `steps`, which one section alone has, is `schedule.steps`.

    Any other is returned as it is, to be refused where it is none.
    """
    sections = {field.name: field.default_factory for field in dataclasses.fields(Config)}
    if "." in key or key in sections:
        return key
    found = [
        f"{name}.{key}"
        for name, kind in sections.items()
        if dataclasses.is_dataclass(kind) and any(f.name == key for f in dataclasses.fields(kind))
    ]
    return found[0] if len(found) == 1 else key


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The nested values, changed in place by key=value texts. Raises UsageError.

    A key may go without its section where only one section has it. Of a count and the same in
    tokens, the one given last holds.
    """
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
    path = Path(os.path.expanduser(name))
    if path.is_file():
        if path.stat().st_size > _LARGEST_FILE:
            raise UsageError(
                f"{name} has {path.stat().st_size:,} bytes, and a configuration has at most "
                f"{_LARGEST_FILE:,}"
            )
        try:
            return path.read_text("utf-8-sig")
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
        value = load_yaml(text)
    except (yaml.YAMLError, ValueError):
        shown = text if len(text) <= 200 else f"{text[:200]}..."
        raise UsageError(f"the value of {key} cannot be read: {shown!r}") from None
    section = values
    key = place_key(key)
    *parents, last = key.split(".")
    for parent in parents:
        # A section without values is None in YAML.
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise UsageError(f"{key} has no place: {parent} is a value, not a section")
    section[last] = value
    if key in OVERRULES:
        section.pop(OVERRULES[key], None)
