"""A model on disk: named tensors that are read on request, and recipes for new tensors.

A Hugging Face directory and a trainer checkpoint look the same from here: a `Source` of named
tensors, one for each layer, in up to four slots (params, mu, nu, nu_max). A `Recipe` says how to
make the bytes of a new tensor block by block, so that no model is ever whole in memory. `Contents`
is everything an output holds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from growkit.checkpoint.hashes import Hashed
from growkit.checkpoint.raw import (
    Passing,
    Span,
    Stamp,
    read_pieces,
    read_span,
    read_stamp,
    say_changed,
)
from growkit.checkpoint.sample import read_sample
from growkit.errors import GrowkitError
from growkit.models import read_config
from growkit.models.architecture import Architecture
from growkit.models.notation import Row

if TYPE_CHECKING:
    from growkit.checkpoint.around import Around
    from growkit.checkpoint.dcp_layout import Distributed
    from growkit.checkpoint.optimizer import Optimizer

SLOTS = ("params", "mu", "nu", "nu_max")
# Tensors of one kind that a configuration may ask for beyond what files hold, before it is refused
# without counting which are missing.
MOST_MISSING = 100_000
# Bytes made at once: small enough for the processor's cache, large enough for the disk.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """A tensor on disk, read whole or by rows of its first dimension.

    rows: reads the rows [start, stop). span: the raw bytes, or None if they are sharded, compressed
    or computed. stride: how many rows are stored together, so that reading fewer costs as much.
    sampled: whether the fingerprint takes samples of it though it has no span.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]
    span: Span | None = None
    stride: int = 1
    sampled: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_count(self) -> int:
        """Rows of the first dimension; a tensor without dimensions is one row."""
        return self.shape[0] if self.shape else 1

    def read(self) -> np.ndarray:
        """The whole tensor."""
        return self.rows(0, self.row_count)

    def read_numbers(self, start: int, stop: int) -> np.ndarray:
        """The numbers [start, stop) of the flattened tensor, in C order."""
        row = max(1, math.prod(self.shape[1:]))
        first = start // row
        # Rounded up: the row in which the last number lies is read too.
        last = -(-stop // row)
        numbers = self.rows(first, last).reshape(-1)
        return numbers[start - first * row : stop - first * row]

    def read_bytes(self) -> Iterator[memoryview]:
        """The bytes in C order, a block at a time."""
        for start, stop in self.split_rows(BLOCK):
            block = np.ascontiguousarray(self.rows(start, stop)).reshape(-1)
            yield block.view(np.uint8).data

    def split_rows(self, limit: int) -> Iterator[tuple[int, int]]:
        """(first, last) rows, last exclusive, of blocks of about `limit` bytes.

        Blocks begin where a stored chunk begins, if the tensor is stored in chunks.
        """
        count = self.row_count
        step = max(1, limit * count // max(1, self.size))
        # Whole chunks only: a chunk is decoded whole, so half a chunk would be decoded twice.
        step = max(self.stride, step - step % self.stride)
        for start in range(0, count, step):
            yield start, min(start + step, count)


def wrap_array(array: np.ndarray) -> Tensor:
    """An array in memory as a tensor."""

    def rows(start: int, stop: int) -> np.ndarray:
        return array[start:stop] if array.ndim else array

    return Tensor(array.shape, array.dtype, rows)


@dataclass(frozen=True)
class Recipe:
    """How to make a new tensor: copy raw bytes, or make pieces, or (with neither) write zeros.

    pieces: yields (byte offset, array) until the tensor is complete, in any order. An array holds
    until the next.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    copied: Span | None = None
    pieces: Callable[[], Iterator[tuple[int, np.ndarray]]] | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_zeros(self) -> bool:
        """Whether nothing has to be written, because new files hold zeros."""
        return self.copied is None and self.pieces is None

    def make_array(self) -> np.ndarray:
        """The whole tensor, in memory."""
        array = np.empty(math.prod(self.shape), self.dtype)
        for start, block in self.make_blocks():
            array[start : start + block.size] = block
        return array.reshape(self.shape)

    def make_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the first number, flat block) of every block of the tensor, in any order.

        A block holds until the next.
        """
        width = self.dtype.itemsize
        if self.pieces is not None:
            for offset, piece in self.pieces():
                yield offset // width, piece.reshape(-1)
            return
        # A whole number of numbers of any dtype.
        buffer = np.zeros(min(BLOCK, self.size) or 1, np.uint8)
        if self.copied is not None:
            for offset, block in read_pieces(self.copied, buffer):
                yield offset // width, block.view(self.dtype)
            return
        for offset in range(0, self.size, BLOCK):
            yield offset // width, buffer[: self.size - offset].view(self.dtype)


def copy_tensor(tensor: Tensor) -> Recipe:
    """The recipe for the same bytes; raw bytes are copied without decoding them."""
    if tensor.span is not None:
        return Recipe(tensor.shape, tensor.dtype, copied=tensor.span)
    return map_tensors([tensor], tensor.dtype, lambda array: array)


def map_tensors(
    tensors: Sequence[Tensor], dtype: np.dtype, change: Callable[..., np.ndarray]
) -> Recipe:
    """The recipe for `change` applied elementwise to tensors of one shape, block by block."""
    first = tensors[0]

    def pieces() -> Iterator[tuple[int, np.ndarray]]:
        row_bytes = math.prod(first.shape[1:]) * dtype.itemsize
        for start, stop in first.split_rows(BLOCK):
            arrays = [tensor.rows(start, stop) for tensor in tensors]
            yield start * row_bytes, change(*arrays)

    return Recipe(first.shape, dtype, pieces=pieces)


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> Recipe:
    """The recipe for a tensor of zeros; nothing is written, because new files hold zeros."""
    return Recipe(shape, np.dtype(dtype))


@dataclass(frozen=True)
class Contents:
    """All that an output holds.

    config: the content of config.json. recipes: slot -> name in files -> recipe. lineage: one entry
    for each operation so far. record: the trainer's position (step, tokens, ...), or empty.
    files: small files beside the weights (tokenizer and the like), by name. torch_optimizer: the
    groups and steps of an optimizer of PyTorch, whose moments are among the recipes. around: what
    lies around a text decoder. distributed: how a distributed checkpoint is laid out.
    """

    config: dict[str, Any]
    recipes: dict[str, dict[str, Recipe]]
    lineage: list[dict[str, Any]]
    record: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    torch_optimizer: Optimizer | None = None
    around: Around | None = None
    distributed: Distributed | None = None

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        others = self.around.others if self.around else {}
        carried = sum(tensor.size for tensor in others.values())
        return carried + sum(r.size for slot in self.recipes.values() for r in slot.values())


@dataclass
class Source:
    """A model on disk, opened for reading; only headers are in memory.

    path: how the user calls it, which may be in a bucket. here: the directory on this machine that
    holds its files. tensors: slot -> name in files -> tensor, one for each layer. weights: every
    file that holds tensor bytes. read_files: reads the small files beside the weights, by name.
    notes: what a user should know of how the files were read, a sentence each. optimizer: what is
    there of an optimizer that growkit does not read. refusal: why nothing grows from it, where a
    file of an optimizer that growkit should read cannot grow. torch_optimizer: the groups and steps
    of an optimizer of PyTorch whose moments are among the tensors. hashed: hashes on record,
    compared by `require_whole`. around: what lies around a text decoder. distributed: how a
    distributed checkpoint is laid out. stamps: of each weight file when its header was read.

    Raises GrowkitError if the tensors are not exactly those that the configuration asks for.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    weights: list[Path]
    lineage: list[dict[str, Any]]
    record: dict[str, Any]
    read_files: Callable[[], dict[str, bytes]]
    # The model, where the tensors say more of it than the configuration does.
    known_model: Architecture | None = None
    notes: tuple[str, ...] = ()
    optimizer: str = ""
    refusal: str = ""
    torch_optimizer: Optimizer | None = None
    hashed: Hashed | None = None
    around: Around | None = None
    distributed: Distributed | None = None
    stamps: dict[Path, Stamp] = field(init=False)
    here: Path = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.lineage, list):
            raise GrowkitError(f"{self.path}: the lineage is not a list of entries")
        for slot, tensors in self.tensors.items():
            self._check_count(tensors)
            self._check_covered(slot, tensors)
        self.here = self.path
        self.stamps = {path: read_stamp(path) for path in self.weights}
        for tensors in self.tensors.values():
            spans = (tensor.span for tensor in tensors.values() if tensor.span)
            self.stamps |= {span.path: span.stamp for span in spans if span.stamp}

    def _check_count(self, tensors: dict[str, Tensor]) -> None:
        """Raise GrowkitError for a configuration of far more layers than there are tensors.

        Names are made one by one, so a number in a config.json must not say for how long.
        """
        model = self.known_model or read_model(self.config, self.path, self.lineage)
        for row in model.table.rows:
            count = math.prod(row.stacked_sizes(model.sizes))
            # A few missing tensors are named one by one; a million would be a wait and no message.
            if count > MOST_MISSING + len(tensors):
                axis = max(row.stacked, key=lambda axis: model.sizes[axis.name])
                raise GrowkitError(
                    f"{self.path}: the configuration says {model.fields[axis.name]} = "
                    f"{model.sizes[axis.name]:,}, and the files hold {len(tensors):,} tensors"
                )

    def _check_covered(self, slot: str, tensors: dict[str, Tensor]) -> None:
        """Raise GrowkitError unless names and shapes are those of the axis table."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        try:
            self.model.table.check_covered(shapes, self.model.sizes, self.model.fields)
        except GrowkitError as problem:
            where = "" if slot == "params" else f"{slot}: "
            raise GrowkitError(f"{self.path}: {where}{problem}") from None

    @cached_property
    def model(self) -> Architecture:
        """The model that the configuration describes."""
        model = self.known_model or read_model(self.config, self.path, self.lineage)
        shapes = {name: tensor.shape for name, tensor in self.tensors["params"].items()}
        return model.measure(shapes) if model.measured else model

    @cached_property
    def files(self) -> dict[str, bytes]:
        """The small files beside the weights, by name."""
        return self.read_files()

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the parameters (of the first one, where they differ)."""
        return next(iter(self.tensors["params"].values())).dtype

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for slot in self.tensors.values() for tensor in slot.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the configuration and, for each tensor, name, dtype, shape and 3 x 4 KiB.

        It identifies a model about as fast as opening it; the full check is `growkit verify`,
        which compares every byte.
        """
        # Sorted, so that the order of keys in config.json does not make another model.
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for slot, tensors in sorted(self.tensors.items()):
            for name, tensor in sorted(tensors.items()):
                digest.update(f"{slot} {name} {tensor.dtype} {tensor.shape}".encode())
                for part in read_sample(tensor):
                    digest.update(part)
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

    def require_readable(self) -> None:
        """Raise GrowkitError where the source has an optimizer that would be lost or wrong."""
        if self.refusal:
            raise GrowkitError(self.refusal)

    def check_unchanged(self) -> None:
        """Raise GrowkitError if a weight file was written to since the source was opened."""
        for path, stamp in self.stamps.items():
            if read_stamp(path) != stamp:
                raise say_changed(path)

    def require_whole(self, used: bool = False) -> None:
        """Raise GrowkitError if an array has another hash than the one on record.

        Reads what was not read before in the order of the file; after all was, nothing. used: of
        arrays of which nothing was read, nothing is read here either.
        """
        if self.hashed is None:
            return
        try:
            changed = self.hashed.find_changed(used=used)
        except GrowkitError as problem:
            raise GrowkitError(f"{self.path}: {problem}") from None
        words = self.hashed.find_other()
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            words = f"the bytes of {changed[0]!r}{more}"
        if words:
            raise GrowkitError(
                f"{self.path} is damaged: {words} are not those that were written (another hash "
                "than the one on record); take another checkpoint, or give --no-verify to use it "
                "as it is"
            )


def read_model(config: dict[str, Any], path: Path, lineage: Sequence[Any] = ()) -> Architecture:
    """The model that the configuration at `path` describes. Raises GrowkitError naming the path."""
    try:
        return read_config(config, lineage)
    except GrowkitError as problem:
        raise type(problem)(f"{path}: {problem}") from None


def open_raw(
    path: Path,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    stamp: Stamp | None = None,
    passing: Passing | None = None,
) -> Tensor:
    """The tensor whose raw bytes begin at `offset` of a file."""
    span = Span(path, offset, math.prod(shape) * dtype.itemsize, stamp, passing=passing)
    row_bytes = math.prod(shape[1:]) * dtype.itemsize

    def rows(start: int, stop: int) -> np.ndarray:
        part = span.part(start * row_bytes, (stop - start) * row_bytes)
        part_shape = (stop - start, *shape[1:]) if shape else ()
        return read_span(part, part_shape, dtype)

    return Tensor(tuple(shape), dtype, rows, span)
