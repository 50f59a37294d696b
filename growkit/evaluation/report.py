"""Evaluations as they are shown and kept: one record, as JSON has it, and its tables in Markdown and on a terminal.

A record is {versions, settings, models: [{source, kind, fingerprint, ..., results}]}; everything shown is made from
it, so a file that was kept can be shown again. Knows figures and words; leaves measuring to `harness`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from growkit.checkpoint.files import encode_json
from growkit.checkpoint.tensor import Source
from growkit.errors import GrowkitError, UsageError
from growkit.evaluation.catalogue import BPB, SEED, find_title, is_full, select_published
from growkit.evaluation.harness import Answer, collect_versions, encode_answer

Record = dict[str, Any]
Key = tuple[str, str]
METRICS = {
    "acc": "acc, %",
    "acc_norm": "acc_norm, %",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}
PERCENT = ("acc", "acc_norm")


def start_record(settings: dict[str, Any]) -> Record:
    """A record without models yet. settings: what was asked for; the seed by which items are drawn is added."""
    return {"versions": collect_versions(), "settings": settings | {"seed": SEED}, "models": []}


def record_model(text: str, source: Source, answers: Sequence[Answer]) -> Record:
    """What a record keeps of a model that was named `text`."""
    return {
        "source": text,
        "kind": source.kind,
        "parameters": source.model.parameters,
        "fingerprint": source.fingerprint,
        "lineage": source.lineage,
        "results": [encode_answer(answer) for answer in answers],
    }


def write_record(record: Record, path: Path, card: Path) -> None:
    """Keep a record as JSON, and its tables as Markdown; each file whole or not at all."""
    for file, content in ((card, format_markdown(record).encode()), (path, encode_json(record))):
        part = file.with_name(f".{file.name}.part")
        part.write_bytes(content)
        part.replace(file)


def read_record(path: Path) -> Record:
    """A record that `growkit evaluate --output` wrote. Raises UsageError, GrowkitError when it is none."""
    if not path.is_file():
        raise UsageError(f"there is no such file: {path}; growkit evaluate --output writes one")
    try:
        record = json.loads(path.read_text())
        for model in record["models"]:
            for result in model["results"]:
                {
                    metric: (figure["value"], figure["standard_error"])
                    for metric, figure in result["figures"].items()
                }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise GrowkitError(f"{path} is not what growkit evaluate --output writes") from None
    return record


def select_model(record: Record, source: Source, path: Path) -> Record:
    """The record, which was read from `path`, with one model alone. Raises UsageError when it is not of that model."""
    models = [model for model in record["models"] if model["fingerprint"] == source.fingerprint]
    if not models:
        names = ", ".join(model["source"] for model in record["models"])
        raise UsageError(
            f"{path} has figures of {names}, and none of {source.path} as it is; evaluate that first"
        )
    return record | {"models": [models[-1] | {"source": "this model"}]}


def build_tables(record: Record) -> Iterator[tuple[list[tuple[str, str]], list[list[str]]]]:
    """The tables, tasks and then bits per byte: (title, metric) of each column, and rows, the model's name first."""
    names = list(
        dict.fromkeys(result["name"] for model in record["models"] for result in model["results"])
    )
    for parts in (
        [n for n in names if not n.startswith(BPB)],
        [n for n in names if n.startswith(BPB)],
    ):
        if not parts:
            continue
        keys = [(name, metric) for name in parts for metric in _metrics(record, name)]
        rows = [
            [model["source"], *(_measured(model, key) for key in keys)]
            for model in record["models"]
        ]
        for model, figures in select_published([name for name in parts if _full(record, name)]).items():
            rows.append(
                [f"{model}, published", *(_shown(key[1], figures.get(key), None) for key in keys)]
            )
        yield [(find_title(name), METRICS[metric]) for name, metric in keys], rows


def build_notes(record: Record) -> list[str]:
    """What must be known to read the tables, a sentence each."""
    first, settings = record["models"][0], record["settings"]
    counts = ", ".join(f"{find_title(r['name'])} {_count(r)}" for r in first["results"])
    lines = [
        f"± is one standard error. Documents: {counts}.",
        f"lm-evaluation-harness {record['versions']['lm_eval']}, zero-shot, in {settings['dtype']}, windows of at most "
        f"{settings['max_length']} tokens.",
    ]
    for model in record["models"]:
        cut = ", ".join(f"{find_title(r['name'])} {r['cut']}" for r in model["results"] if r["cut"])
        if cut:
            lines.append(
                f"Requests to {model['source']} that are longer, their contexts cut on the left: {cut}."
            )
    if any(select_published([r["name"]]) and _full(record, r["name"]) for r in first["results"]):
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
    """Print the tables to standard output, as many columns side by side as the terminal is wide."""
    import sys

    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=160)
    for headings, rows in build_tables(record):
        widest = max(len(row[0]) for row in rows)
        across = max(1, (console.width - widest) // 18)
        for first in range(0, len(headings), across):
            table = Table(show_edge=False, header_style="bold")
            table.add_column("model", no_wrap=True)
            for heading in headings[first : first + across]:
                table.add_column("\n".join(heading), justify="right", no_wrap=True)
            for row in rows:
                table.add_row(row[0], *row[1 + first : 1 + first + across])
            console.print(table)
            console.print()
    for line in build_notes(record):
        console.print(line, highlight=False, soft_wrap=True)


def _metrics(record: Record, name: str) -> list[str]:
    return next(
        list(r["figures"]) for m in record["models"] for r in m["results"] if r["name"] == name
    )


def _measured(model: Record, key: Key) -> str:
    for result in model["results"]:
        if result["name"] == key[0]:
            figure = result["figures"][key[1]]
            return _shown(key[1], figure["value"], figure["standard_error"])
    return "-"


def _shown(metric: str, value: float | None, error: float | None) -> str:
    """A figure and its standard error: accuracies in percent, bits per byte to four places, as they are published."""
    if value is None:
        return "-"
    scale, places = (100, 2) if metric in PERCENT else (1, 4 if metric == "bits_per_byte" else 2)
    text = f"{value * scale:.{places}f}" if value < 1e5 else f"{value:.3g}"
    if error is None:
        return text
    return f"{text} ± {error * scale:.{places}f}" if value < 1e5 else f"{text} ± {error:.1g}"


def _count(result: Record) -> str:
    documents, total = result["documents"], result["total"]
    return f"{documents:,}" if documents == total else f"{documents:,} of {total:,}"


def _full(record: Record, name: str) -> bool:
    results: Sequence[Record] = [
        r for m in record["models"] for r in m["results"] if r["name"] == name
    ]
    return all(is_full(name, result["documents"], result["total"]) for result in results)
