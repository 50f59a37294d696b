"""The picture of a study: losses over compute, with the sources' FLOPs counted and without.

Each arm has one colour, and the best one is named. Both axes begin after the first fall of the runs
from scratch, so that arms that differ by little can be told apart.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from etils import epath

from trainer.devices.hosts import write_once
from trainer.log.curves import choose_ticks, drop_close
from trainer.log.history import METRICS, read_rows
from trainer.study.design import SCRATCH
from trainer.study.outcome import FinishedRun, Outcome, find_headline_arm

PICTURE = "study.png"
SCRATCH_COLOUR = "#888888"
# Matplotlib's colours without its grey, which is the colour of scratch.
COLOURS = tuple(f"C{number}" for number in (0, 1, 2, 3, 4, 5, 6, 8, 9))
MARGIN = 0.15  # of the range of losses, above and below them
LEAST_MARGIN = 0.1  # nats a token, where all losses are equal
FLOPS_MARGIN = 1.15  # factor between the FLOPs that are shown and the ends of the axis
MANY_COLOURS = "turbo"  # matplotlib's range that more arms than COLOURS take theirs from

Points = list[tuple[float, float]]


def draw_study(outcome: Outcome, out: Path) -> None:
    """Write OUT/study.png: the sources' FLOPs are counted on the left and not on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(15, 5), sharey=True, constrained_layout=True)
    labels = label_arms(outcome)
    limits = choose_losses(outcome)
    for axes, sources in zip(panels, (True, False), strict=True):
        points = _draw_panel(axes, outcome, out, sources, labels)
        if limits is not None:
            _limit_axes(axes, points, limits)
    panels[0].set_ylabel("validation loss, nats a token")
    # Beside the panels: with many arms it would cover their lines.
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    write_once(epath.Path(out / PICTURE), picture.getvalue())


def label_arms(outcome: Outcome) -> dict[str, str]:
    """What the legend says of each arm: its last loss, and which one saves most.

    Where none reaches the loss from scratch, the one with the lowest loss is named.
    """
    arms = [outcome.describe_arm(name) for name in outcome.study.arms]
    finished = [arm for arm in arms if arm["loss"]["mean"] is not None]
    labels = {arm["name"]: f"{arm['name']}: {arm['loss']['mean']:.4f}" for arm in finished}
    best = find_headline_arm(arms)
    if best is not None:
        more = "at least " if best["at_least"] else ""
        labels[best["name"]] += f" (best: saves {more}{best['saved']['mean']:.0%})"
    elif len(finished) > 1:
        lowest = min(finished, key=lambda arm: arm["loss"]["mean"])
        labels[lowest["name"]] += " (lowest loss)"
    return labels


def choose_colours(count: int) -> list[Any]:
    """So many colours, no two the same."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    from matplotlib import colormaps

    return [colormaps[MANY_COLOURS]((number + 0.5) / count) for number in range(count)]


def _draw_panel(
    axes: Any, outcome: Outcome, out: Path, sources: bool, labels: dict[str, str]
) -> Points:
    """Draw scratch and all arms; returns their points. sources: whether FLOPs of sources count."""
    drawn: Points = []
    first = outcome.study.seeds[0]
    for run in outcome.select_runs(SCRATCH):
        drawn += _draw_scratch(axes, run, out, labelled=run.seed == first)
    arms = outcome.study.arms
    for colour, name in zip(choose_colours(len(arms)), arms, strict=True):
        for seed in outcome.find_complete_seeds(name):
            runs = outcome.select_runs(name, seed)
            flops = [run.spent if sources else run.flops for run in runs]
            losses = [run.loss for run in runs]
            label = labels.get(name) if seed == first else None
            axes.plot(flops, losses, "o-", color=colour, markersize=4, label=label)
            drawn += zip(flops, losses, strict=True)
    counted = "the sources' included" if sources else "the sources' not counted"
    axes.set(xlabel=f"training FLOPs, {counted}", xscale="log", title="loss at the end of each run")
    axes.grid(True, which="major", alpha=0.25)
    return drawn


def _draw_scratch(axes: Any, run: FinishedRun, out: Path, labelled: bool) -> Points:
    """A run from scratch: its losses on the way as a line, its end as a star on a dotted level."""
    rows = read_rows(epath.Path(out) / "runs" / run.run / METRICS)
    validated = [row for row in rows if row["validation_loss"]]
    # The loss before the first step, at 0 FLOPs, has no place on a logarithmic axis.
    flops = [float(row["flops"]) for row in validated[1:]]
    losses = [float(row["validation_loss"]) for row in validated[1:]]
    way_label = "from scratch, on its way" if labelled else None
    end_label = f"from scratch: {run.loss:.4f}" if labelled else None
    axes.plot(flops, losses, "-", color=SCRATCH_COLOUR, linewidth=1, label=way_label)
    axes.plot([run.flops], [run.loss], "*", color="black", markersize=10, label=end_label)
    axes.axhline(run.loss, color=SCRATCH_COLOUR, linewidth=0.5, linestyle=":")
    return [*zip(flops, losses, strict=True), (run.flops, run.loss)]


def choose_losses(outcome: Outcome) -> tuple[float, float] | None:
    """The range of final losses with a margin, without the high ones at the beginning of training.

    None where no run is finished.
    """
    ends = [
        run.loss
        for name in (SCRATCH, *outcome.study.arms)
        for run in outcome.select_runs(name)
        if math.isfinite(run.loss)
    ]
    if not ends:
        return None
    low, high = min(ends), max(ends)
    margin = MARGIN * (high - low) or LEAST_MARGIN
    return low - margin, high + margin


def _limit_axes(axes: Any, points: Points, limits: tuple[float, float]) -> None:
    """Show the losses between the limits and the FLOPs that have such losses; set the ticks."""
    from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

    axes.set_ylim(*limits)
    shown = [flops for flops, loss in points if limits[0] <= loss <= limits[1]]
    low = min(shown) / FLOPS_MARGIN
    high = max(shown) * FLOPS_MARGIN
    axes.set_xlim(low, high)
    ticks = drop_close(choose_ticks(low, high), low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
