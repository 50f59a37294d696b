"""The files of torch.save before torch 1.6: five pickles one after another, then the storages.

    magic number   version   system   value   keys of the storages   (count, bytes) of each storage

They are read as the zip files are: by the same unpickler, which runs nothing, and by offset.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from growkit.checkpoint.raw import Span, Stamp
from growkit.checkpoint.torch_pickle import Storage, read_next
from growkit.errors import GrowkitError

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


def read_legacy(
    path: Path, file: BinaryIO, stamp: Stamp, skipped: Callable[[str], bool]
) -> tuple[Any, dict[str, Span]]:
    """(value, the bytes of each storage by its key) of an open file.

    skipped: see `read_pickle`. Raises GrowkitError, without the path, for what is no such file, and
    Foreign as `read_pickle` does.
    """
    if (read_next(file), read_next(file)) != (MAGIC, VERSION):
        raise GrowkitError("another magic number")
    system = read_next(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise GrowkitError("written by a machine of the other byte order")
    storages: dict[str, Storage] = {}
    value = read_next(file, skipped, storages=storages)
    keys = read_next(file)
    if not isinstance(keys, list) or set(keys) != storages.keys():
        raise GrowkitError("its storages are not those of its tensors")
    spans: dict[str, Span] = {}
    offset = file.tell()
    for key in keys:
        size = storages[key].count * storages[key].dtype.itemsize
        head = os.pread(file.fileno(), 8, offset)
        if head != struct.pack("<q", storages[key].count):
            raise GrowkitError(f"the storage {key!r} is not where it should be")
        spans[key] = Span(path, offset + 8, size, stamp)
        offset += 8 + size
    if offset > os.fstat(file.fileno()).st_size:
        raise GrowkitError("its last storage ends behind its end")
    return value, spans
