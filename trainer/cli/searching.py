"""The verb that tries maps of layers on a text before anything is written: search."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from growkit.cli.options import COUNT, PATH
from growkit.cli.output import remark, show_result
from growkit.cli.signals import leave_on_signal

if TYPE_CHECKING:
    import numpy as np

    from growkit.checkpoint.tensor import Source
    from trainer.search.search import Found
    from trainer.search.views import Views

# Tokens of a window, unless told otherwise or the model reads fewer.
CONTEXT = 512


@click.command()
@click.argument("src")
@click.option("--layers", type=COUNT, required=True, metavar="N", help="Layers of the grown model.")
@click.option(
    "--tokens",
    "text",
    type=PATH,
    required=True,
    metavar="TEXT",
    help="The text that maps are scored on: a file of text, or token files as `growkit tokenize` "
    "makes them.",
)
@click.option(
    "--candidates",
    type=COUNT,
    default=32,
    show_default=True,
    metavar="N",
    help="Maps to try.",
)
@click.option(
    "--windows",
    type=COUNT,
    default=8,
    show_default=True,
    metavar="N",
    help="Windows of TEXT that each map is scored on, from its beginning.",
)
@click.option(
    "--context",
    type=COUNT,
    metavar="N",
    help=f"Tokens of a window.  [default: {CONTEXT}, or the model's context if that is less]",
)
@click.option("--batch", type=COUNT, default=4, show_default=True, metavar="N", help="Batch size.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Random seed.")
@click.option(
    "--no-verify", is_flag=True, help="Do not compare SRC with the hashes that were saved with it."
)
@leave_on_signal()
def search(
    src: str,
    layers: int,
    text: str,
    candidates: int,
    windows: int,
    context: int | None,
    batch: int,
    seed: int,
    no_verify: bool,
) -> None:
    """Find out which layers of SRC to repeat: score maps to N layers by their loss on TEXT.

    Nothing is copied or written: layers are computed with where they lie. Tried are replicate,
    nearest, stack, middle, overlap and top; then maps one step away from the best so far. The loss
    is that of the model which `growkit depth --map` would write, before any training. Also printed
    is the loss without each layer of SRC, which shows layers that hardly matter.
    """
    from growkit.checkpoint.location import open_source
    from growkit.models import require_trained
    from trainer.cli.search_report import build_document, show_found
    from trainer.search.search import check_target
    from trainer.search.views import Views

    _check_numbers({"candidates": candidates, "windows": windows, "batch": batch}, seed)
    source = open_source(src)
    require_trained(source.model, source.path)
    check_target(source, layers)
    cut = _cut_text(source, text, _choose_context(source, context), windows)
    views = Views(source, cut, batch)
    if not no_verify:
        source.require_whole()
    found = _search(source, views, layers, candidates, seed)
    show_result(
        lambda: show_found(source, text, cut, found),
        lambda: build_document(source, text, cut, found),
    )


def _check_numbers(counts: dict[str, int], seed: int) -> None:
    from growkit.errors import UsageError

    if seed < 0:
        raise UsageError(f"--seed must be at least 0, got {seed}")
    for option, value in counts.items():
        if value < 1:
            raise UsageError(f"--{option} must be at least 1, got {value}")


def _choose_context(source: Source, asked: int | None) -> int:
    """Tokens of a window. Raises UsageError for more than the model reads."""
    from growkit.errors import UsageError

    longest = source.model.context
    if asked is None:
        return min(CONTEXT, longest)
    if not 1 <= asked <= longest:
        raise UsageError(f"--context must lie between 1 and the model's {longest}, got {asked}")
    return asked


def _cut_text(source: Source, text: str, context: int, most: int) -> np.ndarray:
    """The windows of a text. Raises UsageError where it is too short for one."""
    from growkit.errors import UsageError
    from trainer.data.sample import Reader
    from trainer.search.views import cut_windows

    reader = Reader(source.files, str(source.path), source.model.vocab)
    sample = reader.read(text, most * context + 1)
    windows = cut_windows(sample, context, most)
    if not len(windows):
        tokens = len(sample.ids)
        shorter = f"; the largest --context that works is {tokens - 1}" if tokens > 1 else ""
        raise UsageError(
            f"{text} has {tokens} tokens, too few for one window of {context}{shorter}"
        )
    return windows


def _search(source: Source, views: Views, layers: int, candidates: int, seed: int) -> Found:
    """Search, and say on standard error what was scored."""
    from trainer.search.search import Scored, search_maps

    number = 0

    def tell(scored: Scored) -> None:
        nonlocal number
        number += 1
        words = f"{number} of {candidates}: {scored.loss:.4f}  {scored.text} ({scored.origin})"
        remark(words)

    return search_maps(source, views.score, layers, candidates, seed, tell)


COMMANDS = {"search": search}
