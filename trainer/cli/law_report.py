"""The four laws, where they disagree, and what studies say, as `growkit advise` shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from trainer.study.advice import Growth
from trainer.study.evidence import Study
from trainer.study.laws import Finding, find_agreements, find_disagreements, list_findings
from trainer.study.verdict import describe_study


def show_laws(console: Console, growth: Growth) -> None:
    """A table of the laws with their ranges, then where they disagree."""
    table = Table(title="What four laws say: published, not measured here", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("here", ratio=3)
    table.add_column("measured on", ratio=2)
    for finding in list_findings(growth):
        head = f"{finding.name}\n{finding.work.replace(' (', chr(10) + '(')}"
        table.add_row(head, finding.says, _describe_range(finding))
        table.add_section()
    console.print(table)
    _show_list(console, "Where they disagree", find_disagreements(growth))
    _show_list(console, "Where they agree", find_agreements(growth))


def _describe_range(finding: Finding) -> str:
    """What a law was measured on, and where this question lies outside of that."""
    if not finding.outside:
        return finding.measured
    return f"{finding.measured}\nOUTSIDE: {'; '.join(finding.outside)}"


def show_studies(console: Console, studies: Sequence[Study], found: bool) -> None:
    """What studies say, one list each. found: whether they were found and not named."""
    for study in studies:
        where = f"{study.path}, found here" if found else study.path
        _show_list(console, f"What your study says: {where}", describe_study(study))
    if not studies:
        console.print("Your studies: none here; --study DIR names one, `growkit study` makes one")


def _show_list(console: Console, title: str, sentences: Iterable[str]) -> None:
    """A title and its sentences; nothing without any."""
    listed = list(sentences)
    if listed:
        console.print(title, style="italic")
    for sentence in listed:
        grid = Table.grid(padding=(0, 1))
        grid.add_row("*", sentence)
        console.print(Padding(grid, (0, 0, 0, 2)))


def build_laws(growth: Growth) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "laws": [asdict(finding) for finding in list_findings(growth)],
        "disagreements": list(find_disagreements(growth)),
        "agreements": list(find_agreements(growth)),
    }
