"""Convert between Hugging Face directories and trainer checkpoints: the contents of the other side.

Both sides have the axis table's names and the same configuration, so a conversion copies tensors.
What differs is what each side lacks: a directory has no moments, a checkpoint no model card.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from convert.card import format_card
from convert.privacy import strip_config, strip_paths, strip_settings
from growkit.checkpoint.carried import select_carried
from growkit.checkpoint.files import encode_json
from growkit.checkpoint.neox import KIND as NEOX
from growkit.checkpoint.olmo import KIND as OLMO
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
    """A trainer checkpoint of a Hugging Face directory or of a checkpoint of gpt-neox or OLMo.

    The parameters are the source's bit for bit. Of the latter two come the moments and the
    position as well; of a directory no moments. Raises UsageError for a trainer checkpoint, and for
    a model that the trainer does not compute.
    """
    if source.kind == "checkpoint":
        raise UsageError(
            f"{source.path} is a trainer checkpoint already; import takes a Hugging Face directory"
        )
    require_trained(source.model, source.path)
    entry = Conversion(operation="import", source=Origin.of(source), dtype=str(source.dtype))
    trained = source.kind in (NEOX, OLMO)
    slots = list(source.tensors) if trained else ["params"]
    return Contents(
        config=source.config,
        recipes={slot: _convert_slot(source, slot, None) for slot in slots},
        lineage=[*source.lineage, entry.to_json()],
        record=source.record if trained else {},
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
        recipes={"params": _convert_slot(source, "params", written if dtype else None)},
        lineage=lineage if paths else strip_paths(lineage),
        files=select_carried(files if paths else strip_settings(files)),
    )
    card = format_card(model, contents.lineage, evaluation)
    beside = {
        # A lineage may hold halves of surrogate pairs, which JSON can spell and UTF-8 cannot.
        "README.md": card.encode(errors="backslashreplace"),
        "generation_config.json": _generation_config(source),
    }
    return replace(contents, files=contents.files | beside)


def choose_dtype(source: Source, dtype: str | None) -> np.dtype:
    """The dtype of an export: the one asked for, or the source's own. Raises UsageError."""
    if dtype is None:
        return source.dtype
    if dtype not in DTYPE_NAMES:
        near = did_you_mean(dtype, DTYPE_NAMES)
        raise UsageError(f"--dtype is one of {', '.join(DTYPE_NAMES)}, got {dtype!r}{near}")
    return DTYPE_NAMES[dtype]


def _convert_slot(source: Source, slot: str, dtype: np.dtype | None) -> dict[str, Recipe]:
    """A slot's tensors in the table's order, in `dtype` or each in its own."""
    tensors = source.tensors[slot]
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
