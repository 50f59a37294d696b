"""The mean of several checkpoints: the parameters are averaged, everything else is the last one's.

The mean of late checkpoints of a run often predicts better than any of them (Izmailov et al.,
"Averaging weights leads to wider optima and better generalization", arXiv 1803.05407). Moments
belong to one set of parameters, so they are not averaged. Of a model around a text decoder all is
averaged: the decoder, and what lies around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from growkit.checkpoint.around import TEXT, Around
from growkit.checkpoint.files import find_real
from growkit.checkpoint.reading import Reader, split_numbers
from growkit.checkpoint.tensor import Contents, Recipe, Source, Tensor, copy_tensor, map_tensors
from growkit.entries import Average, Origin
from growkit.errors import GrowkitError, UsageError
from growkit.surgery.comparison import find_differences, model_of
from growkit.surgery.mean import Mean

# Kinds of dtypes that hold whole numbers and booleans.
WHOLE = "iub"
# Fields that say how a model was saved, and not what it computes.
SAVED = ("transformers_version", "dtype", "torch_dtype", "_name_or_path")


def average_checkpoints(
    sources: Sequence[Source], weights: Sequence[float] | None = None
) -> Contents:
    """The weighted mean, summed in float64 and rounded once to the last source's dtype; weights are
    normalised.

    Raises UsageError for fewer than two sources, sources of different models, and weights that do
    not fit.
    """
    check_alike(sources)
    sources[-1].require_readable()
    shares = normalise_weights(weights or [1.0] * len(sources), len(sources))
    last = sources[-1]
    slots = {
        slot: {name: copy_tensor(tensor) for name, tensor in tensors.items()}
        for slot, tensors in last.tensors.items()
    }
    origins = [Origin.of(source) for source in sources]
    table = last.model.family.given
    entry = Average(source=origins[-1], averaged=origins, weights=shares, table=table)
    params = {
        name: _mean([source.tensors["params"][name] for source in sources], shares, name)
        for name in last.tensors["params"]
    }
    return Contents(
        config=last.config,
        recipes=slots | {"params": params},
        lineage=[*last.lineage, entry.to_json()],
        # A validation loss is that of the parameters it was measured with.
        record={key: value for key, value in last.record.items() if key != "validation_loss"},
        files=last.files,
        torch_optimizer=last.torch_optimizer,
        around=_average_around(sources, shares),
        distributed=last.distributed,
    )


def _average_around(sources: Sequence[Source], shares: Sequence[float]) -> Around | None:
    """What lies around the decoders, averaged too; None where nothing does."""
    arounds = [source.around for source in sources if source.around is not None]
    if not arounds:
        return None
    made = {
        name: _mean([around.others[name] for around in arounds], shares, name)
        for name in arounds[-1].others
    }
    return replace(arounds[-1], made=made)


def _mean(tensors: Sequence[Tensor], shares: Sequence[float], name: str) -> Recipe:
    """The recipe of a mean. Tensors of whole numbers must be equal: they are copied."""
    dtype = tensors[-1].dtype
    if dtype.kind in WHOLE:
        return map_tensors(tensors, dtype, lambda *arrays: _require_equal(name, arrays))

    def pieces() -> Iterator[tuple[int, np.ndarray]]:
        # One for each thread that follows the recipe: its memory is written to.
        mean = Mean(name, shares, dtype)
        with ExitStack() as files:
            readers = [files.enter_context(Reader(tensor)) for tensor in tensors]
            for start, stop in split_numbers(tensors):
                blocks = [reader.read(start, stop) for reader in readers]
                yield start * dtype.itemsize, mean.of(blocks)

    return Recipe(tensors[-1].shape, dtype, pieces=pieces)


def _require_equal(name: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The last of several arrays. Raises GrowkitError where one of them is another."""
    if any(not np.array_equal(array, arrays[-1]) for array in arrays):
        raise GrowkitError(
            f"{name!r} holds whole numbers, which have no mean, and they are not the same in all "
            f"models"
        )
    return arrays[-1]


def normalise_weights(weights: Sequence[float], count: int) -> list[float]:
    """The weights as shares of their sum.

    Raises UsageError for the wrong number of them and for what is not a weight.
    """
    if len(weights) != count:
        raise UsageError(
            f"--weights takes one weight a model: {count} models, {len(weights)} weights"
        )
    wrong = [weight for weight in weights if not 0 < weight < float("inf")]
    if wrong:
        raise UsageError(
            f"a weight is a number above 0, got {wrong[0]}; leave the model out instead"
        )
    return [weight / sum(weights) for weight in weights]


def check_alike(sources: Sequence[Source]) -> None:
    """Raise UsageError unless there are two sources or more, each given once, all of one model."""
    if len(sources) < 2:
        raise UsageError("an average is of two models or more; name further ones")
    paths = [find_real(source.path) for source in sources]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise UsageError(
                f"{sources[number].path} is given twice; give it once, with a weight of 2"
            )
    last = sources[-1]
    for source in sources[:-1]:
        if (source.around is None) != (last.around is None):
            inner, plain = (last, source) if source.around is None else (source, last)
            raise UsageError(
                f"only models of one kind have a mean: {inner.path} is a text decoder within a "
                f"larger model, and {plain.path} is none"
            )
        different = find_differences(model_of(source), model_of(last))
        different = different or find_differences(list_around(source), list_around(last))
        if different:
            field, (ours, theirs) = next(iter(different.items()))
            raise UsageError(
                f"only models of one shape have a mean: {field} is {ours} in {source.path} "
                f"and {theirs} in {last.path}"
            )


def list_around(source: Source) -> dict[str, Any]:
    """What must be the same around text decoders, by name: fields of their configurations, and the
    shape of every tensor; empty for a plain decoder.
    """
    if source.around is None:
        return {}
    outer = {name: value for name, value in source.around.config.items() if name != TEXT}
    shapes = {name: list(tensor.shape) for name, tensor in source.around.others.items()}
    return dict(_list_fields(outer)) | shapes


def _list_fields(config: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every field of a configuration, those of its sections as vision.size."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _list_fields(value, f"{within}{name}.")
        elif name not in SAVED:
            yield f"{within}{name}", value
