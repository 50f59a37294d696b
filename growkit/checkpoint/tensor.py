"""What a model is while it lies on disk: named tensors, read when asked for, and recipes for new ones.

To surgery, a Hugging Face directory and a trainer checkpoint are the same thing: a `Source` of named
tensors, one a layer, in up to three slots (params, mu, nu). A `Recipe` says how to make the bytes of a new
tensor, a piece at a time; `Contents` is everything an output holds. Knows no file format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from growkit.errors import GrowkitError
from growkit.models import read_config
from growkit.models.architecture import Architecture
from growkit.models.notation import Row

SLOTS = ("params", "mu", "nu")
SAMPLE = 4096
# Bytes of a tensor that are made at once: small enough for the processor's cache, large enough for the disk.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Span:
    """Raw bytes in C order: `size` of them at `offset` of a file."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Tensor:
    """A tensor on disk, read whole or by rows of its first dimension.

    rows: gives the rows from one to another (exclusive). span is None where the bytes are not raw (sharded,
    compressed). stride: how many rows are stored as one, so that reading fewer costs as much.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]
    span: Span | None = None
    stride: int = 1

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """All of it. A tensor without dimensions is one row."""
        return self.rows(0, self.shape[0] if self.shape else 1)

    def read_numbers(self, start: int, stop: int) -> np.ndarray:
        """The numbers from one place to another (exclusive), in C order."""
        row = math.prod(self.shape[1:])
        first, last = start // max(1, row), -(-stop // max(1, row))
        return self.rows(first, last).reshape(-1)[start - first * row : stop - first * row]

    def split_rows(self, limit: int) -> Iterator[tuple[int, int]]:
        """(first, last) rows of blocks of about `limit` bytes, at the borders that are stored where there are any."""
        count = self.shape[0] if self.shape else 1
        step = max(1, limit * count // max(1, self.size))
        step = max(self.stride, step - step % self.stride)
        yield from ((start, min(start + step, count)) for start in range(0, count, step))


def wrap_array(array: np.ndarray) -> Tensor:
    """An array as a tensor."""
    return Tensor(
        array.shape, array.dtype, lambda start, stop: array[start:stop] if array.ndim else array
    )


@dataclass(frozen=True)
class Recipe:
    """How to make a new tensor: a copy of raw bytes, or pieces (byte offset, array), or neither: all zeros."""

    shape: tuple[int, ...]
    dtype: np.dtype
    copied: Span | None = None
    pieces: Callable[[], Iterator[tuple[int, np.ndarray]]] | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def make_array(self) -> np.ndarray:
        """The whole tensor, made in memory."""
        array = np.empty(math.prod(self.shape), self.dtype)
        for start, block in self.make_blocks():
            array[start : start + block.size] = block
        return array.reshape(self.shape)

    def make_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(place of the first, numbers) of flat blocks that make up the tensor, in any order."""
        width = self.dtype.itemsize
        if self.pieces is not None:
            yield from ((offset // width, piece.reshape(-1)) for offset, piece in self.pieces())
            return
        count, step = math.prod(self.shape), BLOCK // width
        for start in range(0, count, step):
            size = min(step, count - start)
            if self.copied is None:
                yield start, np.zeros(size, self.dtype)
            else:
                part = Span(self.copied.path, self.copied.offset + start * width, size * width)
                yield start, read_span(part, (size,), self.dtype)


def copy_tensor(tensor: Tensor) -> Recipe:
    """The recipe for the same bytes again, undecoded where the source has them raw."""
    if tensor.span is not None:
        return Recipe(tensor.shape, tensor.dtype, copied=tensor.span)
    return map_tensors([tensor], tensor.dtype, lambda array: array)


def map_tensors(tensors: Sequence[Tensor], dtype: np.dtype, change: Callable[..., np.ndarray]) -> Recipe:
    """The recipe for what `change` makes, number by number, of tensors of one shape, a block at a time."""
    first = tensors[0]

    def pieces() -> Iterator[tuple[int, np.ndarray]]:
        row = math.prod(first.shape[1:]) * dtype.itemsize
        for start, stop in first.split_rows(BLOCK):
            yield start * row, change(*(tensor.rows(start, stop) for tensor in tensors))

    return Recipe(first.shape, dtype, pieces=pieces)


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> Recipe:
    """The recipe for a tensor of zeros, which no byte needs to be written for."""
    return Recipe(shape, np.dtype(dtype))


@dataclass(frozen=True)
class Contents:
    """All that an output holds: what the model is, its tensors by slot and name, and what lies beside them.

    record: the trainer's position (step, tokens, ...), empty where there is none.
    """

    config: dict[str, Any]
    recipes: dict[str, dict[str, Recipe]]
    lineage: list[dict[str, Any]]
    record: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(recipe.size for slot in self.recipes.values() for recipe in slot.values())


@dataclass
class Source:
    """A model on disk, opened for reading: nothing but headers is in memory.

    path: what it is called, which may be in a bucket; here: the directory on this machine that holds its files.
    tensors: slot -> name in files -> Tensor, one a layer. weights: every file that holds tensor bytes.
    read_files: gives the small files beside the weights (tokenizer and the like), by name.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    weights: list[Path]
    lineage: list[dict[str, Any]]
    record: dict[str, Any]
    read_files: Callable[[], dict[str, bytes]]
    stamps: dict[Path, tuple[int, int]] = field(init=False)
    here: Path = field(init=False)

    def __post_init__(self):
        if not isinstance(self.lineage, list):
            raise GrowkitError(f"{self.path}: the lineage is not a list of entries")
        for slot, tensors in self.tensors.items():
            kept = {name: t for name, t in tensors.items() if not name.endswith(self.model.buffers)}
            if self.model.tied:
                kept.pop(self.model.head_name, None)
            shapes = {name: tensor.shape for name, tensor in kept.items()}
            try:
                self.model.table.check_covered(shapes, self.model.sizes, self.model.fields)
            except GrowkitError as problem:
                raise GrowkitError(
                    f"{self.path}: {'' if slot == 'params' else slot + ': '}{problem}"
                ) from None
            self.tensors[slot] = kept
        self.here = self.path
        self.stamps = {path: _stamp(path) for path in self.weights}

    @cached_property
    def model(self) -> Architecture:
        try:
            return read_config(self.config)
        except GrowkitError as problem:
            raise type(problem)(f"{self.path}: {problem}") from None

    @cached_property
    def files(self) -> dict[str, bytes]:
        return self.read_files()

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the parameters (the first one's where they differ)."""
        return next(iter(self.tensors["params"].values())).dtype

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for slot in self.tensors.values() for tensor in slot.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the configuration and, of every tensor, its name, dtype, shape and three samples of 4 KiB.

        Identifies a model at the cost of opening it; `verify`, which compares every byte, is the full check.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for slot, tensors in sorted(self.tensors.items()):
            for name, tensor in sorted(tensors.items()):
                digest.update(f"{slot} {name} {tensor.dtype} {tensor.shape}".encode())
                digest.update(read_sample(tensor))
        return digest.hexdigest()

    def stack(self, slot: str = "params", dtype: Any = None) -> dict[str, Any]:
        """A slot as the trainer's tree: nested dicts of numpy arrays, layers stacked first.

        dtype: what to convert to, or None for the source's own (the widest where layers differ).
        One copy of the slot is in memory.
        """

        def stack_row(row: Row) -> np.ndarray:
            names = [row.name_at(position) for position in row.positions(self.model.sizes)]
            tensors = [self.tensors[slot][name] for name in names]
            target = dtype or np.result_type(*(tensor.dtype for tensor in tensors))
            array = np.empty((len(tensors), *tensors[0].shape), target)
            for place, tensor in enumerate(tensors):
                array[place] = tensor.read()
            return array.reshape(row.stacked_shape(self.model.sizes))

        return self.model.table.tree(stack_row)

    def check_unchanged(self) -> None:
        """Raise GrowkitError when a file of the source was written to since it was opened."""
        for path, stamp in self.stamps.items():
            if _stamp(path) != stamp:
                raise GrowkitError(
                    f"the source changed while it was being read: {path}; run the command again"
                )


def read_sample(tensor: Tensor) -> bytes:
    """The first, middle and last 4 KiB of a raw tensor's bytes; all of one that is not raw."""
    span = tensor.span
    if span is None:
        return tensor.read().tobytes()
    with open(span.path, "rb") as file:
        starts = (0, max(0, span.size // 2 - SAMPLE // 2), max(0, span.size - SAMPLE))
        return b"".join(
            os.pread(file.fileno(), min(SAMPLE, span.size), span.offset + start) for start in starts
        )


def read_span(span: Span, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array at a span, in memory of its own."""
    array = np.empty(shape, dtype)
    buffer = memoryview(array.reshape(-1).view(np.uint8))
    file = os.open(span.path, os.O_RDONLY)
    try:
        done = 0
        while done < span.size:
            count = os.preadv(file, [buffer[done:]], span.offset + done)
            if count == 0:
                raise GrowkitError(f"{span.path} ends before the tensor at byte {span.offset} does")
            done += count
    finally:
        os.close(file)
    return array


def open_raw(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """The tensor whose bytes lie raw at `offset` of a file."""
    span = Span(path, offset, math.prod(shape) * dtype.itemsize)
    row = math.prod(shape[1:])

    def rows(start: int, stop: int) -> np.ndarray:
        size = (stop - start) * row * dtype.itemsize
        part = Span(path, offset + start * row * dtype.itemsize, size)
        return read_span(part, (stop - start, *shape[1:]) if shape else (), dtype)

    return Tensor(tuple(shape), dtype, rows, span)


def _stamp(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
