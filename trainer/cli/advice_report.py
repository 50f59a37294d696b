"""Advice as `growkit advise` shows it: tables with notes, or one JSON document."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from growkit.quantity import format_count
from trainer.cli.law_report import build_laws, show_laws, show_studies
from trainer.plan.cost import Devices
from trainer.study import advice as laws
from trainer.study.advice import CLAIMS, Growth, Size
from trainer.study.evidence import Arm, Measurement, Study
from trainer.study.verdict import describe_study, format_saving

WIDTH = 80  # columns of what is not shown on a terminal
SAVED_COLUMNS = ("saved", "source\nnot counted", "FLOPs\nhere")


@dataclass(frozen=True)
class Advice:
    """What is shown. recommended: whether the source is G_stack's. devices: None for no days.

    found: whether the studies were found and not named.
    """

    growth: Growth
    recommended: bool
    devices: Devices | None
    studies: list[Study]
    found: bool = False


@dataclass(frozen=True)
class Row:
    """A table's row: its cells, then its FLOPs, from which days and cost follow."""

    cells: tuple[str, ...]
    flops: float | None


@dataclass(frozen=True)
class Section:
    """A table. columns: the head of the cells and of the FLOPs."""

    title: str
    columns: tuple[str, ...]
    rows: list[Row]


def show_advice(advice: Advice) -> None:
    """Print the tables, and below them the notes."""
    console = Console(width=None if os.isatty(1) else WIDTH, markup=False, highlight=False)
    budget, *savings = _list_sections(advice)
    console.print(_build_table(budget, advice.devices))
    show_laws(console, advice.growth)
    show_studies(console, advice.studies, advice.found)
    for section in savings:
        console.print(_build_table(section, advice.devices))
    notes = Table.grid(padding=(0, 2))
    for label, words in _list_notes(advice):
        notes.add_row(label, words)
    console.print(notes)


def _list_sections(advice: Advice) -> Iterator[Section]:
    """The budget, the published savings, and each study's."""
    growth = advice.growth
    yield Section("At equal compute", ("", "tokens", "FLOPs"), _list_budgets(growth))
    yield Section(
        "To from-scratch's loss: published, not measured here",
        ("", *SAVED_COLUMNS),
        _list_claims(growth),
    )
    for study in advice.studies:
        yield Section(
            f"To from-scratch's loss: your study {study.path}, {_describe_study_sizes(study)}",
            ("", "re-\nwarm-up", *SAVED_COLUMNS),
            [_build_arm_row(growth, arm) for arm in study.arms],
        )


def _build_table(section: Section, devices: Devices | None) -> Table:
    columns = [*section.columns]
    if devices is not None:
        columns.append("days")
    if devices is not None and devices.price is not None:
        columns.append("cost")
    table = Table(title=section.title, title_justify="left")
    # The first column has the words, and the width that the numbers leave.
    table.add_column(columns[0], overflow="fold")
    for head in columns[1:]:
        table.add_column(head, no_wrap=True)
    for row in section.rows:
        flops = f"{row.flops:.3g}" if row.flops else "-"
        table.add_row(*row.cells, flops, *_format_time(devices, row.flops))
    return table


def _format_time(devices: Devices | None, flops: float | None) -> list[str]:
    """The cells for days and cost, as far as the table has them."""
    if devices is None:
        return []
    days = devices.estimate_days(flops)
    if days is not None:
        cells = [f"{days:.3g}"]
    elif flops and devices.peak is None:
        cells = ["unknown"]
    else:
        cells = ["-"]
    if devices.price is not None:
        cost = devices.estimate_cost(flops)
        cells.append("-" if cost is None else f"{cost:,.0f}")
    return cells


def _list_budgets(growth: Growth) -> list[Row]:
    """Tokens and FLOPs: from scratch, and at the same compute with growth by the timing law."""
    scratch = f"from scratch: {_describe_size(growth.target)}"
    rows = [Row((scratch, format_count(growth.tokens)), growth.flops)]
    if growth.affordable:
        source = f"source: {_describe_size(growth.source)}"
        grown = f"then grown to {growth.target.name}"
        rows.append(Row((source, format_count(growth.source_tokens)), growth.source_flops))
        rows.append(Row((grown, format_count(growth.target_tokens)), growth.target_flops))
    return rows


def _describe_size(size: Size) -> str:
    if size.is_count:
        return size.name
    return f"{size.name} ({format_count(size.parameters)})"


def _list_claims(growth: Growth) -> list[Row]:
    rows = []
    for claim in CLAIMS:
        saved = f"{claim.saved:.0%}"
        counted = (saved, "-") if claim.counts_source else ("-", saved)
        flops = growth.compute_flops_of_claim(claim)
        rows.append(Row((f"{claim.work}: {claim.where}", *counted), flops))
    return rows


def _describe_study_sizes(study: Study) -> str:
    return (
        f"{format_count(study.source)} to {format_count(study.target)} parameters, "
        f"{format_count(study.source_tokens)} tokens for the source, "
        f"{format_count(study.tokens)} from scratch"
    )


def _build_arm_row(growth: Growth, arm: Arm) -> Row:
    words = arm.operator.replace("depth_method ", "")
    if arm.saved.mean is not None and not arm.reached:
        words += "; not every run reached the loss"
    cells = (
        f"{arm.name}\n{words}",
        "-" if arm.rewarmup is None else str(arm.rewarmup),
        _format_saving(arm.saved, arm.at_least),
        _format_saving(arm.saved_without_source, arm.at_least),
    )
    return Row(cells, growth.compute_flops_of_arm(arm))


def _format_saving(saving: Measurement, at_least: bool) -> str:
    """A saving with its spread and the number of runs, or why there is none."""
    runs = saving.runs
    if saving.mean is None:
        if runs == 0:
            return "no run yet"
        return "loss not\nreached" if runs == 1 else "loss not\nreached by\nevery run"
    least = "at least " if at_least else ""
    # Two short lines, so that a table has room for its names.
    return f"{least}{format_saving(saving)}".replace(" (", "\n(")


def _list_notes(advice: Advice) -> Iterator[tuple[str, str]]:
    """(label, words): the law with its formula and range, the size, re-warm-up, and assumptions."""
    growth = advice.growth
    yield "when", _describe_timing(growth)
    yield "law", _describe_law(growth)
    yield "range", _describe_range(growth)
    yield "size", _describe_factor(growth, advice.recommended)
    yield "re-warm-up", laws.REWARM
    yield (
        "saved",
        "share of from-scratch's FLOPs saved at its last loss, the source's FLOPs counted or not; "
        "a speedup s saves 1 - 1 / (1 + s)",
    )
    counting = [
        f"of {size.name} {_describe_flops(size)}" for size in (growth.target, growth.source)
    ]
    yield "FLOPs", "; ".join(counting)
    if advice.devices is not None:
        yield "days", _describe_days(advice.devices)


def _describe_timing(growth: Growth) -> str:
    share = growth.source_flops / growth.flops
    of_budget = f"{share:.1%} of" if share < 1 else f"{share:.3g} times"
    asked = f"{format_count(growth.source_tokens)} tokens, {of_budget} the budget"
    if growth.affordable:
        return f"grow when {growth.source.name} has seen {asked}"
    return (
        f"no advice: the law asks the source for {asked}; above {laws.AFFORDABLE_SHARE:.0%} "
        "(growkit's limit) too little is left for growth to save anything; use a smaller source, a "
        "larger budget, or a study of your own"
    )


def _describe_law(growth: Growth) -> str:
    formula = (
        f"log10 d = {laws.PARAMETERS:g} log10 N + {laws.COMPUTE:g} / log10 C - {-laws.CONSTANT:g}"
    )
    bare = " (all of them for a bare count)" if growth.target.is_count else ""
    return (
        f"{laws.GSTACK}, equation 2: {formula}. d: tokens of the source; "
        f"N = {growth.target.without_embeddings:.3g}, the target's parameters without "
        f"embeddings{bare}; C = {growth.flops:.3g}, FLOPs of source and target together"
    )


def _describe_range(growth: Growth) -> str:
    deviations = growth.list_deviations()
    if deviations:
        return f"EXTRAPOLATION beyond what the law was fitted to: {'; '.join(deviations)}"
    smallest, largest = format_count(min(laws.FITTED)), format_count(max(laws.FITTED))
    return (
        f"within what the law was fitted to: targets of {smallest} to {largest}, growth by "
        f"{laws.FACTOR} in depth, and budgets like this one at this size"
    )


def _describe_factor(growth: Growth, recommended: bool) -> str:
    own = f"{growth.source.name} is 1/{growth.factor:.3g} of {growth.target.name}"
    if not growth.has_count:
        own += ", without embeddings"
    if recommended:
        own += ", by default"
    least, most = laws.BEST_FACTORS
    return (
        f"{own}; G_stack (section 4.2) recommends {laws.FACTOR}, in depth (depth --method stack); "
        f"the best factor lay between {least} and {most}"
    )


def _describe_flops(size: Size) -> str:
    return "6 x parameters a token" if size.is_count else "by its sizes (PaLM, appendix B)"


def _describe_days(devices: Devices) -> str:
    if devices.peak is None:
        return f"unknown: the peak FLOP/s of {devices.name} is not known"
    peak = f"{devices.peak / 1e12:,.0f} TFLOP/s of {devices.name}"
    return f"FLOPs / ({devices.mfu:.0%} MFU, assumed, x {peak}); growkit plan says what fits"


def build_document(advice: Advice) -> dict[str, Any]:
    """The advice as JSON: counts, FLOPs, days; null where nothing can be said."""
    growth = advice.growth
    devices = advice.devices
    source = {"recommended": advice.recommended, "factor": growth.factor}
    return {
        "target": asdict(growth.target),
        "source": asdict(growth.source) | source,
        "scratch": {"tokens": growth.tokens, **_build_cost(devices, growth.flops)},
        "law": _build_law(growth, devices),
        **build_laws(growth),
        "published": [
            asdict(claim)
            | {"if_so_here": _build_cost(devices, growth.compute_flops_of_claim(claim))}
            for claim in CLAIMS
        ],
        "studies": [_build_study(study, growth, devices) for study in advice.studies],
        "studies_found": advice.found,
        "rewarmup": laws.REWARM,
        "topology": None if devices is None else asdict(devices),
    }


def _build_cost(devices: Devices | None, flops: float | None) -> dict[str, float | None]:
    return {
        "flops": flops,
        "days": None if devices is None else devices.estimate_days(flops),
        "cost": None if devices is None else devices.estimate_cost(flops),
    }


def _build_law(growth: Growth, devices: Devices | None) -> dict[str, Any]:
    affordable = growth.affordable
    grown_tokens = growth.target_tokens if affordable else None
    grown_flops = growth.target_flops if affordable else None
    return {
        "name": laws.GSTACK,
        "constants": {"a": laws.PARAMETERS, "b": laws.COMPUTE, "c": laws.CONSTANT},
        "outside": growth.list_deviations(),
        "affordable": affordable,
        "source": {"tokens": growth.source_tokens, **_build_cost(devices, growth.source_flops)},
        "grown": {"tokens": grown_tokens, **_build_cost(devices, grown_flops)},
    }


def _build_study(study: Study, growth: Growth, devices: Devices | None) -> dict[str, Any]:
    arms = [
        asdict(arm) | {"if_so_here": _build_cost(devices, growth.compute_flops_of_arm(arm))}
        for arm in study.arms
    ]
    return asdict(study) | {"arms": arms, "says": list(describe_study(study))}
