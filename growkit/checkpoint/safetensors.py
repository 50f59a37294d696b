"""The headers of safetensors files, read by the rules of the safetensors library.

8 bytes of length, a JSON header, raw bytes. The library refuses files whose tensors overlap, leave
bytes between them or at the end, or have one name twice; so does this.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from growkit.checkpoint.files import LFS_POINTER, open_regular
from growkit.checkpoint.raw import Stamp, stamp_of
from growkit.checkpoint.tensor import Tensor, open_raw
from growkit.checkpoint.unsuited import say_quantised
from growkit.errors import GrowkitError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Integers and booleans occur in buffers alone: of old checkpoints, which are not read, or around a
# text decoder, which are carried along.
BUFFER_DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
NAMES = {dtype: name for name, dtype in (DTYPES | BUFFER_DTYPES).items()}
# More than any array library has. A product of thousands of sizes has thousands of digits.
MOST_DIMENSIONS = 64
# The library's own limit, in bytes.
HEADER_LIMIT = 100_000_000


def read_header(path: Path, buffers: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name.

    buffers: how names end that may hold integers or booleans, because no model reads them.
    Raises GrowkitError where header and file disagree.
    """
    with open(open_regular(path), "rb") as file:
        status = os.fstat(file.fileno())
        total = status.st_size
        prefix = file.read(8)
        if LFS_POINTER.startswith(prefix) and prefix:
            raise GrowkitError(
                f"{path} is a Git LFS pointer, not the weights; `git lfs pull` fetches them"
            )
        # Little-endian on every machine, as the format says.
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, total - 8):
            raise GrowkitError(
                f"{path} is not a safetensors file or is cut off: its first 8 bytes announce a "
                f"header of {length} bytes, the file has {total}"
            )
        text = file.read(length)
    header = _parse_header(path, text)
    data = _Data(path, 8 + length, total, buffers, stamp_of(status))
    tensors = {name: data.open_tensor(name, entry) for name, entry in header.items()}
    data.check_cover(tensors)
    return tensors


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    """The entries of a header by name. Raises GrowkitError for what is not a header."""
    garbled = f"{path} has a garbled safetensors header"
    try:
        # json would keep the last of two entries of one name and say nothing.
        header = json.loads(text.decode(), object_pairs_hook=_refuse_twice)
    except _Twice as problem:
        raise GrowkitError(f"{garbled}: it holds {problem.args[0]!r} twice") from None
    except (ValueError, RecursionError):
        raise GrowkitError(f"{garbled}: {len(text)} bytes that are not JSON") from None
    if not isinstance(header, dict):
        raise GrowkitError(f"{garbled}: it is not a JSON object")
    metadata = header.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if metadata is not None and not texts:
        raise GrowkitError(f"{garbled}: its __metadata__ is not text by name")
    return header


class _Twice(Exception):
    """A key that is in a JSON object twice."""


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _Twice(next(name for name, count in counts.items() if count > 1))
    return found


@dataclass(frozen=True)
class _Data:
    """The part of a safetensors file after its header, which begins at byte `base` of `total`."""

    path: Path
    base: int
    total: int
    buffers: tuple[str, ...]
    stamp: Stamp

    def open_tensor(self, name: str, entry: Any) -> Tensor:
        """The tensor of one header entry. Raises GrowkitError if the entry cannot be right."""
        kind, shape, start, end = self._parse(name, entry)
        dtype = DTYPES.get(kind)
        if dtype is None and name.endswith(self.buffers):
            dtype = BUFFER_DTYPES.get(kind)
        if dtype is None:
            known = ", ".join(DTYPES)
            if kind.startswith(("F8", "F4", "F6")):
                raise say_quantised(self.path, kind)
            raise GrowkitError(
                f"{self.path}: the tensor {name!r} has dtype {kind}, and growkit reads {known}"
            )
        size = math.prod(shape) * dtype.itemsize
        if end - start != size:
            raise GrowkitError(
                f"{self.path}: the tensor {name!r} of shape {list(shape)} and dtype {kind} takes "
                f"{size} bytes, its header says {end - start}"
            )
        if self.base + end > self.total:
            raise GrowkitError(
                f"{self.path} is cut off: the tensor {name!r} ends at byte {self.base + end}, "
                f"the file has {self.total}"
            )
        return open_raw(self.path, self.base + start, shape, dtype, self.stamp)

    def _parse(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
        """(dtype, shape, first byte, last byte) of an entry."""
        try:
            kind = entry["dtype"]
            shape = tuple(entry["shape"])
            start, end = entry["data_offsets"]
            numbers = (*shape, start, end)
            if len(shape) > MOST_DIMENSIONS:
                raise ValueError
            # True is an int to Python, and no number to JSON.
            if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
                raise ValueError
            return str(kind), shape, start, end
        except (TypeError, KeyError, ValueError):
            raise GrowkitError(
                f"{self.path} has a garbled safetensors header at the tensor {name!r}"
            ) from None

    def check_cover(self, tensors: dict[str, Tensor]) -> None:
        """Raise GrowkitError unless the tensors lie end to end, up to the end of the file."""
        spans = [(tensor.span, name) for name, tensor in tensors.items() if tensor.span]
        at = self.base
        before = "the header"
        for span, name in sorted(spans, key=lambda each: (each[0].offset, each[0].size)):
            if span.offset < at:
                raise GrowkitError(
                    f"{self.path}: the tensors {before!r} and {name!r} overlap at byte "
                    f"{span.offset}; the safetensors library refuses such a file"
                )
            if span.offset > at:
                raise GrowkitError(
                    f"{self.path}: no tensor covers the {span.offset - at} bytes before {name!r}; "
                    "the safetensors library refuses such a file"
                )
            at = span.offset + span.size
            before = name
        if at != self.total:
            raise GrowkitError(
                f"{self.path}: no tensor covers the last {self.total - at} bytes; the safetensors "
                "library refuses such a file"
            )
