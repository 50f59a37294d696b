"""Evaluations as they are shown and kept: a record, and its tables in Markdown and on a terminal.

A record is {versions, settings, models: [{source, kind, fingerprint, ..., results}]}, in JSON's
types. Everything shown is made from it, so a record that was kept can be shown again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from growkit.checkpoint.files import encode_json, read_json, write_atomically
from growkit.checkpoint.tensor import Source
from growkit.errors import GrowkitError, UsageError
from growkit.evaluation.catalogue import BPB, SEED, find_title, is_full, select_published
from growkit.evaluation.harness import Answer, collect_versions, encode_answer

Record = dict[str, Any]
Key = tuple[str, str]
# The title of each column, and the table's rows, each beginning with the model's name.
TableText = tuple[list[tuple[str, str]], list[list[str]]]
METRICS = {
    "acc": "acc, %",
    "acc_norm": "acc_norm, %",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}
PERCENT = ("acc", "acc_norm")
# Decimal places, as figures are published.
PLACES = {"acc": 2, "acc_norm": 2, "perplexity": 2, "bits_per_byte": 4}
# Terminal columns that a figure and its standard error take.
CELL = 18


def start_record(settings: dict[str, Any]) -> Record:
    """A record without models yet. settings: what was asked for; the seed of draws is added."""
    return {"versions": collect_versions(), "settings": settings | {"seed": SEED}, "models": []}


def record_model(text: str, source: Source, answers: Sequence[Answer]) -> Record:
    """What a record keeps of a model. text: what the user called it."""
    return {
        "source": text,
        "kind": source.kind,
        "parameters": source.model.parameters,
        "fingerprint": source.fingerprint,
        "lineage": source.lineage,
        "results": [encode_answer(answer) for answer in answers],
    }


def write_record(record: Record, path: Path, card: Path) -> None:
    """Keep a record as JSON at `path` and its tables as Markdown at `card`, each atomically."""
    write_atomically(card, format_markdown(record).encode())
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
    return record | {"models": [models[-1] | {"source": "this model"}, *others]}


def build_tables(record: Record) -> Iterator[TableText]:
    """The table of tasks, then that of bits per byte: (title, metric) of each column, and rows."""
    results = [result for model in record["models"] for result in model["results"]]
    names = list(dict.fromkeys(result["name"] for result in results))
    tasks = [name for name in names if not name.startswith(BPB)]
    texts = [name for name in names if name.startswith(BPB)]
    for group in (tasks, texts):
        if group:
            yield _build_table(record, group)


def _build_table(record: Record, names: list[str]) -> TableText:
    """One table: the models that were measured, then published figures for full sets."""
    keys = [(name, metric) for name in names for metric in _list_metrics(record, name)]
    rows = []
    for model in record["models"]:
        rows.append([model["source"], *(_format_result(model, key) for key in keys)])
    full = [name for name in names if _is_full(record, name)]
    for title, figures in select_published(full).items():
        cells = [_format_figure(key[1], figures.get(key), None) for key in keys]
        rows.append([f"{title}, published", *cells])
    return [(find_title(name), METRICS[metric]) for name, metric in keys], rows


def build_notes(record: Record) -> list[str]:
    """What a reader must know about the tables, a sentence each."""
    results = record["models"][0]["results"]
    settings = record["settings"]
    counts = ", ".join(f"{find_title(r['name'])} {_format_count(r)}" for r in results)
    lines = [
        f"± is one standard error. Documents: {counts}.",
        f"lm-evaluation-harness {record['versions']['lm_eval']}, zero-shot, in "
        f"{settings['dtype']}, windows of at most {settings['max_length']} tokens.",
    ]
    for model in record["models"]:
        cut = [f"{find_title(r['name'])} {r['cut']}" for r in model["results"] if r["cut"]]
        if cut:
            lines.append(
                f"Requests to {model['source']} that are longer, their contexts cut on the left: "
                f"{', '.join(cut)}."
            )
    full = [result["name"] for result in results if _is_full(record, result["name"])]
    if select_published(full):
        lines.append(
            "Published figures: GPT-Neo's README (tasks), arXiv 2101.00027 (bits per byte)."
        )
    return lines


def format_markdown(record: Record) -> str:
    """The tables and notes in Markdown."""
    blocks = []
    for headings, rows in build_tables(record):
        head = ["model", *(f"{name} ({metric})" for name, metric in headings)]
        lines = [head, ["---"] + ["---:"] * len(headings), *rows]
        blocks.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join([*blocks, *build_notes(record)]) + "\n"


def print_record(record: Record) -> None:
    """Print the tables to standard output; a table that is wider than the terminal is split."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=160)
    for headings, rows in build_tables(record):
        widest = max(len(row[0]) for row in rows)
        across = max(1, (console.width - widest) // CELL)
        for first in range(0, len(headings), across):
            columns = slice(first, first + across)
            part = [[row[0], *row[1:][columns]] for row in rows]
            _print_table(console, headings[columns], part)
    for line in build_notes(record):
        console.print(line, highlight=False, soft_wrap=True)


def _print_table(console: Any, headings: list[tuple[str, str]], rows: list[list[str]]) -> None:
    from rich.table import Table

    table = Table(show_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    for heading in headings:
        table.add_column("\n".join(heading), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def _find_results(record: Record, name: str) -> list[Record]:
    """Every model's result on a task."""
    return [r for model in record["models"] for r in model["results"] if r["name"] == name]


def _list_metrics(record: Record, name: str) -> list[str]:
    return list(_find_results(record, name)[0]["figures"])


def _is_full(record: Record, name: str) -> bool:
    """Whether every model was asked the full set, see `catalogue.is_full`."""
    results = _find_results(record, name)
    return all(is_full(name, result["documents"], result["total"]) for result in results)


def _format_result(model: Record, key: Key) -> str:
    """A model's figure in a table, or '-'."""
    name, metric = key
    for result in model["results"]:
        if result["name"] == name:
            figure = result["figures"][metric]
            return _format_figure(metric, figure["value"], figure["standard_error"])
    return "-"


def _format_figure(metric: str, value: float | None, error: float | None) -> str:
    """A figure and its standard error; accuracies are in percent."""
    if value is None:
        return "-"
    # An untrained model's perplexity may be astronomical.
    if value >= 1e5:
        return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.1g}"
    scale = 100 if metric in PERCENT else 1
    places = PLACES[metric]
    text = f"{value * scale:.{places}f}"
    return text if error is None else f"{text} ± {error * scale:.{places}f}"


def _format_count(result: Record) -> str:
    """'1,838', or '500 of 1,838'."""
    documents = result["documents"]
    total = result["total"]
    return f"{documents:,}" if documents == total else f"{documents:,} of {total:,}"
