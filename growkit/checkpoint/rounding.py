"""Numbers in another dtype: rounded once, and refused where they are too large for it."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from growkit.errors import GrowkitError


def round_to_dtype(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The parameter `name` in `dtype`, rounded once to nearest. Raises GrowkitError where a number is too large."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        twice = array.dtype == np.float64 and dtype == ml_dtypes.bfloat16
        narrow = (_odd_float32(array) if twice else array).astype(dtype)
    infinite = np.isinf(narrow)
    if infinite.any() and (too_large := infinite & np.isfinite(array)).any():
        raise GrowkitError(
            f"the parameter {name!r} holds {array[too_large].flat[0]:.6g}, and {dtype} ends at "
            f"{float(ml_dtypes.finfo(dtype).max):.6g}; bfloat16 and float32 reach 3e+38"
        )
    return narrow


def _odd_float32(array: np.ndarray) -> np.ndarray:
    """float64 as float32 rounded to odd, which can be rounded again and is as if rounded once.

    ml_dtypes reaches bfloat16 by way of float32. Boldo and Melquiond, "Emulation of FMA and correctly rounded
    sums: proved algorithms using rounding to odd", IEEE Transactions on Computers 57 (2008).
    """
    narrow = array.astype(np.float32)
    bits = narrow.view(np.uint32)
    inexact = (narrow != array) & np.isfinite(narrow)
    bits -= inexact & (np.abs(narrow) > np.abs(array))
    bits |= inexact
    return narrow
