"""Tensors on disk read block by block, each block into the memory of the one before.

Memory that is allocated for every block costs more than reading from the page cache does: the
kernel clears each page before it gives it away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import numpy as np

from growkit.checkpoint.raw import open_span, read_into
from growkit.checkpoint.tensor import BLOCK, Tensor


class Reader:
    """Reads parts of one tensor. A part holds until the next one is read.

    A context manager: the file of raw bytes is opened once. Raises GrowkitError, on entering, for a
    file that is not as it was, and in reading for one that is too short.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._buffer = np.empty(0, np.uint8)
        self._files = ExitStack()

    def __enter__(self) -> Self:
        if self.tensor.span is not None:
            self._file = self._files.enter_context(open_span(self.tensor.span))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()

    def read(self, start: int, stop: int) -> np.ndarray:
        """The numbers [start, stop) of the flattened tensor, in C order."""
        span = self.tensor.span
        if span is None:
            return self.tensor.read_numbers(start, stop)
        width = self.tensor.dtype.itemsize
        size = (stop - start) * width
        if size > len(self._buffer):
            self._buffer = np.empty(size, np.uint8)
        part = self._buffer[:size]
        offset = span.offset + start * width
        read_into(self._file, part.data, offset, span.path)
        if span.passing:
            span.passing.see(part.data, offset)
        return part.view(self.tensor.dtype)


def split_numbers(tensors: Sequence[Tensor], limit: int = BLOCK) -> Iterator[tuple[int, int]]:
    """(first, last) numbers, last exclusive, of blocks of tensors of one shape.

    A block of none of them is larger than `limit` bytes, but for tensors that are not raw bytes: of
    those it is whole rows, and whole stored chunks, so that no chunk is decoded twice.
    """
    shape = tensors[0].shape
    if all(tensor.span is not None for tensor in tensors):
        total = math.prod(shape)
        step = limit // max(tensor.dtype.itemsize for tensor in tensors)
        for start in range(0, total, step):
            yield start, min(start + step, total)
        return
    coarsest = max(tensors, key=lambda tensor: tensor.stride)
    row = math.prod(shape[1:])
    for first, last in coarsest.split_rows(limit):
        yield first * row, last * row
