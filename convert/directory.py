"""Convert between Hugging Face directories and trainer checkpoints: the contents of the other side.

Both sides have the axis table's names and the same configuration, so a conversion copies tensors.
What differs is what each side lacks: a checkpoint has no model card, and of directories only
checkpoints of transformers' Trainer have moments.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from convert.card import format_card
from convert.optimizer import (
    KEY,
    Settings,
    carries_optimizer,
    find_settings,
    make_optimizer,
    make_trainer_state,
    state_optimizer,
)
from convert.privacy import strip_config, strip_paths, strip_settings
from convert.training import HISTORY
from growkit.checkpoint.carried import select_carried
from growkit.checkpoint.files import encode_json
from growkit.checkpoint.hf_trainer import STATE
from growkit.checkpoint.rounding import round_to_dtype
from growkit.checkpoint.safetensors import DTYPES
from growkit.checkpoint.tensor import Contents, Recipe, Source, Tensor, copy_tensor, map_tensors
from growkit.entries import Conversion, Origin
from growkit.errors import UsageError, did_you_mean
from growkit.models import require_trained

DTYPE_NAMES = {str(dtype): dtype for dtype in DTYPES.values()}
# Files that an export writes anew.
OWN = ("README.md", "generation_config.json")


def convert_to_checkpoint(source: Source) -> Contents:
    """A trainer checkpoint of a Hugging Face directory or of a checkpoint of another trainer.

    The parameters are the source's bit for bit, and so are moments, count and step of checkpoints
    of transformers' Trainer, gpt-neox and OLMo. Raises UsageError for a trainer checkpoint and for
    a model that the trainer does not compute, GrowkitError for an optimizer that cannot be carried.
    """
    if source.kind == "checkpoint":
        raise UsageError(
            f"{source.path} is a trainer checkpoint already; import takes a Hugging Face directory"
        )
    require_trained(source.model, source.path)
    if "mu" not in source.tensors:
        # An optimizer that is there and cannot be read is not lost without a word.
        source.require_readable()
    carried = carries_optimizer(source)
    stated = {KEY: state_optimizer(source)} if carried and source.torch_optimizer else {}
    entry = Conversion(
        operation="import", source=Origin.of(source), dtype=str(source.dtype), more=stated
    )
    moments = _copy_moments(source) if carried else {}
    return Contents(
        config=source.config,
        recipes={"params": _convert_params(source, None)} | moments,
        lineage=[*source.lineage, entry.to_json()],
        record=source.record if carried else {},
        files=select_carried(source.files),
    )


def convert_to_directory(
    source: Source, dtype: str | None = None, evaluation: str = "", paths: bool = False
) -> Contents:
    """A Hugging Face directory of any source, without its moments.

    dtype: float64, float32, bfloat16 or float16, or None for each tensor's own. evaluation: what
    the model card says of quality, in Markdown. paths: whether the lineage and the settings keep
    the paths of this machine; only their last names stay otherwise. Raises UsageError for another
    dtype, and for a model that the trainer does not compute.
    """
    written = choose_dtype(source, dtype)
    model = require_trained(source.model, source.path)
    entry = Conversion(operation="export", source=Origin.of(source), dtype=str(written))
    lineage = [*source.lineage, entry.to_json()]
    config = model.config(source.config)
    files = {name: content for name, content in source.files.items() if name not in OWN}
    contents = Contents(
        # transformers 4 reads torch_dtype, 5 reads dtype.
        config=(config if paths else strip_config(config))
        | {"torch_dtype": str(written), "dtype": str(written)},
        recipes={"params": _convert_params(source, written if dtype else None)},
        lineage=lineage if paths else strip_paths(lineage),
        files=select_carried(files if paths else strip_settings(files)),
    )
    history = source.files.get(HISTORY, b"")
    card = format_card(model, contents.lineage, evaluation, history)
    beside = {
        # A lineage may hold halves of surrogate pairs, which JSON can spell and UTF-8 cannot.
        "README.md": card.encode(errors="backslashreplace"),
        "generation_config.json": _generation_config(source),
    }
    return replace(contents, files=contents.files | beside)


def convert_to_trained(
    source: Source, evaluation: str = "", paths: bool = False
) -> tuple[Contents, Settings]:
    """A checkpoint of transformers' Trainer, made of a trainer checkpoint with its moments.

    Arguments as in `convert_to_directory`. Returns with it what the optimizer was told. Raises
    UsageError for a source without moments, GrowkitError for one whose lineage does not state the
    optimizer, and for a model whose parameters PyTorch numbers in an order that is not known.
    """
    if source.torch_optimizer is not None:
        raise UsageError(
            f"{source.path} is a checkpoint of transformers' Trainer already; --optimizer hf takes "
            "a run or a trainer checkpoint"
        )
    contents = convert_to_directory(source, None, evaluation, paths)
    settings = find_settings(source)
    optimizer = make_optimizer(source, settings)
    files = contents.files | {STATE: make_trainer_state(source, settings)}
    recipes = contents.recipes | _copy_moments(source)
    made = replace(contents, recipes=recipes, files=files, torch_optimizer=optimizer)
    return made, settings


def choose_dtype(source: Source, dtype: str | None) -> np.dtype:
    """The dtype of an export: the one asked for, or the source's own. Raises UsageError."""
    if dtype is None:
        return source.dtype
    if dtype not in DTYPE_NAMES:
        near = did_you_mean(dtype, DTYPE_NAMES)
        raise UsageError(f"--dtype is one of {', '.join(DTYPE_NAMES)}, got {dtype!r}{near}")
    return DTYPE_NAMES[dtype]


def _copy_moments(source: Source) -> dict[str, dict[str, Recipe]]:
    """The moments of a source, byte for byte, in the order of the parameters."""
    names = [name for name, _, _ in source.model.table.names(source.model.sizes)]
    return {
        slot: {name: copy_tensor(tensors[name]) for name in names}
        for slot, tensors in source.tensors.items()
        if slot != "params"
    }


def _convert_params(source: Source, dtype: np.dtype | None) -> dict[str, Recipe]:
    """The parameters in the table's order, in `dtype` or each in its own."""
    tensors = source.tensors["params"]
    names = [name for name, _, _ in source.model.table.names(source.model.sizes)]
    return {name: _convert(name, tensors[name], dtype or tensors[name].dtype) for name in names}


def _convert(name: str, tensor: Tensor, dtype: np.dtype) -> Recipe:
    if tensor.dtype == dtype:
        return copy_tensor(tensor)
    return map_tensors([tensor], dtype, lambda array: round_to_dtype(name, array, dtype))


def _generation_config(source: Source) -> bytes:
    """The source's generation_config.json, or one with its first and last token."""
    carried = source.files.get("generation_config.json")
    if carried is not None:
        return carried
    ids = {key: source.config.get(key, 0) for key in ("bos_token_id", "eos_token_id")}
    return encode_json({"_from_model_config": True, **ids})
