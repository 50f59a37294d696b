"""A run's directory: the configuration it was begun with, and whether a command may go on in it.

Knows config.yaml (the resolved configuration, and the source it began from); leaves what is trained to the loop.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import yaml
from etils import epath

from growkit import __version__
from growkit.checkpoint.tensor import Source
from growkit.errors import UsageError
from growkit.neox import NeoX
from trainer.config import Config, changed_keys

CONFIG = "config.yaml"


def check_same(stored: dict[str, Any], config: Config, start: str | None, source: Source | None) -> None:
    """Raise UsageError, naming the keys, when a run that exists was begun with another configuration or source."""
    changed = changed_keys(stored["config"], config.to_dict())
    origin = stored["from"] or {}
    if origin.get("path") != start or (source and origin and origin["fingerprint"] != source.fingerprint):
        changed.append("--from")
    if changed:
        raise UsageError(
            f"this run was begun with other values of {', '.join(changed)}, which may not change when it is resumed; "
            f"name another --out, or give the values that its {CONFIG} holds"
        )


def with_model_of(values: dict[str, Any], model: NeoX, origin: str) -> dict[str, Any]:
    """Nested configuration values with the model section filled from a source's model.

    Raises UsageError where the values state another model; the context alone may differ.
    """
    stated = dict(values.get("model") or {})
    theirs = dataclasses.asdict(model)
    different = [key for key in stated if key in theirs and key != "context" and stated[key] != theirs[key]]
    if different:
        said = ", ".join(f"{key} is {stated[key]} in the one and {theirs[key]} in the other" for key in different)
        raise UsageError(
            f"the configuration is for another model than {origin}: {said}; "
            f"leave its model section out to take the source's (the preset 'recipe' has none)"
        )
    return values | {"model": theirs | stated}


def existing(out: str | os.PathLike) -> dict[str, Any] | None:
    """What RUN/config.yaml holds, or None for a new run. Raises UsageError when `out` is something else."""
    directory = epath.Path(out)
    path = directory / CONFIG
    if path.exists():
        stored = yaml.safe_load(path.read_text())
        if isinstance(stored, dict) and {"config", "from"} <= stored.keys():
            return stored
        raise UsageError(f"{path} is not the configuration of a run; name another --out")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{out} exists and is not a run; name another --out")
    return None


def begin(directory: epath.Path, config: Config, start: str | None, source: Source | None) -> None:
    """Make RUN and write its configuration, or check that the one there is the same. `start` is --from as given."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = existing(directory)
    if stored is not None:
        check_same(stored, config, start, source)
    origin = {"path": start, "fingerprint": source.fingerprint} if source else stored["from"] if stored else None
    described = {"growkit": __version__, "from": origin, "config": config.to_dict()}
    (directory / CONFIG).write_text(yaml.safe_dump(described, sort_keys=False))
