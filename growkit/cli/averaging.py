"""The verb that makes one model of several: average."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from growkit.cli.options import add_table_option
from growkit.cli.output import show_result
from growkit.cli.terminal import (
    add_care_options,
    add_shard_option,
    parse_care,
    write_with_progress,
)

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Source


@click.command()
@click.argument("src", nargs=-1, required=True)
@click.option(
    "--out",
    required=True,
    metavar="OUT",
    help="Where to write the average; of the last SRC's kind.",
)
@click.option(
    "--weights",
    metavar="W,W,...",
    help="One weight for each SRC, in order. Default: equal weights.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@add_table_option
@add_shard_option
@add_care_options
def average(
    src: tuple[str, ...],
    out: str,
    weights: str | None,
    force: bool,
    shard: str | None,
    **options: Any,
) -> None:
    """Average the parameters of the models SRC, as a run's last checkpoints: RUN@8000 RUN@9000.

    Optimizer moments, step and tokenizer are those of the last SRC. Sums are in float64.
    """
    from growkit.checkpoint.files import parse_path
    from growkit.checkpoint.location import open_source
    from growkit.entries import Average
    from growkit.lineage import Lineage
    from growkit.surgery.average import average_checkpoints

    sources = [open_source(each) for each in src]
    contents = average_checkpoints(sources, None if weights is None else _parse_weights(weights))
    last = sources[-1]
    care = parse_care(options)
    write_with_progress(sources, contents, parse_path(out), last.kind, force, shard, care)
    entry = Lineage.read(contents.lineage).last_as(Average)
    assert entry is not None, "an average says so in its lineage"
    shares = ", ".join(f"{share:.4g}" for share in entry.weights)
    brief = f"wrote {out}: the mean of {len(sources)} models, weights {shares}"
    moments = f"{src[-1]} has no optimizer's moments, and neither has {out}"
    if "mu" in last.tensors:
        moments = f"the optimizer's moments are those of {src[-1]}, unchanged"
    notes = _list_notes(sources)
    document = {
        "output": out,
        "sources": list(src),
        "weights": list(entry.weights),
        "moments": src[-1] if "mu" in last.tensors else None,
        "notes": notes,
    }
    lines = [*(f"note: {note}" for note in notes), brief, moments]
    show_result("\n".join(lines), document, brief)


def _list_notes(sources: list[Source]) -> list[str]:
    """The notes on all sources, each once; those on larger models are about growth."""
    grown = {source.around.note for source in sources if source.around is not None}
    every = dict.fromkeys(note for source in sources for note in source.notes)
    notes = [note for note in every if note not in grown]
    around = sources[-1].around
    if around is not None:
        count = len(around.others)
        notes.append(f"the {count} tensors around the text decoder are averaged too")
    return notes


def _parse_weights(text: str) -> list[float]:
    """The numbers in '1,1,2'. Raises UsageError."""
    from growkit.errors import UsageError

    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--weights takes numbers with commas between them, as 1,1,2; got {text!r}"
        ) from None


COMMANDS = {"average": average}
