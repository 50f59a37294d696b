"""Noise that lets training tell copies apart, and how large it is.

Weights that read copied units get it, each copy its own, so that it sums to zero over the copies of
a unit: what reads equal copies finds the old sum. Its standard deviation is a number times the
model's initializer_range, or, as `0.5rms`, times the root mean square of the tensor itself. That
takes a look at the whole tensor before any of it grows: `Separation.measure` takes it in pieces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from growkit import forms
from growkit.errors import UsageError
from growkit.growth.noise import UNIT, centred
from growkit.growth.padding import VALUE, round_here
from growkit.growth.precision import wide_dtype
from growkit.models.notation import Part

if TYPE_CHECKING:
    from growkit.growth.plan import Plan

# The units of --noise; a plain number is in units of RANGE.
RANGE, RMS = "initializer_range", "rms"
# Bits of a number that its square is taken of, and how many numbers are taken in at once: their
# squares, of 32 bits, add up exactly in the 53 bits of float64.
BITS, PIECE = 16, 1 << 20
# The exponents of float64, denormal numbers too.
LOWEST, HIGHEST = -1100, 1100
# Bits that a measured root mean square keeps, 0.4 % of it at most. So numpy's and a compiler's,
# which adds in another order, are nearly always the same number.
KEPT_BITS = 8


def parse_noise(stated: float | str) -> tuple[float, str]:
    """(size, unit) of noise as a user states it: 0.5, or 0.5rms. Raises UsageError."""
    text = str(stated)
    unit = RMS if text.endswith(RMS) else RANGE
    try:
        return float(text.removesuffix(RMS)), unit
    except ValueError:
        raise UsageError(
            f"--noise takes a number, or one in units of each tensor's root mean square, as "
            f"0.5rms; got {stated!r}"
        ) from None


def state_noise(size: float, unit: str) -> float | str:
    """Noise as files and users state it, as `parse_noise` reads it: a number, or 0.5rms."""
    if unit == RANGE:
        return size
    short = f"{size:g}"
    return f"{short if float(short) == size else repr(size)}{RMS}"


def take_noise(stored: Mapping[str, Any]) -> float | str:
    """The noise of a lineage's entry. Raises ValueError for what is none."""
    value = stored["noise"]
    if not isinstance(value, str):
        return forms.take_number(stored, "noise")
    number = value.removesuffix(RMS)
    if number == value or not math.isfinite(float(number)):
        raise ValueError(f"noise is a finite number, or one with {RMS}, got {ascii(value)[:80]}")
    return value


class Separation:
    """The noise of one block of a parameter.

    place: the axis along which it goes, see `find_place`. name: the block's, with its unit of the
    stacked axes. copied: the block's unfused shape with all copies. lead: how many of its axes
    count units. scale: what its copies are multiplied by, None for one.
    """

    def __init__(
        self,
        plan: Plan,
        part: Part,
        place: int,
        name: str,
        copied: tuple[int, ...],
        lead: int,
        scale: np.ndarray | None,
    ):
        self.plan = plan
        self.part = part
        self.place = place
        self.name = name
        self.copied = copied
        self.lead = lead
        self.scale = scale
        self.squares = SquareSum()
        # The root mean square of the source's tensor, where a compiler computes it.
        self.measured: Any = None

    @property
    def measures(self) -> bool:
        """Whether all of the source's tensor must be seen before any of it grows."""
        return self.plan.noise_unit == RMS

    def measure(self, array: Any, xp: Any = np) -> None:
        """Take in a piece of the source's tensor, in any order; with jax all of it at once."""
        if xp is np:
            self.squares.add(array)
        else:
            self.measured = find_root_mean_square(array, xp)

    def add(self, array: Any, units: np.ndarray, xp: Any) -> Any:
        """Copied units with their noise.

        Each copy gets its own number (see `growkit.growth.noise.centred`) less the next copy's,
        exactly: what reads equal copies finds the old sum.
        """
        wide = wide_dtype(array.dtype)
        difference = self._numbers(units, xp) - self._numbers_of_next(units, xp)
        noise = difference.astype(wide) * xp.asarray(self._find_spread(xp), wide)
        exact = round_here(array.astype(wide), xp) + round_here(noise, xp)
        return exact.astype(array.dtype)

    def _find_spread(self, xp: Any) -> Any:
        """What the difference of two random numbers is multiplied by, float32."""
        # The variance of a difference is two.
        of_difference = UNIT * math.sqrt(0.5)
        if not self.measures:
            return np.float32(self.plan.noise * self.plan.model.initializer_range * of_difference)
        factor = np.float32(self.plan.noise * self._scale_size * of_difference)
        if self.measured is not None:
            return self.measured.astype(xp.float32) * factor
        return np.float32(self.squares.root_mean) * factor

    @cached_property
    def _scale_size(self) -> float:
        """The root mean square of what copies are multiplied by."""
        return 1.0 if self.scale is None else math.sqrt(float(np.square(self.scale).mean()))

    def _numbers(self, units: np.ndarray, xp: Any) -> Any:
        """The random numbers of consecutive units."""
        shape = (len(units), *self.copied[self.lead :])
        first = int(units[0]) * math.prod(shape[1:])
        return centred(self.plan.seed, f"{self.name} noise", shape, xp, first=first)

    def _numbers_of_next(self, units: np.ndarray, xp: Any) -> Any:
        """The random numbers of the next copies along the axis that noise goes along."""
        next_copy = self.plan.maps[self.part.names[self.place]].next_copy
        if self.place >= self.lead:
            numbers = self._numbers(units, xp)
            return numbers.take(next_copy, axis=self.place - self.lead + 1)
        at = list(np.unravel_index(units, self.copied[: self.lead]))
        at[self.place] = next_copy[at[self.place]]
        following = np.ravel_multi_index(at, self.copied[: self.lead])
        return xp.concatenate([self._numbers(following[i : i + 1], xp) for i in range(len(units))])


def find_place(part: Part, plan: Plan, moment: int) -> int | None:
    """The axis along which a block gets noise; None for no noise.

    That is the first copied one that it reads, or that of a router's experts.
    """
    if moment != VALUE or not plan.noise:
        return None
    for place, axis in enumerate(part.axes):
        axis_map = plan.maps.get(axis.name)
        noisy = axis.read or (axis.name == "expert" and part.routes)
        if noisy and axis_map is not None and (axis_map.copies > 1).any():
            return place
    return None


class SquareSum:
    """The sum of squares of numbers that are taken in piece by piece.

    Exact, of numbers rounded to BITS bits: so it is the same in any order, in pieces of any size
    and on any machine. What is not finite counts as zero.
    """

    def __init__(self) -> None:
        # By the exponent of the numbers: sums of squares of their first BITS bits.
        self.sums = [0] * (HIGHEST - LOWEST)
        self.count = 0

    def add(self, array: np.ndarray) -> None:
        """Take in the numbers of an array."""
        flat = array.reshape(-1)
        for begin in range(0, flat.size, PIECE):
            self._add_piece(flat[begin : begin + PIECE].astype(np.float64))
        self.count += flat.size

    def _add_piece(self, numbers: np.ndarray) -> None:
        mantissa, exponent = np.frexp(np.where(np.isfinite(numbers), numbers, 0.0))
        squares = np.square(np.rint(np.ldexp(mantissa, BITS)))
        lowest = int(exponent.min())
        for at, total in enumerate(np.bincount(exponent - lowest, weights=squares)):
            self.sums[lowest + at - LOWEST] += int(total)

    @cached_property
    def root_mean(self) -> float:
        """The root of the mean square, of KEPT_BITS bits; 0 for no numbers."""
        scaled = enumerate(self.sums, LOWEST - BITS)
        total = sum(Fraction(4) ** exponent * number for exponent, number in scaled if number)
        mean = Fraction(total) / max(self.count, 1)
        return float(round_bits(np.float64(math.sqrt(mean)), np))


def find_root_mean_square(array: Any, xp: Any) -> Any:
    """The root of the mean square of an array of jax's, as `SquareSum` gives it to KEPT_BITS bits,
    but for rounding: a compiler adds in an order of its own.
    """
    wide = xp.abs(array.astype(wide_dtype(array.dtype)))
    wide = xp.where(xp.isfinite(wide), wide, 0)
    largest = wide.max(initial=0)
    # Divided by the largest one, no square is out of range.
    largest = xp.where(largest > 0, largest, 1)
    return round_bits(largest * xp.sqrt(xp.mean(xp.square(wide / largest))), xp)


def round_bits(number: Any, xp: Any) -> Any:
    """A number rounded to KEPT_BITS bits."""
    mantissa, exponent = xp.frexp(number)
    return xp.ldexp(xp.round(mantissa * 2**KEPT_BITS), exponent - KEPT_BITS)
