"""Tensors read block by block into one buffer, and work that a few threads share."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from growkit.checkpoint import raw, tensor
from growkit.checkpoint.abreast import AHEAD, map_abreast
from growkit.checkpoint.raw import Passing
from growkit.checkpoint.reading import Reader, split_numbers


@pytest.fixture
def stored(tmp_path):
    """A file with 8 bytes before the numbers 0 to 29."""
    numbers = np.arange(30, dtype=np.float32).reshape(5, 6)
    path = tmp_path / "numbers"
    path.write_bytes(b"\1" * 8 + numbers.tobytes())
    return tensor.open_raw(path, 8, (5, 6), numbers.dtype), numbers.reshape(-1)


def test_parts_are_read_into_one_buffer(stored, monkeypatch):
    source, numbers = stored
    opened = []

    def count(path):
        opened.append(path)
        return open_regular(path)

    open_regular = raw.open_regular
    monkeypatch.setattr(raw, "open_regular", count)
    with Reader(source) as reader:
        first = reader.read(3, 9)
        assert np.array_equal(first, numbers[3:9])
        second = reader.read(20, 24)
        assert np.array_equal(second, numbers[20:24]) and np.shares_memory(first, second)
        assert np.array_equal(reader.read(0, 30), numbers)
    assert len(opened) == 1
    with Reader(tensor.wrap_array(numbers.reshape(5, 6))) as reader:
        assert np.array_equal(reader.read(3, 9), numbers[3:9])
    assert len(opened) == 1


def test_what_is_read_in_order_is_hashed(stored):
    source, numbers = stored
    passing = Passing(8, source.size, "xxh3_64")
    hashed = tensor.open_raw(source.span.path, 8, (5, 6), source.dtype, None, passing)
    assert not passing.was_read
    with Reader(hashed) as reader:
        for start, stop in split_numbers([hashed], 64):
            reader.read(start, stop)
    assert passing.was_read and passing.hashed == source.size


def test_blocks_are_of_numbers_or_of_whole_chunks(stored):
    source, numbers = stored
    assert list(split_numbers([source], 48)) == [(0, 12), (12, 24), (24, 30)]
    chunked = tensor.Tensor((5, 6), source.dtype, lambda a, b: numbers.reshape(5, 6)[a:b], stride=2)
    assert list(split_numbers([source, chunked], 4)) == [(0, 12), (12, 24), (24, 30)]
    empty = tensor.wrap_array(np.zeros((0, 3), np.float32))
    assert list(split_numbers([empty])) == []
    assert list(split_numbers([tensor.wrap_array(np.zeros((), np.float32))])) == [(0, 1)]


def test_results_come_in_order_and_few_wait():
    begun = []
    go_on = threading.Event()

    def work(number):
        begun.append(number)
        if number == 0:
            go_on.wait(10)
        return number * 10

    things = iter(range(1000))
    results = map_abreast(work, things)
    threading.Timer(0.05, go_on.set).start()
    assert next(results) == 0
    assert max(begun) < AHEAD and next(things) == AHEAD
    assert list(results) == [number * 10 for number in range(1, 1000) if number != AHEAD]


def test_work_that_fails_ends_the_rest():
    done = []

    def work(number):
        if number == 3:
            raise ValueError(number)
        done.append(number)
        return number

    results = map_abreast(work, range(10_000))
    with pytest.raises(ValueError, match="3"):
        list(results)
    assert len(done) < 2 * AHEAD
    results = map_abreast(done.append, range(10_000))
    next(results)
    results.close()
    assert len(done) < 4 * AHEAD
