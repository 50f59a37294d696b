"""Batches: windows of token files, mixed by weight and shuffled, as a function of how many were drawn.

Knows how a token file is cut into windows, which windows are held out for validation, and which windows make
up the batch at a given point of a run: that depends on the seed and the count of sequences drawn so far, and
on nothing else, so that a run resumes anywhere, with another batch size too. The order within a data set and
the interleaving of data sets are grain's. Leaves the files to `trainer.data.tokens`, and devices to the training
loop.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import grain
import numpy as np

from growkit.errors import UsageError
from trainer.data.tokens import TokenFile

_TOKENS_AT_ONCE = 1 << 24
_SPAN = 1 << 44  # more sequences than are ever drawn from one data set


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows `start` to `stop` (exclusive) of a token file, a sequence of int32 arrays [context + 1].

    Window i of the file is tokens i * context to i * context + context, both included: inputs and targets
    are `context` tokens each, and neighbours share one token, so that every token but the very first is
    predicted exactly once.
    """

    token_file: TokenFile
    context: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        first = (self.start + number) * self.context
        return self.token_file.tokens[first : first + self.context + 1].astype(np.int32)

    @property
    def identity(self) -> tuple[str, int, int, int]:
        """What these windows are, whatever the file is called: data fingerprint, context, start, stop."""
        return self.token_file.fingerprint, self.context, self.start, self.stop

    def take_fraction(self, fraction: float) -> Windows:
        """The first windows, a fraction in (0, 1] of them and at least one."""
        return replace(self, stop=self.start + max(1, round(fraction * len(self))))


@dataclass(frozen=True, eq=False)
class Joined:
    """The windows of several token files, one after the other, as one data set: the shards of a tokenization."""

    parts: tuple[Windows, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        part = bisect.bisect_right(self._ends, number)
        return self.parts[part][number - (self._ends[part - 1] if part else 0)]

    @property
    def context(self) -> int:
        """Tokens that a window predicts."""
        return self.parts[0].context

    @cached_property
    def identity(self) -> tuple[str, int, int, int]:
        """What these windows are, as `Windows.identity`: a digest of their parts' in place of one fingerprint."""
        digest = hashlib.sha256(
            json.dumps([part.identity for part in self.parts]).encode()
        ).hexdigest()
        return digest[:16], self.context, 0, len(self)


def join_windows(parts: Sequence[Windows]) -> Windows | Joined:
    """Windows of one file or several as one data set."""
    return parts[0] if len(parts) == 1 else Joined(tuple(parts))


def split_windows(token_file: TokenFile, context: int, held_out: float) -> tuple[Windows, Windows]:
    """The windows to train on, and the held-out windows to validate on.

    Held out are the last `held_out` (a fraction, at most one half) of the windows, at least one. Raises
    UsageError when the text is too short for one window of each kind.
    """
    if context < 1:
        raise UsageError(f"the context must be at least 1 token, not {context}")
    if not 0 <= held_out <= 0.5:
        raise UsageError(f"the held-out fraction must lie between 0 and 0.5, not {held_out}")
    count = (len(token_file) - 1) // context
    if count < 2:
        raise UsageError(_too_short(token_file, context))
    boundary = count - max(1, round(count * held_out))
    return Windows(token_file, context, 0, boundary), Windows(token_file, context, boundary, count)


def _too_short(token_file: TokenFile, context: int) -> str:
    tokens, largest = len(token_file), (len(token_file) - 1) // 2
    advice = (
        f"the largest context that would work is {largest}"
        if largest
        else "no context is that short"
    )
    return (
        f"{token_file.name} has {tokens} tokens, too few for one window to train on and one held out at "
        f"context {context}; {advice}"
    )


def check_vocabulary(token_file: TokenFile, vocab_size: int) -> None:
    """Raise UsageError unless the model's vocabulary of `vocab_size` ids holds every id of the data.

    Asks the manifest for the tokenizer's vocabulary; without one it reads the whole token stream.
    """
    if token_file.manifest is not None:
        lowest, highest = 0, token_file.manifest["vocab_size"] - 1
    else:
        lowest, highest = _range(token_file.tokens)
    if lowest < 0:
        raise UsageError(
            f"{token_file.name} has the negative id {lowest}, which no vocabulary holds"
        )
    if highest >= vocab_size:
        raise UsageError(
            f"{token_file.name} comes from a tokenizer whose ids exceed the vocabulary: ids up to {highest} "
            f"need a vocabulary of {highest + 1}, and the model has {vocab_size}"
        )


def _range(tokens: np.ndarray) -> tuple[int, int]:
    """The lowest and the highest id, read in bounded memory."""
    parts = [tokens[i : i + _TOKENS_AT_ONCE] for i in range(0, len(tokens), _TOKENS_AT_ONCE)]
    return min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)


@dataclass(frozen=True)
class Mixture:
    """Data sets to draw from: (name, weight, windows) each, the weights in any unit.

    Raises UsageError when there are none, when a weight is not positive, when a name or the same windows come
    twice, when a data set has no windows, or when contexts differ.
    """

    parts: tuple[tuple[str, float, Windows | Joined], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("a mixture needs at least one data set")
        for name, weight, windows in self.parts:
            if not 0 < weight < float("inf"):
                raise UsageError(f"the weight of {name} must be a positive number, not {weight}")
            if not len(windows):
                raise UsageError(f"{name} has no windows to draw from")
            if windows.context != self.context:
                raise UsageError(
                    f"{name} has context {windows.context}, and others {self.context}; use one"
                )
        self._refuse_repeats()

    def _refuse_repeats(self) -> None:
        seen: dict[object, str] = {}
        for name, _, windows in self.parts:
            for key in (name, windows.identity):
                if key in seen:
                    raise UsageError(f"{name} and {seen[key]} are the same data set; give it once")
                seen[key] = name

    @property
    def context(self) -> int:
        """Tokens that a window predicts."""
        return self.parts[0][2].context

    @cached_property
    def shares(self) -> dict[str, float]:
        """The fraction of all sequences that comes from each data set, by name."""
        total = math.fsum(weight for _, weight, _ in self.parts)
        return {name: weight / total for name, weight, _ in self.parts}


class Stream:
    """The endless sequence of windows that a seed makes of a mixture, open at any point.

    Each data set is shuffled anew every time it has been gone through. grain interleaves data sets in small
    whole-number proportions, so that realised shares can differ from the asked ones by up to one percent of
    themselves. Neither the data sets' names nor their order in the mixture change what is drawn.
    """

    def __init__(self, mixture: Mixture, seed: int):
        self.mixture = mixture
        self.seed = seed
        self._parts = sorted(mixture.parts, key=lambda part: part[2].identity)
        weights = [weight for _, weight, _ in self._parts]
        self._drawn = grain.MapDataset.mix(
            [self._endless(windows) for _, _, windows in self._parts], weights
        )
        # The same interleaving of plain numbers: which data set is drawn from, and how often it was before.
        ranges = [
            grain.MapDataset.range(part * _SPAN, (part + 1) * _SPAN) for part in range(len(weights))
        ]
        self._turns = grain.MapDataset.mix(ranges, weights)

    def _endless(self, windows: Windows | Joined) -> grain.MapDataset:
        """One data set, shuffled and repeated, with a seed of its own that does not depend on the others."""
        digest = hashlib.sha256(json.dumps([self.seed, *windows.identity]).encode()).digest()
        return (
            grain.MapDataset.source(windows)
            .seed(int.from_bytes(digest[:4], "big"))
            .shuffle()
            .repeat()
        )

    def batch(self, drawn: int, count: int) -> np.ndarray:
        """The next `count` windows after `drawn` have been drawn, int32 [count, context + 1].

        A pure function of its arguments: several hosts each draw a part, and the parts are the batch of one.
        """
        return np.stack([self._drawn[number] for number in range(drawn, drawn + count)])

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that two streams share when they draw the same: of seed, context, data and shares."""
        shares = self.mixture.shares
        parts = [(*windows.identity, shares[name]) for name, _, windows in self._parts]
        return hashlib.sha256(
            json.dumps([self.seed, self.mixture.context, parts]).encode()
        ).hexdigest()[:16]

    def counts(self, drawn: int) -> dict[str, int]:
        """How many of the first `drawn` sequences came from each data set, by name: counted, not asked for."""
        found: dict[int, int] = {}
        # The last turn of each data set says how many there were; a part of weight w had it within some 1 / w turns.
        for number in range(drawn - 1, -1, -1):
            part, before = divmod(int(self._turns[number]), _SPAN)
            found.setdefault(part, before + 1)
            if len(found) == len(self._parts):
                break
        counts = {name: found.get(part, 0) for part, (name, _, _) in enumerate(self._parts)}
        return {name: counts[name] for name, _, _ in self.mixture.parts}

    def epochs(self, drawn: int) -> dict[str, float]:
        """How often each data set has been gone through after `drawn` sequences, by name."""
        counts = self.counts(drawn)
        return {name: counts[name] / len(windows) for name, _, windows in self.mixture.parts}


def validation_batches(
    windows: Sequence[Windows | Joined], batch_size: int, limit: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Fixed batches for validation: tokens int32 [batch_size, context + 1] and a mask bool [batch_size].

    Takes the first windows of each data set in turn, `limit` of them overall (None: all). The last batch is
    filled up with zeros, whose mask is False.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UsageError(
            f"validation needs a positive batch size and limit, not {batch_size} and {limit}"
        )
    chosen = itertools.islice(_in_turn(windows), limit)
    while rows := list(itertools.islice(chosen, batch_size)):
        tokens = np.zeros((batch_size, len(rows[0])), np.int32)
        tokens[: len(rows)] = rows
        yield tokens, np.arange(batch_size) < len(rows)


def _in_turn(windows: Sequence[Windows | Joined]) -> Iterator[np.ndarray]:
    for number in range(max(map(len, windows), default=0)):
        yield from (each[number] for each in windows if number < len(each))
