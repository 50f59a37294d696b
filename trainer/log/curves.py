"""The picture of a run: train and validation perplexity over tokens, and beside it what tasks gave over compute.

Growth is marked where it happened.

Knows how rows of a history are drawn; leaves when to draw to the loop.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence

from etils import epath

from trainer.devices.hosts import write_once
from trainer.log.history import GROWN

Row = Mapping[str, str]
TRAIN, VALIDATION, MARK = "#9fb8d9", "#1b4f9c", "#c0392b"
SMOOTHED = 20  # rows at most; a tenth of a short line


def read_points(rows: Sequence[Row], column: str) -> tuple[list[float], list[float]]:
    """(tokens, perplexity) of the rows that have a loss in `column`."""
    chosen = [row for row in rows if row[column]]
    return [float(row["tokens"]) for row in chosen], [
        math.exp(min(float(row[column]), 30.0)) for row in chosen
    ]


def smooth(values: Sequence[float]) -> list[float]:
    """The geometric mean of each value and some before it (the mean of the losses)."""
    width = max(1, min(SMOOTHED, len(values) // 10))
    logs = [math.log(value) for value in values]
    windows = [logs[max(0, end - width) : end] for end in range(1, len(logs) + 1)]
    return [math.exp(sum(window) / len(window)) for window in windows]


def split_segments(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows split where a run began: lines are not drawn across growth."""
    found: list[list[Row]] = [[]]
    for row in rows:
        if row["event"].startswith(("start", GROWN)) and found[-1]:
            found.append([])
        found[-1].append(row)
    return found


def collect_scores(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{metric: {task: [(FLOPs, value)]}} of the rows that have scores."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for name, value in json.loads(row.get("scores") or "{}").items():
            task, _, metric = name.rpartition(" ")
            found.setdefault(metric, {}).setdefault(task, []).append((float(row["flops"]), value))
    return found


def draw_curves(
    path: epath.Path,
    rows: Sequence[Row],
    title: str,
    others: Mapping[str, Sequence[Row]] | None = None,
) -> None:
    """Write a PNG of the perplexities; `others` are further runs, drawn by their validation only, by name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    measured = collect_scores(rows)
    width = 9 + 5 * len(measured)
    figure, panels = pyplot.subplots(
        1, 1 + len(measured), figsize=(width, 5), constrained_layout=True, squeeze=False
    )
    axes, *beside = panels[0]
    for number, segment in enumerate(split_segments(rows)):
        _draw_segment(axes, segment, labelled=number == 0)
    for name, other in (others or {}).items():
        tokens, perplexity = read_points(other, "validation_loss")
        axes.plot(tokens, perplexity, "s--", color="#7d8a2e", markersize=4, label=name)
    for panel, metric in zip(beside, measured, strict=True):
        _draw_scores(panel, rows, metric)
    _mark_growth(axes, rows, "tokens")
    axes.set(title=title, xlabel="tokens seen", ylabel="perplexity", yscale="log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(EngFormatter(sep=""))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    write_once(path, picture.getvalue())


def _draw_segment(axes, rows: Sequence[Row], labelled: bool) -> None:
    tokens, perplexity = read_points(rows, "loss")
    if tokens:
        axes.plot(
            tokens,
            smooth(perplexity),
            color=TRAIN,
            linewidth=1.5,
            label="train, smoothed" if labelled else None,
        )
    tokens, perplexity = read_points(rows, "validation_loss")
    if tokens:
        axes.plot(
            tokens,
            perplexity,
            "o-",
            color=VALIDATION,
            markersize=4,
            label="validation" if labelled else None,
        )


def _draw_scores(axes, rows: Sequence[Row], metric: str) -> None:
    """A metric's tasks, the source's line and the grown model's apart in one colour, on one axis of compute."""
    from matplotlib.ticker import EngFormatter

    tasks = list(collect_scores(rows)[metric])
    for segment in split_segments(rows):
        for number, task in enumerate(tasks):
            line = collect_scores(segment).get(metric, {}).get(task, [])
            flops, values = [point[0] for point in line], [point[1] for point in line]
            first = line and line[0] == collect_scores(rows)[metric][task][0]
            axes.plot(
                flops, values, "o-", color=f"C{number}", markersize=4, label=task if first else None
            )
    _mark_growth(axes, rows, "flops")
    axes.set(title=metric, xlabel="FLOPs", yscale="log" if metric == "perplexity" else "linear")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()


def _mark_growth(axes, rows: Sequence[Row], column: str) -> None:
    for row in rows:
        if GROWN in row["event"]:
            axes.axvline(float(row[column]), color=MARK, linestyle=":", linewidth=1.5)
            words = row["event"].removeprefix("start, ")
            axes.annotate(
                words,
                (float(row[column]), 0.98),
                xycoords=("data", "axes fraction"),
                rotation=90,
                ha="right",
                va="top",
                color=MARK,
                fontsize=9,
            )
