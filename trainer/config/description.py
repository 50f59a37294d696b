"""What a run says of its sizes: where they are not as given, or were not given at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growkit.models.architecture import Architecture
from trainer.config.sections import Config


def describe_sizes(
    config: Config, values: Mapping[str, Any], source: Architecture | None, origin: str
) -> tuple[str, ...]:
    """The sentences about the batch and the context of a run that begins.

    values: the nested values that `config` was resolved from. source: the model of --from, None for
    a new one. origin: what the user calls it.
    """
    words = [describe_batch(config)]
    if source is not None:
        stated = "context" in (values.get("model") or {})
        words.append(describe_context(config.model.context, source.context, stated, origin))
    return tuple(filter(None, words))


def describe_batch(config: Config) -> str:
    """What became of a batch in tokens that is no whole number of sequences; else empty."""
    batch = config.batch
    context = config.model.context
    if not batch.tokens or batch.tokens == batch.sequences * context:
        return ""
    return (
        f"batch.tokens={batch.tokens:,} is no whole number of sequences of {context:,} tokens; the "
        f"nearest is taken: {batch.sequences:,} sequences, {batch.sequences * context:,} tokens"
    )


def describe_context(context: int, theirs: int, stated: bool, origin: str) -> str:
    """How a run's context came about, beside that of the model it begins with.

    theirs: the model's own. stated: whether model.context was given. Empty where what is given is
    the model's own.
    """
    if not stated:
        return (
            f"context: {context:,} tokens, as {origin} states it; model.context=N takes sequences "
            "of another length"
        )
    if context == theirs:
        return ""
    return f"context: {context:,} tokens by model.context; {origin} states {theirs:,}"
