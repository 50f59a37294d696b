"""What a study of one's own measured, read from its results.json.

Knows the file's format; leaves making studies to those who train, and what follows from them to `trainer.study.advice`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.checkpoint.files import read_json
from growkit.errors import GrowkitError

RESULTS = "results.json"
FORMAT = 1


@dataclass(frozen=True)
class Measurement:
    """Mean and standard deviation over runs; None where nothing could be measured."""

    mean: float | None
    std: float | None
    runs: int


@dataclass(frozen=True)
class Arm:
    """An operator in a study. saved: the part (0 to 1) of from-scratch's FLOPs that it saves to from-scratch's loss.

    saved_without_source leaves the source's FLOPs out; rewarmup is in steps; reached: whether the loss was; at_least:
    by its shortest run already, so that it may save more.
    """

    name: str
    operator: str
    saved: Measurement
    saved_without_source: Measurement
    rewarmup: int | None
    reached: bool
    at_least: bool = False


@dataclass(frozen=True)
class Study:
    """Its sizes in parameters, its budgets in tokens, and its arms."""

    path: str
    target: int
    source: int
    tokens: int
    source_tokens: int
    arms: tuple[Arm, ...]


def read_study(path: str) -> Study:
    """The study in a directory. Raises GrowkitError for what holds none, or one of another format."""
    file = Path(path) / RESULTS
    if not file.is_file():
        raise GrowkitError(
            f"{path} is no study: it holds no {RESULTS}; `growkit study --out DIR` writes one"
        )
    values = read_json(file)
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise GrowkitError(f"{file} is of format {found!r}, and this growkit reads format {FORMAT}")
    try:
        return Study(
            path,
            int(values["target"]["parameters"]),
            int(values["source"]["parameters"]),
            int(values["tokens"]["scratch"]),
            int(values["tokens"]["source"]),
            tuple(_arm(arm) for arm in values["arms"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise GrowkitError(
            f"{file} lacks what format {FORMAT} holds, or has it wrong: {problem!r}"
        ) from None


def _arm(values: Mapping[str, Any]) -> Arm:
    return Arm(
        str(values["name"]),
        str(values["operator"]),
        _measured(values["saved"]),
        _measured(values["saved_without_source"]),
        None if values["rewarmup"] is None else int(values["rewarmup"]),
        bool(values["reached"]),
        bool(values.get("at_least")),
    )


def _measured(values: Mapping[str, Any]) -> Measurement:
    mean, std = (None if values[key] is None else float(values[key]) for key in ("mean", "std"))
    return Measurement(mean, std, int(values["runs"]))
