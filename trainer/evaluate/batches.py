"""Which texts a model reads together: sorted by length, padded on the right to a few lengths.

Attention is causal, so no token reads the padding after its text, and a text scores the same in
any batch. Few lengths and heights, because each pair of them is a program to compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# The shortest padded length, in tokens.
SHORTEST = 16
# Tokens of padding that cost more than another batch does. Below it a batch is filled up.
WASTE = 256


@dataclass(frozen=True)
class Batch:
    """Some texts, by their numbers, in an array of `height` rows of `time` tokens."""

    numbers: list[int]
    height: int
    time: int


def pad_length(length: int, window: int) -> int:
    """Round a length up to 16, 24, 32, 48, 64, ..., at most the window.

    The steps are the powers of two and one and a half of each.
    """
    size = SHORTEST
    while size < length:
        is_power_of_two = size & (size - 1) == 0
        size = size * 3 // 2 if is_power_of_two else size * 4 // 3
    return min(size, window)


def plan_batches(lengths: Sequence[int], window: int, size: int, shards: int) -> Iterator[Batch]:
    """Yield batches of texts of these lengths, the longest first.

    window: the longest length. size: rows of a batch, a multiple of `shards`; smaller batches are
    halves of it, halves of these, and so on down to one text for each shard.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    first = 0
    while first < len(order):
        time = pad_length(lengths[order[first]], window)
        numbers = order[first : first + size]
        padded = [pad_length(lengths[number], window) for number in numbers]
        # A text that would be padded to twice its own length or more waits for the next batch.
        near = [length for length in padded if 2 * length > time or time < WASTE]
        count, height = _select_height(len(near), time, size, shards)
        yield Batch(numbers[:count], height, time)
        first += count


def _select_height(count: int, time: int, size: int, shards: int) -> tuple[int, int]:
    """How many of `count` texts are read together, and in how many rows."""
    height = size
    while height % (2 * shards) == 0 and height // 2 >= count:
        height //= 2
    is_wasteful = (height - count) * time > WASTE
    if is_wasteful and height % (2 * shards) == 0:
        # Half the rows, all full; the other texts wait for the next batch.
        height //= 2
    return min(count, height), height
