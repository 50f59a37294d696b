"""Conversion between Hugging Face directories and trainer checkpoints: what the other side's contents are.

Names and configuration fields need no translation, both sides having the axis table's, so a conversion is a
copy with another lid. Knows what each side lacks (moments on one, a model card on the other); leaves
reading and writing to growkit.checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from convert.card import format_card
from growkit.checkpoint.files import encode_json
from growkit.checkpoint.huggingface import DTYPES
from growkit.checkpoint.rounding import round_to_dtype
from growkit.checkpoint.tensor import Contents, Recipe, Source, Tensor, copy_tensor, map_tensors
from growkit.entries import Conversion, Origin
from growkit.errors import UsageError, did_you_mean
from growkit.models import require_trained

DTYPE_NAMES = {str(dtype): dtype for dtype in DTYPES.values()}
# Files that an export writes anew.
OWN = ("README.md", "generation_config.json")


def convert_to_checkpoint(source: Source) -> Contents:
    """A trainer checkpoint of a Hugging Face directory: the parameters bit for bit, no moments, count 0.

    Raises UsageError for a checkpoint, and for an architecture that the trainer does not compute.
    """
    if source.kind == "checkpoint":
        raise UsageError(
            f"{source.path} is a trainer checkpoint already; import takes a Hugging Face directory"
        )
    require_trained(source.model, source.path)
    entry = Conversion(operation="import", source=Origin.of(source), dtype=str(source.dtype))
    return Contents(
        config=source.config,
        recipes={"params": _in_table_order(source, None)},
        lineage=[*source.lineage, entry.to_json()],
        record=source.record,
        files=source.files,
    )


def convert_to_directory(
    source: Source, dtype: str | None = None, evaluation: str = ""
) -> Contents:
    """A Hugging Face directory of any source, its moments left behind.

    dtype: float64, float32, bfloat16 or float16, or None for the source's own. evaluation: what the model card says of
    quality, in Markdown. Raises UsageError for another dtype, and for an architecture other than GPT-NeoX.
    """
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UsageError(
            f"--dtype is one of {', '.join(DTYPE_NAMES)}, got {dtype!r}{did_you_mean(dtype, DTYPE_NAMES)}"
        )
    target = DTYPE_NAMES[dtype] if dtype else source.dtype
    model = require_trained(source.model, source.path)
    entry = Conversion(operation="export", source=Origin.of(source), dtype=str(target))
    contents = Contents(
        config=model.config(source.config),
        recipes={"params": _in_table_order(source, DTYPE_NAMES[dtype] if dtype else None)},
        lineage=[*source.lineage, entry.to_json()],
        files={name: content for name, content in source.files.items() if name not in OWN},
    )
    beside = {
        "README.md": format_card(model, contents.lineage, evaluation).encode(),
        "generation_config.json": _generation(source),
    }
    return replace(contents, files=contents.files | beside)


def _in_table_order(source: Source, dtype: np.dtype | None) -> dict[str, Recipe]:
    tensors = source.tensors["params"]
    return {
        name: _converted(name, tensors[name], dtype or tensors[name].dtype)
        for name, _, _ in source.model.table.names(source.model.sizes)
    }


def _converted(name: str, tensor: Tensor, dtype: np.dtype) -> Recipe:
    if tensor.dtype == dtype:
        return copy_tensor(tensor)
    return map_tensors([tensor], dtype, lambda array: round_to_dtype(name, array, dtype))


def _generation(source: Source) -> bytes:
    kept: Any = source.files.get("generation_config.json")
    if kept is not None:
        return kept
    ids = {key: source.config.get(key, 0) for key in ("bos_token_id", "eos_token_id")}
    return encode_json({"_from_model_config": True, **ids})
