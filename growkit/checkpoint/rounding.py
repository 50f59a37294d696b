"""Convert arrays to another dtype: round once to nearest, and refuse numbers that do not fit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from growkit.errors import GrowkitError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def round_to_dtype(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The parameter `name` in `dtype`, rounded once to nearest.

    Raises GrowkitError if a finite number becomes infinite.
    """
    if array.dtype == dtype:
        return array
    wide = array
    if array.dtype == np.float64 and dtype == BFLOAT16:
        wide = _round_to_odd_float32(array)
    with np.errstate(over="ignore"):
        narrow = wide.astype(dtype)
    infinite = np.isinf(narrow)
    if infinite.any():
        # Infinities that were there before are the source's; only new ones are refused.
        too_large = infinite & np.isfinite(array)
        if too_large.any():
            raise GrowkitError(_describe_overflow(name, array[too_large].flat[0], dtype))
    return narrow


def _describe_overflow(name: str, number: Any, dtype: np.dtype) -> str:
    limits: Any = ml_dtypes.finfo  # its type stubs are incomplete
    largest = float(limits(dtype).max)
    return (
        f"the parameter {name!r} holds {number:.6g}, but the largest {dtype} is {largest:.6g}; "
        "bfloat16 and float32 reach 3e+38"
    )


def _round_to_odd_float32(array: np.ndarray) -> np.ndarray:
    """float64 as float32 rounded to odd; rounding that again equals rounding once.

    ml_dtypes converts float64 to bfloat16 by way of float32, which would round twice. Method:
    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", IEEE Transactions on Computers 57 (2008).
    """
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    # A float's bits as a whole number: one less is the next float towards zero, for either sign.
    bits = narrow.view(np.uint32)
    # Infinities stay: what is too large for float32 is too large for bfloat16, and refused later.
    inexact = (narrow != array) & np.isfinite(narrow)
    # First truncate towards zero, then set the last bit of everything that was not exact.
    rounded_up = inexact & (np.abs(narrow) > np.abs(array))
    bits -= rounded_up
    bits |= inexact
    return narrow
