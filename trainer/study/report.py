"""The files of a study: results.json, runs.csv and report.md; and its tables on the terminal.

Everything is made from an `Outcome`, so it can be written while the study is still running. The
picture is `trainer.study.picture`'s.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from etils import epath

from growkit.checkpoint.files import encode_json
from trainer.devices.hosts import write_once
from trainer.study.design import HEADLINE_SHARE, SCRATCH
from trainer.study.evidence import RESULTS
from trainer.study.outcome import FinishedRun, Outcome, find_headline_arm
from trainer.study.picture import PICTURE, draw_study

ARMS_HEAD = (
    "arm",
    "source, its share of FLOPs",
    "grown at",
    "learning rates",
    "loss",
    "better by",
    "saved",
    "saved, source not counted",
)
PAIRS_HEAD = ("arm", "against", "difference in loss", "")
# Two arms are called different when their mean difference exceeds DEVIATIONS standard deviations,
# over at least SEEDS seeds.
DEVIATIONS = 2
SEEDS = 3
PAIRS_NOTE = (
    "Difference: an arm's loss minus the other's at the largest budget, seed by seed; better or "
    f"worse where its mean is beyond {DEVIATIONS} standard deviations, over {SEEDS} seeds or more."
)
WIDTH = 160  # columns of a table that is not shown on a terminal

Cells = list[str]


def write_report(outcome: Outcome, out: Path, picture: bool = True) -> None:
    """Write the files of a study into `out`, each whole or not at all."""
    results = outcome.summarize()
    write_once(epath.Path(out / "runs.csv"), render_runs(outcome.runs).encode())
    write_once(epath.Path(out / "report.md"), render_markdown(outcome, results).encode())
    if picture:
        draw_study(outcome, out)
    write_once(epath.Path(out / RESULTS), encode_json(results))


def render_runs(runs: list[FinishedRun]) -> str:
    """A CSV text with a row a run."""
    out = io.StringIO()
    columns = [field.name for field in fields(FinishedRun)]
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(run) for run in runs)
    return out.getvalue()


def build_rows(outcome: Outcome, results: dict[str, Any]) -> Iterator[Cells]:
    """The table of arms, scratch first; arms without a finished run are left out."""
    loss = _format_figure(results["scratch"]["loss"])
    yield [SCRATCH, "", "", _format_ways(outcome), loss, "", "", ""]
    for arm in results["arms"]:
        if arm["loss"]["runs"]:
            yield _build_arm_row(outcome, arm)


def _build_arm_row(outcome: Outcome, arm: dict[str, Any]) -> Cells:
    mark = "" if arm["within_share"] or arm["control"] else " *"
    more = "at least " if arm["at_least"] else ""
    return [
        arm["name"],
        f"{', '.join(arm['sources'])}, {arm['share']:.0%}{mark}",
        _format_range(arm["grown_at"]),
        _format_rates(outcome, arm["name"]),
        _format_figure(arm["loss"]),
        _format_figure(arm["ahead"], sign="+"),
        _format_percent(arm["saved"], more),
        _format_percent(arm["saved_without_source"], more),
    ]


def build_pairs(results: dict[str, Any]) -> Iterator[Cells]:
    """The table of arms that differ from another one in one thing."""
    for arm in results["arms"]:
        difference = arm["difference"]
        if difference and difference["mean"] is not None:
            figure = _format_figure(difference, sign="+")
            yield [arm["name"], arm["against"], figure, _judge_difference(difference)]


def _judge_difference(difference: dict[str, Any]) -> str:
    """Whether a difference in loss is more than chance, in words. A lower loss is better."""
    if difference["runs"] < SEEDS:
        return "too few seeds"
    if abs(difference["mean"]) <= DEVIATIONS * difference["std"]:
        return "within the spread"
    return "better" if difference["mean"] < 0 else "worse"


def describe_study(outcome: Outcome, results: dict[str, Any]) -> list[str]:
    """What must be known to read the table, a paragraph each; the best arm last."""
    study = outcome.study
    target = results["target"]
    budgets = ", ".join(f"{budget:g}" for budget in study.budgets)
    lines = [
        f"Target: {target['layer']} layers, embed {target['embed']}, {target['parameters']:,} "
        f"parameters; from scratch {results['tokens']['scratch']:,} tokens, "
        f"{results['scratch']['flops']:.3g} FLOPs.",
        f"Arms end at {budgets} of those FLOPs, sources included; each run has its own schedule. "
        f"Loss: nats a token on held-out text at {study.budgets[-1]:g}. Better by: the loss from "
        "scratch minus that, seed by seed. Saved: the share of the from-scratch FLOPs saved at the "
        "from-scratch loss; between runs the loss is linear in the logarithm of FLOPs.",
        "Mean ± one standard deviation over seeds (how many, in brackets); a best learning rate is "
        "in bold. Grown at: the part of all steps, sources included, after which the last growth "
        "came, over the budgets.",
    ]
    if any(not arm["within_share"] and not arm["control"] for arm in results["arms"]):
        lines.append(
            f"* The sources take more than {HEADLINE_SHARE:.0%} of the from-scratch FLOPs: not in "
            "the headline."
        )
    return [*lines, describe_best_arm(results)]


def describe_best_arm(results: dict[str, Any]) -> str:
    """The headline: the best arm's saving, in a sentence."""
    best = find_headline_arm(results["arms"])
    if best is None:
        return "No arm reached the from-scratch loss within its budgets."
    more = "at least " if best["at_least"] else ""
    return (
        f"The best of {len(results['arms'])} arms, {best['name']}, saves "
        f"{_format_percent(best['saved'], more)} of the from-scratch FLOPs with its source's FLOPs "
        f"counted, and {_format_percent(best['saved_without_source'], more)} without them; "
        "the seed that it was chosen by is included."
    )


def render_markdown(outcome: Outcome, results: dict[str, Any]) -> str:
    """The tables and their notes in Markdown."""
    parts = [_render_table(ARMS_HEAD, list(build_rows(outcome, results)))]
    pairs = list(build_pairs(results))
    if pairs:
        parts += [_render_table(PAIRS_HEAD, pairs), PAIRS_NOTE]
    parts += describe_study(outcome, results)
    parts.append(f"![loss over compute]({PICTURE})")
    return "\n\n".join(parts) + "\n"


def _render_table(head: Sequence[str], rows: list[Cells]) -> str:
    """A Markdown table: its first column to the left, all others to the right."""
    alignment = ["---"] + ["---:"] * (len(head) - 1)
    lines = [head, alignment, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_report(outcome: Outcome) -> None:
    """Print the tables and their notes to standard output."""
    from rich.console import Console
    from rich.table import Table

    results = outcome.summarize()
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    tables = {
        ARMS_HEAD: list(build_rows(outcome, results)),
        PAIRS_HEAD: list(build_pairs(results)),
    }
    for head, rows in tables.items():
        table = Table(*head, show_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*(cell.replace("**", "") for cell in row))
        if rows:
            console.print(table)
    for line in describe_study(outcome, results):
        console.print(line, highlight=False, soft_wrap=True)


def _format_ways(outcome: Outcome) -> str:
    """The learning rates tried from scratch, way by way, the best of all in bold."""
    best = outcome.select_runs(SCRATCH)[0]
    rates = outcome.study.learning_rates
    shown = []
    for way in outcome.study.ways:
        name = f"{way} " if way else ""
        shown.append(name + _mark_best(rates, best.learning_rate if way == best.way else None))
    return "; ".join(shown)


def _format_rates(outcome: Outcome, name: str) -> str:
    """The learning rates that an arm tried, the best in bold."""
    if outcome.study.takes_rate_of_source(name):
        return f"{outcome.find_best_rate(name):g}, its source's"
    return _mark_best(outcome.study.list_rates(name), outcome.find_best_rate(name))


def _mark_best(rates: Sequence[float], best: float | None) -> str:
    """Learning rates, the best in bold."""
    shown = []
    for rate in rates:
        shown.append(f"**{rate:g}**" if rate == best else f"{rate:g}")
    return ", ".join(shown)


def _format_range(parts: Sequence[float]) -> str:
    """From the least to the greatest of some parts of the steps; a control has none."""
    if not parts:
        return "not grown"
    return f"{min(parts):.2f} to {max(parts):.2f}"


def _format_figure(spread: dict[str, Any], sign: str = "") -> str:
    """MEAN ± DEVIATION (RUNS) of a loss; sign: "+" to show it."""
    if spread["mean"] is None:
        return "-"
    deviation = "" if spread["std"] is None else f" ± {spread['std']:.4f}"
    return f"{spread['mean']:{sign}.4f}{deviation} ({spread['runs']})"


def _format_percent(spread: dict[str, Any], more: str) -> str:
    """MEAN ± DEVIATION % (RUNS) of a share, after `more`."""
    if spread["mean"] is None:
        return "not reached"
    deviation = "" if spread["std"] is None else f" ± {100 * spread['std']:.1f}"
    return f"{more}{100 * spread['mean']:.1f}{deviation} % ({spread['runs']})"
