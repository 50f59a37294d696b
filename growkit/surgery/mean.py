"""The weighted mean of arrays, summed in float64 and rounded once.

The mean of two with equal weights is computed in float32 where the numbers have no more bits than
that: it is the same number. A sum of two numbers of p bits that is rounded to 2p + 2 bits or more,
and then to p, is the sum rounded once to p (S. A. Figueroa, "When is double rounding innocuous?",
SIGNUM Newsletter 30(3), 1995). float64 has 53 bits for float32's 24, and float32 has 24 for the 11
of float16 and the 8 of bfloat16. Halving rounds nothing before the last step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from growkit.checkpoint.numbers import is_sound
from growkit.checkpoint.rounding import BFLOAT16, round_to_dtype

# A sum of float32 in float64 is off by far less than the one rounding of the result.
WIDE = np.float64
# dtypes whose sums of two float32 rounds as float64 would.
NARROW = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
# Numbers that are summed at once: all that a sum needs then lies in a core's own cache. float32 on
# an EPYC, two arrays: 0.24 to 0.35 ns a number in tiles of 16,384 to 65,536; of 8,192, 0.53.
TILE = 1 << 15


class Mean:
    """Weighted means of arrays, each an array of `dtype` that holds until the next.

    Its memory is allocated once: allocating it for each mean takes longer than the mean. name: of
    the parameter, for messages. shares: the weights, which sum to 1.
    """

    def __init__(self, name: str, shares: Sequence[float], dtype: np.dtype) -> None:
        self.name = name
        self.shares = [WIDE(share) for share in shares]
        self.dtype = dtype
        self.halves = list(shares) == [0.5, 0.5] and dtype in NARROW
        self._mean = np.empty(0, dtype)
        self._sums = np.empty((2, TILE), WIDE)

    def of(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The mean of flat arrays of one length.

        Raises GrowkitError where numbers of wider arrays do not fit into the dtype.
        """
        size = arrays[0].size
        if size > self._mean.size:
            self._mean = np.empty(size, self.dtype)
        mean = self._mean[:size]
        halves = self.halves and all(array.dtype == self.dtype for array in arrays)
        # An infinity or NaN of a source is told where the mean is written.
        with np.errstate(over="ignore", invalid="ignore"):
            if halves and self._halve_sums(arrays, mean):
                return mean
            for start in range(0, size, TILE):
                tiles = [array[start : start + TILE] for array in arrays]
                total = self._sum(tiles)
                mean[start : start + TILE] = round_to_dtype(self.name, total, self.dtype)
        return mean

    def _halve_sums(self, arrays: Sequence[np.ndarray], mean: np.ndarray) -> bool:
        """Put half the sums of two arrays into `mean`; False where one may not be in float32."""
        half = np.float32(0.5)
        for start in range(0, mean.size, TILE):
            one, other = (array[start : start + TILE] for array in arrays)
            out = mean[start : start + TILE]
            if self.dtype == np.float32:
                np.add(one, other, out=out)
                out *= half
            else:
                total = one.astype(np.float32)
                total += other.astype(np.float32)
                total *= half
                out[...] = total
        # A sum of two numbers that float32 holds may be too large for it, and its half is not.
        return not mean.size or is_sound(mean, squares=False)

    def _sum(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The weighted sum of tiles; it is overwritten by the next."""
        total, part = (memory[: arrays[0].size] for memory in self._sums)
        np.multiply(arrays[0], self.shares[0], out=total, dtype=WIDE)
        for array, share in zip(arrays[1:], self.shares[1:], strict=True):
            total += np.multiply(array, share, out=part, dtype=WIDE)
        return total
