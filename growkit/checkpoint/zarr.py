"""What Zarr version 2 and Orbax write down of arrays: names of chunks, dtypes, metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

# How Zarr version 2 spells dtypes of numbers.
ZARR_NUMBERS = re.compile(r"[<>|=](f[248]|[iu][1248])")
# Orbax's number for a key of a dict.
DICT_KEY = 2


def name_chunk(shape: tuple[int, ...]) -> str:
    """The file name of an array's first (or only) chunk in Zarr version 2."""
    return ".".join("0" for _ in shape) or "0"


def parse_dtype(name: str) -> np.dtype:
    """The dtype of numbers. Raises ValueError for others: raw bytes are not Python objects."""
    if name != "bfloat16" and not ZARR_NUMBERS.fullmatch(name):
        raise ValueError(name)
    kind: Any = ml_dtypes.bfloat16 if name == "bfloat16" else name
    parsed: np.dtype[Any] = np.dtype(kind)
    return parsed


def describe_array(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    """The .zarray of an array in one uncompressed chunk."""
    return {
        "chunks": shape,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": "bfloat16" if dtype == ml_dtypes.bfloat16 else dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": shape,
        "zarr_format": 2,
    }


def describe_tree(arrays: Iterable[tuple[str, ...]]) -> dict[str, Any]:
    """The metadata that Orbax's handler of trees writes for nested dicts of numpy arrays."""
    tree = {
        str(keys): {
            "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for keys in sorted(arrays)
    }
    options = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    return {"tree_metadata": tree, **options, "custom_metadata": None}
