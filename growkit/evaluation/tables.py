"""The tables of a record of evaluations, and the notes below them, in Markdown and on a terminal.

Every table fits the width it is printed in, however long the models' paths are: names are shortened
and columns that find no room follow in a table below.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from growkit.evaluation.catalogue import BPB, METRICS, PERCENT, Key, find_title, is_full
from growkit.evaluation.notes import build_notes
from growkit.evaluation.reference import Reference, read_reference

Record = dict[str, Any]
# Decimal places, as figures are published.
PLACES = {"acc": 2, "acc_norm": 2, "perplexity": 2, "bits_per_byte": 4}
WIDTH = 80  # columns of what is not printed on a terminal
# With names of this length and headings of these, the five columns of the 760M run's second table
# take 79 columns.
LONGEST_NAME = 24
HEADING = 9
GAP = "  "


@dataclass(frozen=True)
class Column:
    """A column: its title, the lines of its heading on a terminal, and the figure in it."""

    title: str
    heading: tuple[str, ...]
    key: Key


@dataclass(frozen=True)
class Table:
    """Columns, and for each row a name and a cell for each column."""

    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[str]]]


def format_markdown(record: Record, reference: Reference | None = None) -> str:
    """The tables and notes in Markdown. reference: published rows; None for the usual ones."""
    names = [name_model(model) for model in record["models"]]
    blocks = []
    for table in build_tables(record, names, reference):
        head = ["model", *(column.title for column in table.columns)]
        rule = ["---"] + ["---:"] * len(table.columns)
        lines = [head, rule, *([name, *cells] for name, cells in table.rows)]
        blocks.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join([*blocks, *build_notes(record, names, reference)]) + "\n"


def print_record(record: Record, reference: Reference | None = None) -> None:
    """Print the tables and notes to standard output, as wide as the terminal or 80 columns."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    names = shorten_names(record["models"])
    for table in build_tables(record, names, reference):
        for lines in _lay_out(table, width):
            click.echo("\n".join(lines) + "\n")
    for note in build_notes(record, names, reference):
        click.echo(textwrap.fill(note, width, break_long_words=False, break_on_hyphens=False))


def name_model(model: Record) -> str:
    """What a model is called: its label, or the source that was named."""
    return str(model.get("label") or model["source"])


def shorten_names(models: Sequence[Record]) -> list[str]:
    """Names of at most LONGEST_NAME characters for all models, no two alike."""
    names: list[str] = []
    for model in models:
        name = _shorten(name_model(model))
        number = 1
        while name in names:
            number += 1
            name = f"{_shorten(name_model(model), LONGEST_NAME - 4)} ({number})"
        names.append(name)
    return names


def _shorten(name: str, longest: int = LONGEST_NAME) -> str:
    """A name, or the end of a path, that is not too long."""
    if len(name) <= longest:
        return name
    *before, short = name.rstrip("/").split("/")
    if len(short) > longest:
        half = (longest - 2) // 2
        return f"{short[:half]}..{short[-half:]}"
    while before and len(f"{before[-1]}/{short}") <= longest:
        short = f"{before.pop()}/{short}"
    return short


def build_tables(
    record: Record, names: Sequence[str], reference: Reference | None = None
) -> Iterator[Table]:
    """The tables of a reference that has some; then that of tasks, and that of bits per byte.

    names: of the models. Without a reference the usual published rows stand beside full sets.
    """
    keys = list_keys(record)
    shown: set[Key] = set()
    for form in reference.tables if reference else ():
        columns = [Column(title, _wrap(title), key) for title, key in form]
        found = {column.key for column in columns}
        if not found.isdisjoint(keys):
            yield _build_table(record, names, columns, reference, plain=True)
            shown |= found
    left = [key for key in keys if key not in shown]
    for of_text in (False, True):
        columns = [_make_column(key) for key in left if key[0].startswith(BPB) == of_text]
        if columns:
            yield _build_table(record, names, columns, reference)


def list_keys(record: Record) -> list[Key]:
    """Every figure that some model has, in order."""
    found: dict[Key, None] = {}
    for model in record["models"]:
        for result in model["results"]:
            found |= dict.fromkeys((result["name"], metric) for metric in result["figures"])
    names = list(dict.fromkeys(name for name, _ in found))
    return [key for name in names for key in found if key[0] == name]


def _make_column(key: Key) -> Column:
    name, metric = find_title(key[0]), METRICS[key[1]]
    return Column(f"{name} ({metric})", (name, metric), key)


def _wrap(title: str) -> tuple[str, ...]:
    """The lines of a heading."""
    longest = max(map(len, title.split()))
    return tuple(textwrap.wrap(title, max(HEADING, longest)))


def _build_table(
    record: Record,
    names: Sequence[str],
    columns: Sequence[Column],
    reference: Reference | None,
    plain: bool = False,
) -> Table:
    """The models that were measured, then published rows. plain: figures without their errors."""
    rows = []
    for name, model in zip(names, record["models"], strict=True):
        rows.append((name, [_format_result(model, column.key, plain) for column in columns]))
    if reference is None:
        asked = [
            name for name in dict.fromkeys(c.key[0] for c in columns) if _is_full(record, name)
        ]
        published = read_reference().select(asked)
    else:
        published = reference.select([column.key[0] for column in columns])
    for title, figures in published.items():
        if any(column.key in figures for column in columns):
            cells = [_format_figure(c.key[1], figures.get(c.key), None) for c in columns]
            alone = plain and title not in names
            rows.append((title if alone else f"{title}, published", cells))
    return Table(columns, rows)


def _lay_out(table: Table, width: int) -> Iterator[list[str]]:
    """The lines of a table; of several, where its columns are wider than `width` together."""
    names = ["model", *(_shorten(name) for name, _ in table.rows)]
    widest = max(map(len, names))
    first = 0
    while first < len(table.columns):
        stop = first + 1
        while stop < len(table.columns) and _measure(table, first, stop + 1, widest) <= width:
            stop += 1
        yield list(_format_lines(table, names, first, stop))
        first = stop


def _width_of(table: Table, number: int) -> int:
    """The width of a column, from 0."""
    heading = table.columns[number].heading
    return max(len(text) for text in (*heading, *(cells[number] for _, cells in table.rows)))


def _measure(table: Table, first: int, stop: int, widest: int) -> int:
    """The width of a table of some of the columns."""
    return widest + sum(len(GAP) + _width_of(table, number) for number in range(first, stop))


def _format_lines(table: Table, names: Sequence[str], first: int, stop: int) -> Iterator[str]:
    """The heading, a rule and the rows of a table of some of the columns."""
    numbers = range(first, stop)
    widths = [max(map(len, names)), *(_width_of(table, number) for number in numbers)]
    headings = [("model",), *(table.columns[number].heading for number in numbers)]
    height = max(map(len, headings))
    for line in range(height):
        yield _join([heading[line] if line < len(heading) else "" for heading in headings], widths)
    yield GAP.join("-" * width for width in widths)
    for name, (_, cells) in zip(names[1:], table.rows, strict=True):
        yield _join([name, *(cells[number] for number in numbers)], widths)


def _join(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A line: the first cell to the left, all others to the right."""
    name, *figures = (
        cell.rjust(width) if number else cell.ljust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return GAP.join([name, *figures]).rstrip()


def _is_full(record: Record, name: str) -> bool:
    """Whether every model that has a result was asked the full set, see `catalogue.is_full`."""
    results = [r for model in record["models"] for r in model["results"] if r["name"] == name]
    return all(is_full(name, result["documents"], result["total"]) for result in results)


def _format_result(model: Record, key: Key, plain: bool) -> str:
    """A model's figure in a table, or '-'."""
    name, metric = key
    for result in model["results"]:
        if result["name"] == name and metric in result["figures"]:
            figure = result["figures"][metric]
            error = None if plain else figure["standard_error"]
            return _format_figure(metric, figure["value"], error)
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
