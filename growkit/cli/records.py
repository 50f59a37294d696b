"""The record of a checkpoint in words: how far it was trained, and with what result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from growkit.quantity import format_count

# Entries that `_list_words` puts into words, or that say nothing to a reader.
KNOWN = (
    "step",
    "count",
    "schedule_step",
    "tokens",
    "flops",
    "validation_loss",
    "validation_windows",
    "reduction",
    "stream",
)
HIGHEST_LOSS = 30.0  # nats a token; a perplexity of exp(30) is shown for anything above


def describe_record(record: Mapping[str, Any]) -> str:
    """'step 1,000, 64M tokens, 3.4e+12 FLOPs, validation loss 3.3840 (perplexity 29.49)'."""
    others = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in record.items()
        if key not in KNOWN and isinstance(value, int | float | str)
    ]
    return ", ".join([*_list_words(record), *others]) or "no record"


def _list_words(record: Mapping[str, Any]) -> Iterator[str]:
    """What is known of a training, a clause each. A record is data from strangers."""
    numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
    step = numbers.get("step")
    if step is not None:
        yield f"step {step:,}"
    if numbers.get("schedule_step", step) != step:
        yield f"the learning rate's schedule at step {numbers['schedule_step']:,}"
    if numbers.get("count", step) != step:
        yield f"Adam's count {numbers['count']:,}"
    if numbers.get("tokens"):
        yield f"{format_count(numbers['tokens'])} tokens"
    if numbers.get("flops"):
        yield f"{numbers['flops']:.3g} FLOPs"
    loss = numbers.get("validation_loss")
    if loss is not None:
        perplexity = math.exp(min(loss, HIGHEST_LOSS))
        yield f"validation loss {loss:.4f} (perplexity {perplexity:.2f})"
    if numbers.get("reduction", 1) != 1:
        yield f"learning rate x {numbers['reduction']:g} after plateaus"
    yield from _describe_stream(record.get("stream"))


def _describe_stream(stream: Any) -> Iterator[str]:
    """How many sequences were drawn from the data."""
    drawn = stream.get("drawn") if isinstance(stream, Mapping) else None
    if isinstance(drawn, int):
        yield f"{drawn:,} sequences drawn"
