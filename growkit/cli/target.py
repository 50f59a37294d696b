"""The model that `grow --like` names: a preset, a YAML file, a config.json, or a model on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from growkit.models.architecture import Architecture


def read_target(text: str, model: Architecture) -> Architecture:
    """The model that --like names; what it leaves open is `model`'s. Raises UsageError."""
    from growkit.checkpoint.around import find_text
    from growkit.checkpoint.files import read_json
    from growkit.checkpoint.location import open_source
    from growkit.errors import GrowkitError, UsageError
    from growkit.models import read_config
    from growkit.models.given import KEY

    path = Path(os.path.expanduser(text))
    config = path / "config.json" if path.is_dir() else path
    if path.is_dir() and not config.exists():
        return open_source(text).model
    try:
        if config.suffix == ".json" and config.is_file():
            # A table that the source states is the target's too.
            tables = [{KEY: model.family.given}]
            stated = read_json(config)
            return read_config(find_text(stated, tables) or stated, tables)
        return _read_section(text, model)
    except GrowkitError as problem:
        raise UsageError(f"--like {text}: {problem}") from None


def _read_section(text: str, model: Architecture) -> Architecture:
    """The model of a preset or YAML file: its section states what differs from `model`.

    Raises UsageError without a section, and for a source that such a section cannot describe.
    """
    from growkit.errors import UsageError
    from trainer.config.model import find_trained, name_values
    from trainer.config.sections import resolve, resolve_model
    from trainer.config.values import read_values

    values = read_values(text, [])
    resolve(values)
    stated = resolve_model(values.get("model"))
    if not stated:
        raise UsageError("it has no section `model`, so there are no sizes to grow to")
    kind = stated.get("kind", "gpt_neox")
    if model.kind != kind:
        raise UsageError(f"it describes a {kind} model, the source is a {model.kind} one")
    named = name_values(find_trained(kind), stated)
    # Sizes first: resizing keeps the number of rotated dimensions, unless the section states it.
    sizes = {axis: named.pop(axis) for axis in model.fields if axis in named}
    resized: Architecture = model.resize({**model.sizes, **sizes})
    changed = resized.change(**named)
    more = changed.family.name_experts(stated.get("config", {}))
    return changed.family.read({**changed.config(), **more})
