"""Arrays that are sharded, compressed or in OCDBT: read through tensorstore."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint.files import find_real
from growkit.errors import GrowkitError, first_line

# Bytes of decoded chunks kept in memory, so that a chunk of several layers is decoded once.
CACHED = 32 << 20


def read_store(part: Any) -> np.ndarray:
    """A part of an array, in memory. Raises GrowkitError for one that cannot be read."""
    try:
        return np.asarray(part.read().result())
    except ValueError as problem:
        raise GrowkitError(
            f"cannot read an array of the checkpoint: {first_line(problem)}"
        ) from None


def open_store(state: Path, name: str, tree: Mapping[str, Any]) -> Any:
    """The array of a checkpoint in tensorstore. Raises GrowkitError for one that cannot be read."""
    import tensorstore

    store: dict[str, Any] = {"driver": "file", "path": f"{find_real(state)}/"}
    if tree.get("use_ocdbt"):
        store = {"driver": "ocdbt", "base": store, "path": f"{name}/"}
    else:
        store["path"] += f"{name}/"
    driver = "zarr3" if tree.get("use_zarr3") else "zarr"
    spec = {"driver": driver, "kvstore": store}
    try:
        array = tensorstore.open(spec, read=True, context=_share_cache()).result()
    except ValueError as problem:
        raise GrowkitError(
            f"cannot read the array {name!r} of {state}: {first_line(problem)}"
        ) from None
    _check_chunks(array, f"the array {name!r} of {state}")
    return array


def _check_chunks(array: Any, what: str) -> None:
    """Raise GrowkitError for chunks that are larger than their array, or than the memory.

    A chunk is decoded as a whole, and tensorstore ends the process where there is no room for it.
    """
    # tensorstore says None for a number without dimensions.
    shape = array.chunk_layout.read_chunk.shape or ()
    size = math.prod(shape) * array.dtype.numpy_dtype.itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = all(part <= max(whole, 1) for part, whole in zip(shape, array.shape, strict=True))
    if not fits or size > memory:
        raise GrowkitError(
            f"cannot read {what}: its chunks of {list(shape)} take {size:,} bytes each, and the "
            f"array has the shape {list(array.shape)}"
        )


@cache
def _share_cache() -> Any:
    """One cache of decoded chunks for all arrays of the process."""
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHED}})
