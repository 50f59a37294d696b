"""What a model card says of training: data, hyper-parameters, and how the validation loss fell.

A lineage and a history are data from strangers: what is missing in them, or of another kind, is
left out.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from growkit.entries import Training
from growkit.lineage import Lineage
from growkit.quantity import format_count

HISTORY = "history.csv"  # the file of a run's checkpoint that holds its metrics
MOST_TRAININGS = 4  # columns of the table, the last trainings
MOST_POINTS = 12  # validations in the table of the curve
MOST_EVENTS = 20
HIGHEST_LOSS = 30.0  # nats a token; exp(30) is shown for the perplexity of anything above


def format_trainings(lineage: Lineage) -> str:
    """Data and hyper-parameters in Markdown: a column for each training; empty without any.

    Columns are numbered as the entries of the lineage are.
    """
    found = [
        (number, entry.config)
        for number, entry in enumerate(lineage, 1)
        if isinstance(entry, Training)
    ]
    shown = found[-MOST_TRAININGS:]
    if not shown:
        return ""
    columns = [_describe_config(config) for _, config in shown]
    head = ["", *(f"training {number}" for number, _ in shown)]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return _format_table([head, ["---"] * len(head), *rows])


def _describe_config(config: Mapping[str, Any]) -> dict[str, str]:
    """The rows of a training's column, by name."""
    sections = ("batch", "optimizer", "schedule", "dropout", "precision", "model", "data")
    batch, optimizer, schedule, dropout, precision, model, data = (
        _take_section(config, name) for name in sections
    )
    return {
        "data": _describe_data(data.get("train")),
        "batch": _fill(batch | model, "{sequences} sequences of {context} tokens"),
        "learning rate": _fill(optimizer | schedule, "{learning_rate:g}, {kind}")
        + _fill(schedule, " to {floor:.0%} over {steps:,} steps, {warmup:,} of warm-up", ""),
        "AdamW": _fill(optimizer, "betas {beta1:g} and {beta2:g}, eps {eps:g}")
        + _fill(optimizer, ", weight decay {weight_decay:g}, clip {clip:g}", ""),
        "dropout": _fill(
            dropout, "hidden {hidden:g}, attention {attention:g}, embedding {embedding:g}"
        ),
        "precision": _fill(precision, "parameters {params}, products {compute}"),
        "seed": _fill(config, "{seed}"),
    }


def _take_section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return dict(section) if isinstance(section, Mapping) else {}


def _fill(values: Mapping[str, Any], words: str, otherwise: str = "-") -> str:
    """The words with values in place of their names; `otherwise` where one is missing."""
    try:
        return words.format_map(values)
    except (KeyError, ValueError, TypeError):
        return otherwise


def _describe_data(train: Any) -> str:
    """The names of the data sets, with their weights where those differ."""
    if isinstance(train, list):
        train = dict.fromkeys(map(str, train), 1)
    if not isinstance(train, Mapping) or not train:
        return "-"
    if len(set(map(str, train.values()))) == 1:
        return ", ".join(map(str, train))
    return ", ".join(f"{name} (weight {weight})" for name, weight in train.items())


def format_curve(history: bytes) -> str:
    """The validation losses of a history in Markdown, with growth and all other events.

    Empty where it has none, or cannot be read.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(history.decode())))
        validated = [row for row in rows if row.get("validation_loss")]
        chosen = [validated[place] for place in _spread(len(validated), MOST_POINTS)]
        events = [row for row in rows if row.get("event")][-MOST_EVENTS:]
        # In the order of the file, in which tokens only rise.
        lines = [_describe_row(row) for row in rows if row in chosen or row in events]
    except (UnicodeDecodeError, csv.Error, ValueError, KeyError):
        return ""
    if not chosen:
        return ""
    head = ["tokens", "training FLOPs", "validation loss", "perplexity", "event"]
    return _format_table([head, ["---:"] * 4 + ["---"], *lines])


def _spread(count: int, most: int) -> list[int]:
    """At most so many places of `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def _describe_row(row: Mapping[str, str]) -> list[str]:
    loss = float(row["validation_loss"]) if row["validation_loss"] else None
    figures = ["", ""]
    if loss is not None:
        figures = [f"{loss:.4f}", f"{math.exp(min(loss, HIGHEST_LOSS)):.2f}"]
    tokens = format_count(float(row["tokens"]))
    return [tokens, f"{float(row['flops']):.3g}", *figures, row["event"]]


def _format_table(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(map(_clean, cells))} |" for cells in rows) + "\n"


def _clean(cell: str) -> str:
    """A cell's text on one line, without what would end the cell."""
    return " ".join(cell.replace("|", "\\|").split())
