"""Batches: windows mixed by weight and shuffled, as a function of how many were drawn before.

The batch at any point of a run depends on the seed and on the number of sequences drawn so far, and
on nothing else. So a run resumes anywhere, with another batch size or number of hosts too. grain
shuffles each data set and interleaves the data sets.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from growkit.errors import UsageError
from trainer.data.windows import AnyWindows

# Importing it takes a fifth of a second, which passes while the first step is compiled: grain is
# imported when the first batch is drawn.
if TYPE_CHECKING:
    import grain

_SPAN = 1 << 44  # more sequences than are ever drawn from one data set


@dataclass(frozen=True)
class DataSet:
    """Windows to draw from, by a name, with a weight in any unit."""

    name: str
    weight: float
    windows: AnyWindows


@dataclass(frozen=True)
class Mixture:
    """Data sets to draw from in proportion to their weights.

    Raises UsageError when there are none, when a weight is not positive, when a name or the same
    windows come twice, when a data set has no windows, or when contexts differ.
    """

    parts: tuple[DataSet, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("a mixture needs at least one data set")
        for part in self.parts:
            self._check_part(part)
        self._check_repeats()

    def _check_part(self, part: DataSet) -> None:
        if not 0 < part.weight < math.inf:
            raise UsageError(
                f"the weight of {part.name} must be a positive number, not {part.weight}"
            )
        if not len(part.windows):
            raise UsageError(f"{part.name} has no windows to draw from")
        if part.windows.context != self.context:
            raise UsageError(
                f"{part.name} has context {part.windows.context}, and others {self.context}; "
                f"use one"
            )

    def _check_repeats(self) -> None:
        seen: dict[object, str] = {}
        for part in self.parts:
            for key in (part.name, part.windows.identity):
                if key in seen:
                    raise UsageError(
                        f"{part.name} and {seen[key]} are the same data set; give it once"
                    )
                seen[key] = part.name

    @property
    def context(self) -> int:
        """Tokens that a window predicts."""
        return self.parts[0].windows.context

    @cached_property
    def shares(self) -> dict[str, float]:
        """The fraction of all sequences that comes from each data set, by name."""
        total = math.fsum(part.weight for part in self.parts)
        return {part.name: part.weight / total for part in self.parts}


class Stream:
    """The endless sequence of windows that a seed makes of a mixture, to be read from any point on.

    Each data set is shuffled anew for each of its epochs. grain interleaves data sets in small
    whole-number proportions, so the realised shares can differ from the requested ones by up to one
    percent of themselves. Neither the data sets' names nor their order in the mixture change what
    is drawn.
    """

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self.mixture = mixture
        self.seed = seed
        self._parts = sorted(mixture.parts, key=lambda part: part.windows.identity)
        self._weights = [part.weight for part in self._parts]

    @cached_property
    def _drawn(self) -> grain.MapDataset:
        """The windows in the order in which they are drawn."""
        import grain

        endless = [self._repeat_shuffled(part.windows) for part in self._parts]
        return grain.MapDataset.mix(endless, self._weights)

    @cached_property
    def _turns(self) -> grain.MapDataset:
        """The same interleaving, of plain numbers: number // _SPAN is the data set that is drawn
        from, number % _SPAN how often it was drawn from before.
        """
        import grain

        starts = range(0, len(self._weights) * _SPAN, _SPAN)
        ranges = [grain.MapDataset.range(start, start + _SPAN) for start in starts]
        return grain.MapDataset.mix(ranges, self._weights)

    def _repeat_shuffled(self, windows: AnyWindows) -> grain.MapDataset:
        """One data set, shuffled and repeated. Its seed does not depend on the other data sets."""
        import grain

        key = json.dumps([self.seed, *windows.identity])
        digest = hashlib.sha256(key.encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        return grain.MapDataset.source(windows).seed(seed).shuffle().repeat()

    def batch(self, drawn: int, count: int) -> np.ndarray:
        """The next `count` windows after `drawn` have been drawn, int32 [count, context + 1].

        A pure function of its arguments: when each host draws its part of a batch, the parts make
        up the batch that one host would draw.
        """
        return np.stack([self._drawn[number] for number in range(drawn, drawn + count)])

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of seed, context, data and shares: equal when streams draw the same."""
        shares = self.mixture.shares
        parts = [(*part.windows.identity, shares[part.name]) for part in self._parts]
        key = json.dumps([self.seed, self.mixture.context, parts])
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def counts(self, drawn: int) -> dict[str, int]:
        """How many of the first `drawn` sequences were drawn from each data set, by name."""
        found: dict[int, int] = {}
        # The last turn of each data set says how many it had. A data set with share s had its last
        # turn within about 1 / s sequences, so only a few are looked at, counted from the end.
        for number in reversed(range(drawn)):
            part, before = divmod(int(self._turns[number]), _SPAN)
            found.setdefault(part, before + 1)
            if len(found) == len(self._parts):
                break
        counts = {part.name: found.get(number, 0) for number, part in enumerate(self._parts)}
        return {part.name: counts[part.name] for part in self.mixture.parts}

    def epochs(self, drawn: int) -> dict[str, float]:
        """How many epochs of each data set are in the first `drawn` sequences, by name."""
        counts = self.counts(drawn)
        return {part.name: counts[part.name] / len(part.windows) for part in self.mixture.parts}


def validation_batches(
    windows: Sequence[AnyWindows], batch_size: int, limit: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Fixed batches for validation: tokens int32 [batch_size, context + 1], mask bool [batch_size].

    Takes the first window of each data set, then the second of each, and so on, `limit` of them in
    all (None: every window). The last batch is filled up with zeros, whose mask is False.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UsageError(
            f"validation needs a positive batch size and limit, not {batch_size} and {limit}"
        )
    selected = itertools.islice(_take_in_turn(windows), limit)
    while rows := list(itertools.islice(selected, batch_size)):
        tokens = np.zeros((batch_size, len(rows[0])), np.int32)
        tokens[: len(rows)] = rows
        mask = np.arange(batch_size) < len(rows)
        yield tokens, mask


def count_in_turn(windows: Sequence[AnyWindows], limit: int) -> list[int]:
    """How many windows of each data set are among the first `limit` that `_take_in_turn` gives."""
    counts = [0] * len(windows)
    left = min(limit, sum(len(each) for each in windows))
    while left:
        for number, each in enumerate(windows):
            if left and counts[number] < len(each):
                counts[number] += 1
                left -= 1
    return counts


def _take_in_turn(windows: Sequence[AnyWindows]) -> Iterator[np.ndarray]:
    """All windows, the first of each data set first; data sets that are used up are passed over."""
    longest = max((len(each) for each in windows), default=0)
    for number in range(longest):
        for each in windows:
            if number < len(each):
                yield each[number]
