"""What a search found, as `growkit search` shows it: tables, or one JSON document."""

from __future__ import annotations

from typing import Any

import numpy as np

from growkit.checkpoint.tensor import Source
from growkit.cli.terminal import say
from trainer.search.search import Found, Scored
from trainer.search.views import DTYPE

# Maps that are shown; the document has all.
SHOWN = 10
# Layers in a row of the second table.
WIDTH = 10


def show_found(source: Source, text: str, windows_WxT1: np.ndarray, found: Found) -> None:
    """Print what a search found, for a reader at a terminal."""
    lines = [
        f"source      {source.path}, {source.model.layer} layers",
        f"text        {_describe_text(text, windows_WxT1)}",
        f"own loss    {found.own:.6f} nats a token, computed in {DTYPE}",
        "",
        *_list_maps(found),
    ]
    lines += [f"left out    {name}: {reason}" for name, reason in found.left_out.items()]
    if found.without:
        lines += ["", *_list_layers(found)]
    lines += ["", f"next        growkit depth --map {found.best.text} {source.path} OUT"]
    say("\n".join(lines))


def _describe_text(text: str, windows_WxT1: np.ndarray) -> str:
    count, time = windows_WxT1[:, 1:].shape
    windows = "1 window" if count == 1 else f"{count:,} windows"
    return f"{text}, its first {count * time:,} tokens, in {windows} of {time:,}"


def _list_maps(found: Found) -> list[str]:
    """The best maps, each with its loss and how far that is above the source's."""
    lines = [f"{'loss':>10} {'more':>10}  --map"]
    for scored in found.ranked[:SHOWN]:
        more = scored.loss - found.own
        lines.append(f"{scored.loss:10.6f} {more:+10.6f}  {scored.text}  ({scored.origin})")
    hidden = len(found.scored) - SHOWN
    if hidden > 0:
        lines.append(f"{'':>22} and {hidden} more, which --json lists")
    return lines


def _list_layers(found: Found) -> list[str]:
    """How much the loss rises without each layer, and the layers that matter least."""
    rises = [loss - found.own for loss in found.without]
    lines = ["without one layer the loss changes by"]
    for first in range(0, len(rises), WIDTH):
        some = range(first, min(first + WIDTH, len(rises)))
        lines.append("layer " + " ".join(f"{layer:8}" for layer in some))
        lines.append("more  " + " ".join(f"{rises[layer]:+8.4f}" for layer in some))
    order = sorted(range(len(rises)), key=lambda layer: rises[layer])
    least = ", ".join(str(layer) for layer in order[:3])
    lines.append(f"the least   {least}")
    return lines


def build_document(
    source: Source, text: str, windows_WxT1: np.ndarray, found: Found
) -> dict[str, Any]:
    """Everything that a search found, in JSON's types. Maps are in order of their loss."""
    count, time = windows_WxT1[:, 1:].shape
    return {
        "source": str(source.path),
        "layers": {"before": source.model.layer, "after": len(found.best.index)},
        "text": {"name": text, "windows": count, "context": time, "tokens": count * time},
        "dtype": DTYPE,
        "loss": found.own,
        "maps": [_build_map(scored) for scored in found.ranked],
        "left_out": found.left_out,
        "loss_without": found.without,
    }


def _build_map(scored: Scored) -> dict[str, Any]:
    return {
        "map": scored.text,
        "index": list(scored.index),
        "origin": scored.origin,
        "loss": scored.loss,
    }
