"""Published results, read from a file: rows beside those measured, and tables to put them in.

`760m` is the file that ships with growkit: GPT2-Large and GPT2-XL, in the 760M run's two tables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from growkit.errors import UsageError, did_you_mean
from growkit.evaluation.catalogue import METRICS, PERCENT, Key

SHIPPED = "760m"
FORM = (
    "a file of published results is YAML with `rows: {MODEL: {TASK: {METRIC: NUMBER}}}`, and "
    "`sources` and `tables` where there are some"
)


@dataclass(frozen=True)
class Reference:
    """Published results.

    rows: model -> (task or bpb/part, metric) -> figure; accuracies are fractions. sources: where
    they were published, a clause each. tables: the title and the key of each column of each table;
    none to have the rows below those measured.
    """

    rows: Mapping[str, Mapping[Key, float]]
    sources: tuple[str, ...] = ()
    tables: tuple[tuple[tuple[str, Key], ...], ...] = ()

    def select(self, names: list[str]) -> dict[str, Mapping[Key, float]]:
        """The rows that have a figure of one of these tasks or parts."""
        return {
            model: figures
            for model, figures in self.rows.items()
            if any(name in names for name, _ in figures)
        }


def read_reference(name: str = SHIPPED) -> Reference:
    """The results in a file, or in the one that ships with growkit. Raises UsageError."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return _parse_reference(path.read_bytes(), name)
    shipped = files("growkit.evaluation").joinpath("references")
    known = sorted(Path(entry.name).stem for entry in shipped.iterdir())
    if name not in known:
        raise UsageError(
            f"there is no file {name!r}, and growkit has published results of {', '.join(known)} "
            f"only{did_you_mean(name, known)}"
        )
    return _parse_reference(shipped.joinpath(f"{name}.yaml").read_bytes(), name)


def _parse_reference(content: bytes, name: str) -> Reference:
    try:
        stored = yaml.safe_load(content.decode())
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise UsageError(f"{name} is not YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(stored, dict) or not isinstance(stored.get("rows"), dict):
        raise UsageError(f"{name} has no rows: {FORM}")
    rows = {
        str(model): dict(_read_figures(results, f"{name}: {model}"))
        for model, results in stored["rows"].items()
    }
    tables = [tuple(_read_columns(table, name)) for table in stored.get("tables") or []]
    sources = stored.get("sources") or []
    listed = [sources] if isinstance(sources, str) else sources
    return Reference(rows, tuple(str(source) for source in listed), tuple(tables))


def _read_figures(results: Any, where: str) -> Iterator[tuple[Key, float]]:
    """The figures of one model by (task, metric). Raises UsageError."""
    if not isinstance(results, dict):
        raise UsageError(f"{where} is not {{TASK: {{METRIC: NUMBER}}}}: {FORM}")
    for task, figures in results.items():
        if not isinstance(figures, dict):
            raise UsageError(f"{where}: {task} is not {{METRIC: NUMBER}}: {FORM}")
        for metric, figure in figures.items():
            key = _check_key((str(task), str(metric)), where)
            if isinstance(figure, bool) or not isinstance(figure, int | float):
                raise UsageError(f"{where}: {task} {metric} must be a number, got {figure!r}")
            yield key, figure / 100 if metric in PERCENT else float(figure)


def _read_columns(table: Any, name: str) -> Iterator[tuple[str, Key]]:
    """The columns of one table: title and key. Raises UsageError."""
    if not isinstance(table, dict):
        raise UsageError(f"{name}: a table is {{TITLE: TASK METRIC}}, got {table!r}")
    for title, words in table.items():
        task, _, metric = str(words).rpartition(" ")
        yield str(title), _check_key((task, metric), name)


def _check_key(key: Key, where: str) -> Key:
    """The key, if its metric is one that is shown. Raises UsageError."""
    _, metric = key
    if metric not in METRICS:
        raise UsageError(
            f"{where}: the metrics are {', '.join(METRICS)}, got {metric!r}"
            f"{did_you_mean(metric, METRICS)}"
        )
    return key
