"""Which numbers are wide: softmax, norms, logits, losses and sums use at least float32.

float64 stays float64, so that tests can prove equalities to 1e-12.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from growkit.growth.precision import wide_dtype


def select_wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float64 for float64, else float32."""
    return wide_dtype(dtype)


def widen(x: jax.Array) -> jax.Array:
    """Convert x to float32, or leave it in float64."""
    return x.astype(select_wide_dtype(x.dtype))


def cap(x: jax.Array, bound: float | None) -> jax.Array:
    """bound tanh(x / bound), which lies between -bound and bound; x itself without one."""
    return x if bound is None else bound * jnp.tanh(x / bound)
