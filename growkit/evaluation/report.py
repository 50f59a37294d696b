"""Evaluations as they are kept: a record, which is read and written as JSON.

A record is {versions, settings, models: [{source, label, kind, fingerprint, ..., results}]}, in
JSON's types. Everything shown is made from it, so a record that was kept can be shown again, beside
others: a model that was taken from another record has versions and settings of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growkit.checkpoint.files import encode_json, read_json, write_atomically
from growkit.checkpoint.tensor import Source
from growkit.errors import GrowkitError, UsageError
from growkit.evaluation.catalogue import SEED
from growkit.evaluation.harness import Answer, collect_versions, encode_answer
from growkit.evaluation.reference import Reference
from growkit.evaluation.tables import format_markdown as format_markdown
from growkit.evaluation.tables import print_record as print_record

Record = dict[str, Any]


def start_record(settings: dict[str, Any]) -> Record:
    """A record without models yet. settings: what was asked for; the seed of draws is added."""
    return {"versions": collect_versions(), "settings": settings | {"seed": SEED}, "models": []}


def describe_source(source: Source) -> Record:
    """What a record keeps of a model that growkit opened, beside what it is called."""
    return {
        "kind": source.kind,
        "parameters": source.model.parameters,
        "fingerprint": source.fingerprint,
        "lineage": source.lineage,
    }


def record_model(text: str, label: str | None, facts: Record, answers: Sequence[Answer]) -> Record:
    """What a record keeps of a model.

    text, label: what the user named, and the name given to it. facts: kind, parameters, fingerprint
    and lineage.
    """
    named = {"source": text} | ({"label": label} if label else {})
    return named | facts | {"results": [encode_answer(answer) for answer in answers]}


def take_rows(path: Path, label: str | None = None) -> list[Record]:
    """The models of a record that was kept, each with the versions and settings it was asked with.

    label: a name for the one model there. Raises UsageError, GrowkitError.
    """
    record = read_record(path)
    own = {"versions": record["versions"], "settings": record["settings"]}
    models = [own | model for model in record["models"]]
    if label is None:
        return models
    if len(models) != 1:
        raise UsageError(f"{path} has {len(models)} models, so {label!r} names none; leave it out")
    return [models[0] | {"label": label}]


def write_record(
    record: Record, path: Path, card: Path, reference: Reference | None = None
) -> None:
    """Keep a record as JSON at `path` and its tables as Markdown at `card`, each atomically."""
    write_atomically(card, format_markdown(record, reference).encode())
    write_atomically(path, encode_json(record))


def read_record(path: Path) -> Record:
    """A record that `growkit evaluate --output` wrote. Raises UsageError, GrowkitError."""
    if not path.is_file():
        raise UsageError(f"there is no such file: {path}; growkit evaluate --output writes one")
    try:
        record: Record = read_json(path)
        figures = [
            figure
            for model in record["models"]
            for result in model["results"]
            for figure in result["figures"].values()
        ]
        complete = all({"value", "standard_error"} <= figure.keys() for figure in figures)
        complete = complete and {"versions", "settings"} <= record.keys() and bool(record["models"])
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise GrowkitError(f"{path} is not what growkit evaluate --output writes")
    return record


def select_model(record: Record, source: Source, path: Path) -> Record:
    """The record with the model that `source` is first, and all others below it for comparison.

    path: where the record was read from. Raises UsageError if it has no figures of that model.
    """
    models = [model for model in record["models"] if model["fingerprint"] == source.fingerprint]
    if not models:
        names = ", ".join(model["source"] for model in record["models"])
        raise UsageError(
            f"{path} has figures of {names}, and none of {source.path} as it is; evaluate that "
            "first"
        )
    others = [model for model in record["models"] if model not in models]
    mine = models[-1] | {"source": "this model", "label": "this model"}
    return record | {"models": [mine, *others]}
