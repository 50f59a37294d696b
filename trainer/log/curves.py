"""The pictures of a run: perplexity over tokens, and on a page of their own task scores over FLOPs.

Growth, falls of the learning rate and changes of the data are marked. The fall at the beginning of
training is cut off, so that what comes after it can be seen.
"""

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
# One for each further run.
OTHER_COLOURS = "#7d8a2e", "#8e5ea2", "#d98c1f", "#3c9d8f"
GROWTH_COLOUR = "#c0392b"
EVENT_COLOUR = "#777777"
# The part of all that is on the axis in which training from nothing falls steeply.
FIRST_FALL = 0.05
MARGIN = 1.1  # factor between the values that are shown and the ends of the axis
FEW_TICKS = 8.0  # a range up to this factor has ticks at even distances, a longer one at 1, 2 and 5
X_LABELS = {"tokens": "tokens seen", "flops": "training FLOPs"}
SMOOTHED_ROWS = 20  # at most; a short line is smoothed over a tenth of its rows
HIGHEST_LOSS = 30.0  # nats a token; exp(30) is drawn for anything above
SET_COLOURS = "#5aa9a3", "#c58b5c", "#9a86c0", "#a8b45a"  # of the data sets that are validated on
LOSSES_SIZE = 9, 5  # inches
SCORES_SIZE = 6.5, 5  # inches, of each metric
CLOSE = 1 / 9  # of an axis: labels of ticks that are closer to each other overlap


def read_points(
    rows: Sequence[Row], column: str, over: str = "tokens"
) -> tuple[list[float], list[float]]:
    """(tokens or FLOPs, perplexities) of the rows that have a loss in `column`."""
    found = [row for row in rows if row[column]]
    places = [float(row[over]) for row in found]
    perplexities = [math.exp(min(float(row[column]), HIGHEST_LOSS)) for row in found]
    return places, perplexities


def collect_sets(
    rows: Sequence[Row], over: str = "tokens"
) -> dict[str, tuple[list[float], list[float]]]:
    """{data set: (tokens or FLOPs, perplexities)} where several are validated on."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        losses = json.loads(row.get("validation_losses") or "{}")
        for name, loss in losses.items():
            places, perplexities = found.setdefault(name, ([], []))
            places.append(float(row[over]))
            perplexities.append(math.exp(min(loss, HIGHEST_LOSS)))
    return found


def choose_range(rows: Sequence[Row], over: str = "tokens") -> tuple[float, float] | None:
    """The perplexities to show: all validations but those of the first fall; None without any.

    The jump where a model grew is no part of the fall. A run so short that nothing else is left is
    shown whole.
    """
    lines = [read_points(rows, "validation_loss", over), *collect_sets(rows, over).values()]
    points = [point for line in lines for point in zip(*line, strict=True)]
    if not points:
        return None
    perplexities = [perplexity for _, perplexity in points]
    end = FIRST_FALL * max(place for place, _ in points)
    later = [perplexity for place, perplexity in points if place > end] or perplexities
    if len(later) < 2:
        later = perplexities
    return min(later) / MARGIN, max(later) * MARGIN


def choose_ticks(low: float, high: float) -> list[float]:
    """Perplexities for the ticks of a logarithmic axis, so few that their labels have room."""
    if high / low <= FEW_TICKS:
        from matplotlib.ticker import MaxNLocator

        found = MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        return [float(tick) for tick in found if low <= tick <= high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # Over many decades, powers of ten alone.
    digits = (1,) if len(decades) > 4 else (1, 2, 5)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def drop_close(ticks: Sequence[float], low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis without those too close to the one before for their labels."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or math.log(tick / kept[-1]) >= CLOSE * math.log(high / low):
            kept.append(tick)
    return kept


def name_best(ends: Mapping[str, float]) -> dict[str, str]:
    """Labels by name, with the final perplexity; where there are several, the lowest is named."""
    best = min(ends, key=lambda name: ends[name], default=None)
    marked = best if len(ends) > 1 else None
    return {
        name: f"{name}: {end:.4g}" + (" (best)" if name == marked else "")
        for name, end in ends.items()
    }


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
    over: str = "tokens",
) -> None:
    """Write a PNG of the losses in a run's rows.

    others: rows of further runs by name, of which only the validation is drawn. over: 'tokens' or
    'flops'; over FLOPs, runs of models of different sizes end at the same place when they took the
    same compute.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=LOSSES_SIZE, constrained_layout=True)
    _draw_losses(axes, rows, title, others or {}, over)
    _write_figure(path, figure)


def draw_scores(path: epath.Path, rows: Sequence[Row], title: str) -> None:
    """Write a PNG of the tasks' scores in a run's rows, a panel for each metric."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = list(collect_scores(rows))
    width, height = SCORES_SIZE
    size = (width * len(metrics), height)
    figure, panels = pyplot.subplots(
        1, len(metrics), figsize=size, constrained_layout=True, squeeze=False
    )
    figure.suptitle(title)
    for axes, metric in zip(panels[0], metrics, strict=True):
        _draw_scores(axes, rows, metric)
    _write_figure(path, figure)


def _write_figure(path: epath.Path, figure: Any) -> None:
    from matplotlib import pyplot

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    write_once(path, picture.getvalue())


def _draw_losses(
    axes: Any, rows: Sequence[Row], title: str, others: Mapping[str, Sequence[Row]], over: str
) -> None:
    """Train and validation perplexity over tokens or FLOPs, this run's and others'."""
    from matplotlib.ticker import EngFormatter

    runs = {"validation": rows, **others}
    points = {name: read_points(each, "validation_loss", over) for name, each in runs.items()}
    labels = name_best({name: ends[-1] for name, (_, ends) in points.items() if ends})
    for number, segment in enumerate(split_segments(rows)):
        label = labels.get("validation") if number == 0 else None
        _draw_segment(axes, segment, over, label)
    _draw_sets(axes, rows, over)
    for number, name in enumerate(others):
        colour = OTHER_COLOURS[number % len(OTHER_COLOURS)]
        axes.plot(*points[name], "s--", color=colour, markersize=4, label=labels.get(name))
    _mark_events(axes, rows, over)
    axes.set(title=title, xlabel=X_LABELS[over], ylabel="perplexity", yscale="log")
    _limit_perplexity(axes, runs, over)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, which="major", alpha=0.25)
    axes.legend()


def _draw_segment(axes: Any, rows: Sequence[Row], over: str, label: str | None) -> None:
    """A run between two growths. label: of its validation, None for all segments but the first."""
    places, perplexities = read_points(rows, "loss", over)
    if places:
        train_label = "train, smoothed" if label else None
        axes.plot(
            places, smooth(perplexities), color=TRAIN_COLOUR, linewidth=1.5, label=train_label
        )
    places, perplexities = read_points(rows, "validation_loss", over)
    if places:
        axes.plot(places, perplexities, "o-", color=VALIDATION_COLOUR, markersize=4, label=label)


def _draw_sets(axes: Any, rows: Sequence[Row], over: str) -> None:
    """The perplexity on each data set, a thin line of its own colour between two growths."""
    for number, (name, (_, perplexities)) in enumerate(collect_sets(rows, over).items()):
        label: str | None = f"on {name}: {perplexities[-1]:.4g}"
        colour = SET_COLOURS[number % len(SET_COLOURS)]
        for segment in split_segments(rows):
            line = collect_sets(segment, over).get(name)
            if line is not None:
                axes.plot(*line, "-", color=colour, linewidth=1, label=label)
                label = None


def _limit_perplexity(axes: Any, runs: Mapping[str, Sequence[Row]], over: str) -> None:
    """Cut the axis to what `choose_range` shows, say what is left out, and set the ticks.

    runs: all that are drawn, by name, the first with its training losses, which count below.
    """
    own = next(iter(runs.values()))
    rows = [row for each in runs.values() for row in each]
    shown = choose_range(rows, over)
    if shown is not None:
        trained = smooth(read_points(own, "loss", over)[1])
        low = min([shown[0], *(perplexity / MARGIN for perplexity in trained)])
        axes.set_ylim(low, shown[1])
        highest = max(read_points(rows, "validation_loss", over)[1])
        if highest > shown[1]:
            words = f"starts at {highest:,.0f} (cut off)"
            axes.annotate(words, (0.01, 0.98), xycoords="axes fraction", va="top", fontsize=9)
    _set_perplexity_ticks(axes)


def _set_perplexity_ticks(axes: Any) -> None:
    """Ticks of a logarithmic axis of perplexities, with the limits that it has now."""
    from matplotlib.ticker import EngFormatter, FixedLocator, NullFormatter

    axes.yaxis.set_major_locator(FixedLocator(choose_ticks(*axes.get_ylim())))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_formatter(NullFormatter())


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
    _mark_events(axes, rows, "flops")
    axes.set(title=metric, xlabel="FLOPs", yscale="linear")
    if metric == "perplexity":
        axes.set_yscale("log")
        _set_perplexity_ticks(axes)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()


def _mark_events(axes: Any, rows: Sequence[Row], column: str) -> None:
    """A dotted line where something happened to the run, with the event's words beside it.

    The start of a run that nothing preceded is not marked: there is nothing to its left. Events of
    one place share a line.
    """
    events: dict[float, list[str]] = {}
    for row in rows:
        words = row["event"].removeprefix(START).removeprefix(", ")
        if words:
            events.setdefault(float(row[column]), []).append(words)
    for place, several in events.items():
        words = "; ".join(several)
        colour = GROWTH_COLOUR if GROWN in words else EVENT_COLOUR
        axes.axvline(place, color=colour, linestyle=":", linewidth=1.5)
        axes.annotate(
            words,
            (place, 0.98),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="right",
            va="top",
            color=colour,
            fontsize=9,
        )
