"""A study as it is shown and kept: results.json, runs.csv, report.md, study.png and a table on the terminal.

Everything is made from what `outcome` says, so that it can be written while the study is still going. Knows words and
pictures; leaves the arithmetic to `outcome`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from etils import epath

from growkit.checkpoint.files import encode_json
from trainer.devices.hosts import write_once
from trainer.log.history import METRICS, parse_rows
from trainer.study.design import LARGEST_SHARE, SCRATCH
from trainer.study.evidence import RESULTS
from trainer.study.outcome import FinishedRun, Outcome

# Matplotlib's, without the grey that is scratch's.
COLOURS = tuple(f"C{number}" for number in (0, 1, 2, 3, 4, 5, 6, 8, 9))
PAIRS = ("arm", "against", "difference in loss", "")
# Differences are told apart from chance by so many standard deviations, over at least so many seeds.
DEVIATIONS, SEEDS = 2, 3
PAIRED = (
    "Difference: an arm's loss minus the other's at the largest budget, seed by seed; better or worse where its mean "
    f"is beyond {DEVIATIONS} standard deviations, over {SEEDS} seeds or more."
)
HEAD = (
    "arm",
    "source, its part of FLOPs",
    "learning rates",
    "loss",
    "better by",
    "saved",
    "saved, source not counted",
)


def write_report(outcome: Outcome, out: Path, picture: bool = True) -> None:
    """Write all files of a study into `out`, each whole or not at all."""
    results = outcome.summarize()
    write_once(epath.Path(out / "runs.csv"), render_runs(outcome.runs).encode())
    write_once(epath.Path(out / "report.md"), render_markdown(outcome, results).encode())
    if picture:
        draw_study(outcome, out)
    write_once(epath.Path(out / RESULTS), encode_json(results))


def render_runs(runs: list[FinishedRun]) -> str:
    """A row a run."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(FinishedRun)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(run) for run in runs)
    return out.getvalue()


def build_rows(outcome: Outcome, results: dict[str, Any]) -> Iterator[list[str]]:
    """The table's cells, scratch first."""
    scratch = results["scratch"]
    yield [SCRATCH, "", _tries(outcome, SCRATCH), _figure(scratch["loss"], 4), "", "", ""]
    for arm in results["arms"]:
        if not arm["loss"]["runs"]:
            continue
        source = (
            ", ".join(arm["sources"])
            + f", {arm['share']:.0%}"
            + ("" if arm["within_share"] else " *")
        )
        more = "at least " if arm["at_least"] else ""
        saved = [_percent(arm[key], more) for key in ("saved", "saved_without_source")]
        loss, ahead = _figure(arm["loss"], 4), _figure(arm["ahead"], 4, sign="+")
        yield [arm["name"], source, _tries(outcome, arm["name"]), loss, ahead, *saved]


def build_pairs(results: dict[str, Any]) -> Iterator[list[str]]:
    """The cells of the table of arms that differ from another in one thing."""
    for arm in results["arms"]:
        difference = arm["difference"]
        if not difference or difference["mean"] is None:
            continue
        if difference["runs"] < SEEDS:
            words = "too few seeds"
        elif abs(difference["mean"]) > DEVIATIONS * difference["std"]:
            words = "better" if difference["mean"] < 0 else "worse"
        else:
            words = "within the spread"
        yield [arm["name"], arm["against"], _figure(difference, 4, sign="+"), words]


def describe_study(outcome: Outcome, results: dict[str, Any]) -> list[str]:
    """What must be known to read the table, a sentence each."""
    study, target = outcome.study, results["target"]
    largest = study.budgets[-1]
    budgets = ", ".join(f"{budget:g}" for budget in study.budgets)
    lines = [
        f"Target: {target['layer']} layers, embed {target['embed']}, {target['parameters']:,} parameters; from scratch "
        f"{results['tokens']['scratch']:,} tokens, {results['scratch']['flops']:.3g} FLOPs.",
        f"Arms end at {budgets} of those FLOPs, sources included, each run with a schedule of its own. Loss: nats a "
        f"token on held-out text at {largest:g}. Better by: loss from scratch minus that, seed by seed. "
        "Saved: of the from-scratch FLOPs, to its final loss, between runs linear in the logarithm of FLOPs.",
        "Mean ± one standard deviation over seeds (in brackets how many); a best learning rate is in bold.",
    ]
    if any(not arm["within_share"] for arm in results["arms"]):
        lines.append(
            f"* The source takes more than {LARGEST_SHARE:.0%} of the from-scratch FLOPs: not in the headline."
        )
    return [*lines, describe_best_arm(results)]


def describe_best_arm(results: dict[str, Any]) -> str:
    """The best arm's saving, in a sentence."""
    arms = [
        arm for arm in results["arms"] if arm["within_share"] and arm["saved"]["mean"] is not None
    ]
    if not arms:
        return "No arm reached the from-scratch loss within its budgets."
    # Of those with most seeds, in percent, as in the choice of arms; ties by the loss at the end.
    best = max(
        arms,
        key=lambda arm: (
            arm["saved"]["runs"],
            round(100 * arm["saved"]["mean"]),
            -arm["loss"]["mean"],
        ),
    )
    more = "at least " if best["at_least"] else ""
    return (
        f"The best of {len(results['arms'])} arms, {best['name']}, saves {_percent(best['saved'], more)} of the "
        f"from-scratch FLOPs, its source's included, and {_percent(best['saved_without_source'], more)} without them; "
        "the seed that it was chosen by counts in these."
    )


def render_markdown(outcome: Outcome, results: dict[str, Any]) -> str:
    """The table and its notes in Markdown."""
    tables = [_table(HEAD, list(build_rows(outcome, results)))]
    if found := list(build_pairs(results)):
        tables += [_table(PAIRS, found), PAIRED]
    return (
        "\n\n".join([*tables, *describe_study(outcome, results), "![loss over compute](study.png)"]) + "\n"
    )


def _table(head: Sequence[str], cells: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_report(outcome: Outcome) -> None:
    """Print the table to standard output."""
    import sys

    from rich.console import Console
    from rich.table import Table

    results = outcome.summarize()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for head, cells in ((HEAD, list(build_rows(outcome, results))), (PAIRS, list(build_pairs(results)))):
        table = Table(*head, show_edge=False, header_style="bold")
        for row in cells:
            table.add_row(*(cell.replace("**", "") for cell in row))
        if cells:
            console.print(table)
    for line in describe_study(outcome, results):
        console.print(line, highlight=False, soft_wrap=True)


def _tries(outcome: Outcome, name: str) -> str:
    """The learning rates tried, the best in bold."""
    best = outcome.find_best_rate(name)
    return ", ".join(
        f"**{rate:g}**" if rate == best else f"{rate:g}" for rate in outcome.study.list_rates(name)
    )


def _figure(
    spread: dict[str, Any], places: int, sign: str = "", scale: float = 1, unit: str = ""
) -> str:
    if spread["mean"] is None:
        return "-"
    text = f"{spread['mean'] * scale:{sign}.{places}f}"
    if spread["std"] is not None:
        text += f" ± {spread['std'] * scale:.{places}f}"
    return f"{text}{unit} ({spread['runs']})"


def _percent(spread: dict[str, Any], more: str) -> str:
    if spread["mean"] is None:
        return "not reached"
    return more + _figure(spread, 1, scale=100, unit=" %")


def draw_study(outcome: Outcome, out: Path) -> None:
    """The losses over compute, sources' FLOPs included on the left and not on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True, constrained_layout=True)
    for axes, included in zip(panels, (True, False), strict=True):
        _draw_scratch(axes, outcome, out)
        for number, name in enumerate(outcome.study.arms):
            for seed in outcome.find_complete_seeds(name):
                line = outcome.select_runs(name, seed)
                flops = [run.spent if included else run.flops for run in line]
                label = name if seed == outcome.study.seeds[0] else None
                axes.plot(
                    flops,
                    [run.loss for run in line],
                    "o-",
                    color=COLOURS[number % 9],
                    markersize=4,
                    label=label,
                )
        counted = "the source's included" if included else "the source's not counted"
        axes.set(
            xlabel=f"training FLOPs, {counted}", xscale="log", title="loss at the end of each run"
        )
        axes.grid(True, which="both", alpha=0.25)
    panels[0].set_ylabel("validation loss, nats a token")
    _zoom(panels[0], outcome)
    panels[1].legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    write_once(epath.Path(out / "study.png"), picture.getvalue())


def _draw_scratch(axes, outcome: Outcome, out: Path) -> None:
    """The run from scratch at its best learning rate: its course as a line, its end as a star and a level."""
    for run in outcome.select_runs(SCRATCH):
        course = [
            row
            for row in parse_rows((out / "runs" / run.run / METRICS).read_text())
            if row["validation_loss"]
        ]
        flops, losses = (
            [float(row["flops"]) for row in course],
            [float(row["validation_loss"]) for row in course],
        )
        first = run.seed == outcome.study.seeds[0]
        axes.plot(
            flops[1:],
            losses[1:],
            "-",
            color="#888888",
            linewidth=1,
            label="from scratch, on its way" if first else None,
        )
        axes.plot(
            [run.flops],
            [run.loss],
            "*",
            color="black",
            markersize=10,
            label="from scratch" if first else None,
        )
        axes.axhline(run.loss, color="#888888", linewidth=0.5, linestyle=":")


def _zoom(axes, outcome: Outcome) -> None:
    """Show the losses of ends, and not the course's beginning."""
    ends = [
        run.loss
        for name in (SCRATCH, *outcome.study.arms)
        for run in outcome.select_runs(name)
        if math.isfinite(run.loss)
    ]
    if not ends:
        return
    low, high = min(ends), max(ends)
    room = 0.15 * (high - low) or 0.1
    axes.set_ylim(low - room, high + room)
