"""Rotary positions: the frequencies of every kind, and the rotation of queries and keys.

Sources: Su et al., arXiv 2104.09864 (default); position interpolation, arXiv 2306.15595 (linear);
NTK-aware scaling by the length of the text (dynamic); YaRN, arXiv 2309.00071; Llama 3.1's own, as
transformers has them in modeling_rope_utils.

Shapes in names: B batch, H head, T time, D head_dim, R rotated part of D, K kinds of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from growkit.models.architecture import Architecture

Rope = Mapping[str, Any]


class Lengths(NamedTuple):
    """Tokens: of the text, and of the longest text by the configuration."""

    time: int
    context: int


def compute_rotary_tables(
    model: Architecture, rope: Rope, time: int, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine [T, R/2] of the rotary angles.

    As in Hugging Face, angles and tables are rounded to float32 whatever the model's precision. The
    functions themselves are computed in float64, so that every machine gets the same tables. dtype:
    float64 rounds nothing, for proofs.
    """
    size = model.rotary if model.family.rotary else model.head_dim
    lengths = Lengths(time, model.context)
    frequency, factor = FREQUENCIES[rope["rope_type"]](rope, size, lengths, dtype)
    angle = (np.arange(time, dtype=dtype)[:, None] * frequency).astype(np.float64)
    cos, sin = np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)
    if factor == 1.0:
        return cos, sin
    return cos * dtype(factor), sin * dtype(factor)


def rotate(x_BxHxTxD: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the first R dimensions of every head by position; the others stay."""
    cos, sin = (table.astype(x_BxHxTxD.dtype)[None, None] for table in rotary)
    half = cos.shape[-1]
    first, second, unrotated = jnp.split(x_BxHxTxD, [half, 2 * half], axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin, unrotated], axis=-1
    )


def _default(rope: Rope, size: int, lengths: Lengths, dtype: Any) -> tuple[np.ndarray, float]:
    return _invert(rope["rope_theta"], size, dtype), 1.0


def _linear(rope: Rope, size: int, lengths: Lengths, dtype: Any) -> tuple[np.ndarray, float]:
    return _invert(rope["rope_theta"], size, dtype) / dtype(rope["factor"]), 1.0


def _dynamic(rope: Rope, size: int, lengths: Lengths, dtype: Any) -> tuple[np.ndarray, float]:
    """The base grows with the text once that is longer than the context."""
    factor = rope["factor"]
    stretch = factor * max(lengths) / lengths.context - (factor - 1)
    base = rope["rope_theta"] * stretch ** (size / (size - 2))
    return _invert(base, size, dtype), 1.0


def _yarn(rope: Rope, size: int, lengths: Lengths, dtype: Any) -> tuple[np.ndarray, float]:
    """Fast dimensions as they are, slow ones interpolated, those between by a ramp."""
    base = rope["rope_theta"]
    original = rope.get("original_max_position_embeddings") or lengths.context
    factor = rope.get("factor") or lengths.context / original

    def find_dimension(rotations: float) -> float:
        turns = math.log(original / (rotations * 2 * math.pi))
        return size * turns / (2 * math.log(base))

    low = find_dimension(rope.get("beta_fast") or 32)
    high = find_dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(size // 2, dtype=dtype) - dtype(low)) / dtype(high - low), 0, 1)
    whole = _invert(base, size, dtype)
    slow = dtype(1.0) / (dtype(factor) * _power(base, size, dtype))
    return slow * ramp + whole * (dtype(1.0) - ramp), _find_attention_factor(rope, factor)


def _find_attention_factor(rope: Rope, factor: float) -> float:
    """What YaRN multiplies cosine and sine by."""
    stated = rope.get("attention_factor")
    if stated is not None:
        return float(stated)

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(above) / scale(below) if above and below else scale(1.0)


def _llama3(rope: Rope, size: int, lengths: Lengths, dtype: Any) -> tuple[np.ndarray, float]:
    """Long waves are slowed by the factor, short ones stay, those between are mixed."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope.get("original_max_position_embeddings") or lengths.context
    frequency = _invert(rope["rope_theta"], size, dtype)
    wave = dtype(2 * math.pi) / frequency
    slow = frequency / dtype(factor)
    part = (dtype(original) / wave - dtype(low)) / dtype(high - low)
    mixed = (dtype(1.0) - part) * slow + part * frequency
    longer = np.where(wave > original / low, slow, frequency)
    between = (wave <= original / low) & (wave >= original / high)
    return np.where(between, mixed, longer), 1.0


def _power(base: float, size: int, dtype: Any) -> np.ndarray:
    """base ** (2 i / R) for each pair of dimensions."""
    exponent = np.arange(0, size, 2, dtype=dtype) / dtype(size)
    power: np.ndarray = dtype(base) ** exponent
    return power


def _invert(base: float, size: int, dtype: Any) -> np.ndarray:
    """The angle of each pair of dimensions by which one position turns it."""
    return dtype(1.0) / _power(base, size, dtype)


Frequencies = Callable[[Rope, int, Lengths, Any], tuple[np.ndarray, float]]
FREQUENCIES: dict[str, Frequencies] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
