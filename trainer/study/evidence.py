"""What a study of your own measured, read from its results.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.checkpoint.files import read_json
from growkit.errors import GrowkitError

RESULTS = "results.json"
FORMAT = 1  # of results.json; a reader of one format refuses another


@dataclass(frozen=True)
class Measurement:
    """Mean and standard deviation over runs; None where they could not be measured."""

    mean: float | None
    std: float | None
    runs: int


@dataclass(frozen=True)
class Arm:
    """One way to grow, as a study measured it.

    saved: the share (0 to 1) of from-scratch's FLOPs saved at from-scratch's loss, the source's
    FLOPs counted; saved_without_source: the same without them. rewarmup: steps. reached: whether
    every run reached that loss. at_least: whether the shortest run did already, so that more may be
    saved.
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
    """A study's sizes in parameters, its budgets in tokens, and its arms."""

    path: str
    target: int
    source: int
    tokens: int
    source_tokens: int
    arms: tuple[Arm, ...]


def read_study(path: str) -> Study:
    """Read the study in a directory.

    Raises GrowkitError for a directory without one, and for results of another format.
    """
    file = Path(path) / RESULTS
    if not file.is_file():
        raise GrowkitError(
            f"{path} is not a study: it has no {RESULTS}; `growkit study --out DIR` writes one"
        )
    values = read_json(file)
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise GrowkitError(f"{file} has format {found!r}, and this growkit reads format {FORMAT}")
    try:
        return _parse_study(path, values)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise GrowkitError(
            f"{file} is not complete: a value of format {FORMAT} is missing or wrong: {problem!r}"
        ) from None


def _parse_study(path: str, values: Mapping[str, Any]) -> Study:
    return Study(
        path=path,
        target=int(values["target"]["parameters"]),
        source=int(values["source"]["parameters"]),
        tokens=int(values["tokens"]["scratch"]),
        source_tokens=int(values["tokens"]["source"]),
        arms=tuple(_parse_arm(arm) for arm in values["arms"]),
    )


def _parse_arm(values: Mapping[str, Any]) -> Arm:
    rewarmup = values["rewarmup"]
    return Arm(
        name=str(values["name"]),
        operator=str(values["operator"]),
        saved=_parse_measurement(values["saved"]),
        saved_without_source=_parse_measurement(values["saved_without_source"]),
        rewarmup=None if rewarmup is None else int(rewarmup),
        reached=bool(values["reached"]),
        at_least=bool(values.get("at_least")),
    )


def _parse_measurement(values: Mapping[str, Any]) -> Measurement:
    mean = values["mean"]
    std = values["std"]
    return Measurement(
        mean=None if mean is None else float(mean),
        std=None if std is None else float(std),
        runs=int(values["runs"]),
    )
