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
MOST_FOUND = 20  # studies that are looked for below a directory, before it is none of studies


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
    saved. control: whether it did not grow. loss: the last one. start: the name of the source that
    it grew from; source, source_layers: that one's parameters and layers; source_tokens: what it
    was trained on. None where a study of an earlier version does not say.
    """

    name: str
    operator: str
    saved: Measurement
    saved_without_source: Measurement
    rewarmup: int | None
    reached: bool
    at_least: bool = False
    control: bool = False
    loss: Measurement = Measurement(None, None, 0)
    start: str | None = None
    source: int | None = None
    source_layers: int | None = None
    source_tokens: int | None = None

    @property
    def method(self) -> str | None:
        """How it copies layers, as stack; None for a list of layers, or no copies."""
        stated = self._read_operator()
        if ":" not in stated.get("map", ""):
            return None
        return stated.get("depth_method", "replicate")

    @property
    def beside_method(self) -> dict[str, str]:
        """The other options of the growth."""
        return {key: text for key, text in self._read_operator().items() if key != "depth_method"}

    def _read_operator(self) -> dict[str, str]:
        words = [part.partition(" ") for part in self.operator.split(", ")]
        return {key: text for key, _, text in words}

    @property
    def source_ratio(self) -> float | None:
        """Tokens a parameter of the source."""
        if not self.source or self.source_tokens is None:
            return None
        return self.source_tokens / self.source


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


def find_studies(directory: str = ".") -> list[Study]:
    """The studies in a directory or one level below it, by name; what is none is passed over."""
    root = Path(directory)
    files = [*root.glob(RESULTS), *sorted(root.glob(f"*/{RESULTS}"))]
    found = []
    for file in files[:MOST_FOUND]:
        try:
            found.append(read_study(str(file.parent)))
        except (GrowkitError, OSError):
            continue
    return found


def _parse_study(path: str, values: Mapping[str, Any]) -> Study:
    runs = values.get("runs", ())
    # Only a source has no budget.
    tokens = {str(run["name"]): int(run["tokens"]) for run in runs if run["budget"] is None}
    return Study(
        path=path,
        target=int(values["target"]["parameters"]),
        source=int(values["source"]["parameters"]),
        tokens=int(values["tokens"]["scratch"]),
        source_tokens=int(values["tokens"]["source"]),
        arms=tuple(_parse_arm(arm, tokens) for arm in values["arms"]),
    )


def _parse_arm(values: Mapping[str, Any], tokens: Mapping[str, int]) -> Arm:
    """An arm. tokens: those of each source's run."""
    rewarmup = values["rewarmup"]
    source = values.get("source") or {}
    start = [None, *values.get("sources", ())][-1]
    return Arm(
        name=str(values["name"]),
        operator=str(values["operator"]),
        saved=_parse_measurement(values["saved"]),
        saved_without_source=_parse_measurement(values["saved_without_source"]),
        rewarmup=None if rewarmup is None else int(rewarmup),
        reached=bool(values["reached"]),
        at_least=bool(values.get("at_least")),
        control=bool(values.get("control")),
        loss=_parse_measurement(values["loss"]) if "loss" in values else Measurement(None, None, 0),
        start=start,
        source=source.get("parameters"),
        source_layers=source.get("layer"),
        source_tokens=tokens.get(start) if start else None,
    )


def _parse_measurement(values: Mapping[str, Any]) -> Measurement:
    mean = values["mean"]
    std = values["std"]
    return Measurement(
        mean=None if mean is None else float(mean),
        std=None if std is None else float(std),
        runs=int(values["runs"]),
    )
