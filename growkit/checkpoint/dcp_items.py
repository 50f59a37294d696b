"""What a distributed checkpoint holds under a key: a tensor in chunks, a number, an object.

Every chunk and every object is a file of torch.save within a `.distcp` file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint.carried import require_inside
from growkit.checkpoint.dcp_layout import Held
from growkit.checkpoint.dcp_metadata import DTYPES, Chunk, Entry
from growkit.checkpoint.files import open_regular
from growkit.checkpoint.kinds import METADATA
from growkit.checkpoint.optimizer import Scalar
from growkit.checkpoint.raw import Span, Stamp, read_stamp
from growkit.checkpoint.tensor import Tensor
from growkit.checkpoint.torch_pickle import Stored
from growkit.checkpoint.torch_zip import open_torch_file
from growkit.errors import GrowkitError

# Bytes of an object or a number at most that are read as one.
SMALL = 1 << 24


@dataclass
class Items:
    """The items of a checkpoint, as they are opened.

    stamps: of the files so far. values: objects and numbers by their bytes, which are the same for
    most parameters.
    """

    stamps: dict[Path, Stamp] = field(default_factory=dict)
    values: dict[bytes, Any] = field(default_factory=dict)

    def find_file(self, held: Held, chunk: Chunk) -> Path:
        """The file of a chunk. Raises GrowkitError if it is not there, lies elsewhere or is too
        short.
        """
        path = held.directory / chunk.file
        if path not in self.stamps:
            if not os.path.lexists(path):
                raise GrowkitError(
                    f"{held.directory / METADATA} names the file {chunk.file!r}, which is not there"
                )
            require_inside(held.directory, path)
            self.stamps[path] = read_stamp(path)
        size = self.stamps[path][2]
        if chunk.base + chunk.length > size:
            raise GrowkitError(
                f"{path} is cut off: it has {size:,} bytes, and what lies at byte {chunk.base:,} "
                f"has {chunk.length:,}"
            )
        return path

    def list_spans(self, held: Held) -> tuple[Span, ...]:
        """Where the chunks of an entry lie, as files of torch.save."""
        found = []
        for chunk in held.entry.chunks:
            path = self.find_file(held, chunk)
            found.append(Span(path, chunk.base, chunk.length, self.stamps[path]))
        return tuple(found)

    def read_value(self, held: Held, key: str) -> Any:
        """An object of plain values; a `Scalar` for a tensor of one number.

        Raises GrowkitError for anything else.
        """
        chunk = held.entry.chunks[0]
        path = self.find_file(held, chunk)
        if chunk.length > SMALL:
            raise GrowkitError(f"{path}: {key} has more than {SMALL:,} bytes")
        with open(open_regular(path), "rb") as file:
            content = os.pread(file.fileno(), chunk.length, chunk.base)
        if content not in self.values:
            self.values[content] = self._parse(held, chunk, key)
        return self.values[content]

    def _parse(self, held: Held, chunk: Chunk, key: str) -> Any:
        """Read a value for the first time."""
        file = open_torch_file(held.directory / chunk.file, base=chunk.base, size=chunk.length)
        value = file.value
        if not held.entry.dtype:
            return value
        if not isinstance(value, Stored) or value.shape != () or held.entry.shape != ():
            raise GrowkitError(f"{file.path}: {key} is no number")
        number = float(file.open_tensor(value, key).read())
        return Scalar(str(value.dtype), value.storage.location, number)

    def open_tensor(self, held: Held, key: str) -> Tensor:
        """A tensor, of all its chunks. Raises GrowkitError for one whose parts do not fit."""
        entry = held.entry
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            what = entry.dtype or "an object"
            raise GrowkitError(
                f"{held.directory}: {key} is {what}, and growkit reads {', '.join(DTYPES)}"
            )
        tensors = [self._open_chunk(held, chunk, dtype, key) for chunk in entry.chunks]
        if len(tensors) == 1:
            return tensors[0]
        return join_chunks(entry, dtype, tensors)

    def _open_chunk(self, held: Held, chunk: Chunk, dtype: np.dtype, key: str) -> Tensor:
        path = self.find_file(held, chunk)
        file = open_torch_file(path, base=chunk.base, size=chunk.length)
        value = file.value
        if not isinstance(value, Stored) or value.shape != chunk.sizes or value.dtype != dtype:
            what = (
                f"{value.dtype} {list(value.shape)}" if isinstance(value, Stored) else "no tensor"
            )
            raise GrowkitError(
                f"{path}: {key} is {what} at byte {chunk.base:,}, and the metadata say {dtype} "
                f"{list(chunk.sizes)}"
            )
        return file.open_tensor(value, key)


def join_chunks(entry: Entry, dtype: np.dtype, tensors: list[Tensor]) -> Tensor:
    """A tensor of chunks that cover it; a range of rows is read from those that hold some of it."""
    parts = list(zip(entry.chunks, tensors, strict=True))

    def rows(start: int, stop: int) -> np.ndarray:
        found = np.empty((stop - start, *entry.shape[1:]), dtype)
        for chunk, tensor in parts:
            begin = chunk.offsets[0]
            first, last = max(start, begin), min(stop, begin + chunk.sizes[0])
            if first >= last:
                continue
            inner = zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
            place = tuple(slice(offset, offset + size) for offset, size in inner)
            found[(slice(first - start, last - start), *place)] = tensor.rows(
                first - begin, last - begin
            )
        return found

    return Tensor(entry.shape, dtype, rows, sampled=True)
