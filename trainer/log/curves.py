"""The picture of a run: perplexity over tokens, task scores over FLOPs, growth marked."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from trainer.devices.hosts import write_once
from trainer.log.history import GROWN, START

Row = Mapping[str, str]
Points = list[tuple[float, float]]
TRAIN_COLOUR = "#9fb8d9"
VALIDATION_COLOUR = "#1b4f9c"
OTHER_COLOUR = "#7d8a2e"
GROWTH_COLOUR = "#c0392b"
SMOOTHED_ROWS = 20  # at most; a short line is smoothed over a tenth of its rows
HIGHEST_LOSS = 30.0  # nats a token; exp(30) is drawn for anything above
PANEL_WIDTHS = 9, 5  # inches: of the losses, and of each metric beside them


def read_points(rows: Sequence[Row], column: str) -> tuple[list[float], list[float]]:
    """(tokens, perplexities) of the rows that have a loss in `column`."""
    found = [row for row in rows if row[column]]
    tokens = [float(row["tokens"]) for row in found]
    perplexities = [math.exp(min(float(row[column]), HIGHEST_LOSS)) for row in found]
    return tokens, perplexities


def smooth(values: Sequence[float]) -> list[float]:
    """The geometric mean of each value and some before it, which is the mean of the losses."""
    width = max(1, min(SMOOTHED_ROWS, len(values) // 10))
    logs = [math.log(value) for value in values]
    windows = [logs[max(0, end - width) : end] for end in range(1, len(logs) + 1)]
    return [math.exp(sum(window) / len(window)) for window in windows]


def split_segments(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows, split where a run began or the model grew: no line is drawn across a growth."""
    found: list[list[Row]] = [[]]
    for row in rows:
        begins = row["event"].startswith((START, GROWN))
        if begins and found[-1]:
            found.append([])
        found[-1].append(row)
    return found


def collect_scores(rows: Sequence[Row]) -> dict[str, dict[str, Points]]:
    """{metric: {task: [(FLOPs, value)]}} of the rows that have scores."""
    found: dict[str, dict[str, Points]] = {}
    for row in rows:
        scores = json.loads(row.get("scores") or "{}")
        for name, value in scores.items():
            task, _, metric = name.rpartition(" ")
            point = float(row["flops"]), value
            found.setdefault(metric, {}).setdefault(task, []).append(point)
    return found


def draw_curves(
    path: epath.Path,
    rows: Sequence[Row],
    title: str,
    others: Mapping[str, Sequence[Row]] | None = None,
) -> None:
    """Write a PNG of a run's rows.

    others: rows of further runs by name, of which only the validation is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = list(collect_scores(rows))
    first_width, other_width = PANEL_WIDTHS
    width = first_width + other_width * len(metrics)
    figure, panels = pyplot.subplots(
        1, 1 + len(metrics), figsize=(width, 5), constrained_layout=True, squeeze=False
    )
    axes, *score_axes = panels[0]
    _draw_losses(axes, rows, title, others or {})
    for panel, metric in zip(score_axes, metrics, strict=True):
        _draw_scores(panel, rows, metric)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    write_once(path, picture.getvalue())


def _draw_losses(
    axes: Any, rows: Sequence[Row], title: str, others: Mapping[str, Sequence[Row]]
) -> None:
    """Train and validation perplexity over tokens."""
    from matplotlib.ticker import EngFormatter

    for number, segment in enumerate(split_segments(rows)):
        _draw_segment(axes, segment, labelled=number == 0)
    for name, other in others.items():
        tokens, perplexities = read_points(other, "validation_loss")
        axes.plot(tokens, perplexities, "s--", color=OTHER_COLOUR, markersize=4, label=name)
    _mark_growth(axes, rows, "tokens")
    axes.set(title=title, xlabel="tokens seen", ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()


def _draw_segment(axes: Any, rows: Sequence[Row], labelled: bool) -> None:
    tokens, perplexities = read_points(rows, "loss")
    if tokens:
        label = "train, smoothed" if labelled else None
        axes.plot(tokens, smooth(perplexities), color=TRAIN_COLOUR, linewidth=1.5, label=label)
    tokens, perplexities = read_points(rows, "validation_loss")
    if tokens:
        label = "validation" if labelled else None
        axes.plot(tokens, perplexities, "o-", color=VALIDATION_COLOUR, markersize=4, label=label)


def _draw_scores(axes: Any, rows: Sequence[Row], metric: str) -> None:
    """A metric of all tasks over FLOPs: one colour a task, a line each before and after growth."""
    from matplotlib.ticker import EngFormatter

    for number, (task, points) in enumerate(collect_scores(rows)[metric].items()):
        for segment in split_segments(rows):
            line = collect_scores(segment).get(metric, {}).get(task, [])
            begins = bool(line) and line[0] == points[0]
            axes.plot(
                [flops for flops, _ in line],
                [value for _, value in line],
                "o-",
                color=f"C{number}",
                markersize=4,
                label=task if begins else None,
            )
    _mark_growth(axes, rows, "flops")
    axes.set(title=metric, xlabel="FLOPs", yscale="log" if metric == "perplexity" else "linear")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()


def _mark_growth(axes: Any, rows: Sequence[Row], column: str) -> None:
    """A dotted line where the model grew, with the event's words beside it."""
    for row in rows:
        if GROWN not in row["event"]:
            continue
        place = float(row[column])
        axes.axvline(place, color=GROWTH_COLOUR, linestyle=":", linewidth=1.5)
        axes.annotate(
            row["event"].removeprefix(f"{START}, "),
            (place, 0.98),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="right",
            va="top",
            color=GROWTH_COLOUR,
            fontsize=9,
        )
