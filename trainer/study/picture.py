"""The picture of a study: losses over compute, with the sources' FLOPs counted and without."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from etils import epath

from trainer.devices.hosts import write_once
from trainer.log.history import METRICS, read_rows
from trainer.study.design import SCRATCH
from trainer.study.outcome import FinishedRun, Outcome

PICTURE = "study.png"
SCRATCH_COLOUR = "#888888"
# Matplotlib's colours without its grey, which is the colour of scratch.
COLOURS = tuple(f"C{number}" for number in (0, 1, 2, 3, 4, 5, 6, 8, 9))
MARGIN = 0.15  # of the range of losses, above and below them
LEAST_MARGIN = 0.1  # nats a token, where all losses are equal


def draw_study(outcome: Outcome, out: Path) -> None:
    """Write OUT/study.png: the sources' FLOPs are counted on the left and not on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True, constrained_layout=True)
    for axes, sources in zip(panels, (True, False), strict=True):
        _draw_panel(axes, outcome, out, sources)
    panels[0].set_ylabel("validation loss, nats a token")
    _limit_losses(panels[0], outcome)
    panels[1].legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    write_once(epath.Path(out / PICTURE), picture.getvalue())


def _draw_panel(axes: Any, outcome: Outcome, out: Path, sources: bool) -> None:
    """Scratch and all arms. sources: whether the sources' FLOPs count."""
    for run in outcome.select_runs(SCRATCH):
        _draw_scratch(axes, run, out, labelled=run.seed == outcome.study.seeds[0])
    for number, name in enumerate(outcome.study.arms):
        colour = COLOURS[number % len(COLOURS)]
        for seed in outcome.find_complete_seeds(name):
            runs = outcome.select_runs(name, seed)
            flops = [run.spent if sources else run.flops for run in runs]
            losses = [run.loss for run in runs]
            label = name if seed == outcome.study.seeds[0] else None
            axes.plot(flops, losses, "o-", color=colour, markersize=4, label=label)
    counted = "the sources' included" if sources else "the sources' not counted"
    axes.set(xlabel=f"training FLOPs, {counted}", xscale="log", title="loss at the end of each run")
    axes.grid(True, which="both", alpha=0.25)


def _draw_scratch(axes: Any, run: FinishedRun, out: Path, labelled: bool) -> None:
    """A run from scratch: its losses on the way as a line, its end as a star on a dotted level."""
    rows = read_rows(epath.Path(out) / "runs" / run.run / METRICS)
    validated = [row for row in rows if row["validation_loss"]]
    # The loss before the first step, at 0 FLOPs, has no place on a logarithmic axis.
    flops = [float(row["flops"]) for row in validated[1:]]
    losses = [float(row["validation_loss"]) for row in validated[1:]]
    way_label = "from scratch, on its way" if labelled else None
    end_label = "from scratch" if labelled else None
    axes.plot(flops, losses, "-", color=SCRATCH_COLOUR, linewidth=1, label=way_label)
    axes.plot([run.flops], [run.loss], "*", color="black", markersize=10, label=end_label)
    axes.axhline(run.loss, color=SCRATCH_COLOUR, linewidth=0.5, linestyle=":")


def _limit_losses(axes: Any, outcome: Outcome) -> None:
    """Show the range of final losses, and not the high ones at the beginning of training."""
    ends = [
        run.loss
        for name in (SCRATCH, *outcome.study.arms)
        for run in outcome.select_runs(name)
        if math.isfinite(run.loss)
    ]
    if not ends:
        return
    low, high = min(ends), max(ends)
    margin = MARGIN * (high - low) or LEAST_MARGIN
    axes.set_ylim(low - margin, high + margin)
