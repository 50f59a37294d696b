"""What an exported model says of the machine that it was made on: names instead of paths.

A lineage holds paths, and they hold user names and names of clients and data sets. An export is
made to be given away, so of a path only the last name stays: `tokens` for /home/ann/acme/tokens,
`run@30` for a run's checkpoint, OWNER/NAME@REVISION for a model of the Hub's cache. Hashes and
settings stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from growkit.checkpoint.files import change_json

# Keys whose values are paths, and sections in which every text is one.
PATH_KEYS = ("path", "from", "out", "_name_or_path", "name_or_path")
PATH_SECTIONS = ("data",)
# Texts that are paths wherever they stand.
PATH = re.compile(r"(/|~|\.\.?/|[A-Za-z]:[\\/]|\\\\|[a-z][a-z0-9+.-]*://).*", re.DOTALL)
# Paths within a text: from a slash that begins a word, over one slash more.
WITHIN = re.compile(r"(?<![\w/.:])~?/[^\s'\",;()]*/[^\s'\",;()]*")
# Files beside a model whose texts may be paths.
SETTINGS = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
REVISION = 8


def name_path(text: str) -> str:
    """The last name of a path, with what tells a checkpoint or a revision from its neighbours."""
    parts = [part for part in re.split(r"[/\\]+", text) if part not in ("", ".", "..", "~")]
    if not parts:
        return "."
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        name = parts[-3].removeprefix("models--").replace("--", "/")
        return f"{name}@{parts[-1][:REVISION]}"
    if len(parts) > 2 and parts[-2] == "checkpoints":
        return f"{parts[-3]}@{parts[-1]}"
    return parts[-1]


def strip_paths(value: Any, path: bool = False) -> Any:
    """A JSON value with names in place of paths.

    path: whether texts in it are paths for certain.
    """
    if isinstance(value, str):
        if PATH.fullmatch(value) or (path and ("/" in value or "\\" in value)):
            return name_path(value)
        return WITHIN.sub(lambda found: name_path(found[0]), value)
    if isinstance(value, list):
        return [strip_paths(part, path) for part in value]
    if not isinstance(value, Mapping):
        return value
    stripped: dict[str, Any] = {}
    for key, part in value.items():
        inner = path or key in PATH_KEYS or key in PATH_SECTIONS
        stripped[_name_key(key, path, stripped)] = strip_paths(part, inner)
    return stripped


def _name_key(key: str, path: bool, taken: Mapping[str, Any]) -> str:
    """A key with a name in place of a path; numbered where two paths end in one name."""
    name = str(strip_paths(key, path))
    number = 2
    unique = name
    while unique in taken:
        unique = f"{name} ({number})"
        number += 1
    return unique


def strip_settings(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files beside a model, those with settings without paths; the others byte for byte."""
    return {
        name: change_json(content, _strip_values) if name in SETTINGS else content
        for name, content in files.items()
    }


def _strip_values(value: Any) -> Any:
    """Settings whose texts are paths by their look, at the top; tokens like '/' are none."""
    if not isinstance(value, dict):
        return value
    return {key: _strip_value(part) for key, part in value.items()}


def _strip_value(value: Any) -> Any:
    is_path = isinstance(value, str) and re.fullmatch(r"(/|~/|[A-Za-z]:[\\/]).*[/\\].+", value)
    return name_path(value) if is_path else value


def strip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without paths; fields that are none stay as they are."""
    stripped: dict[str, Any] = _strip_values(dict(config))
    return stripped
