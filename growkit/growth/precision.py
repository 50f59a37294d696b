"""The dtype in which growth computes, and the trainer whatever must be wide."""

from __future__ import annotations

from typing import Any

import numpy as np


def wide_dtype(dtype: Any) -> np.dtype:
    """float64 for float64, else float32: at least as wide as every float that files hold.

    float64 stays, so that proofs hold to 1e-12. Narrow floats (bfloat16 has 8 bits of precision,
    float16 11) are computed in float32 (24) and rounded once.
    """
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)
