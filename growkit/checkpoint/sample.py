"""Samples of a tensor's bytes, by which a model is known again without reading all of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from growkit.checkpoint.raw import open_span

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Tensor

# Bytes of each sample.
SAMPLE = 4096


def read_sample(tensor: Tensor) -> Iterable[bytes | memoryview]:
    """The first, middle and last 4 KiB of a raw tensor's bytes; all bytes of any other tensor."""
    span = tensor.span
    if span is None and not tensor.sampled:
        return tensor.read_bytes()
    # Three places, because one alone may be the same in two models: zeros, or a frozen part.
    middle = max(0, tensor.size // 2 - SAMPLE // 2)
    end = max(0, tensor.size - SAMPLE)
    size = min(SAMPLE, tensor.size)
    if span is None:
        return [_read_part(tensor, at, size) for at in (0, middle, end)]
    with open_span(span) as file:
        return [os.pread(file, size, span.offset + at) for at in (0, middle, end)]


def _read_part(tensor: Tensor, start: int, size: int) -> bytes:
    """`size` bytes of a tensor, from its byte `start`."""
    width = tensor.dtype.itemsize
    first = start // width
    numbers = tensor.read_numbers(first, -(-(start + size) // width))
    return numbers.tobytes()[start - first * width :][:size]
