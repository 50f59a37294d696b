"""The zip files of torch.save: a pickle and one member for each storage, stored as they are.

    NAME/data.pkl   NAME/byteorder   NAME/data/0   NAME/data/1   ...   NAME/version

Members are not compressed, and their bytes begin at multiples of 64, so a storage is read at an
offset of the file. Written files are laid out as torch lays them out, with records of 8-byte sizes
(zip64), and have the checksums (CRC-32) that zip programs compare; torch itself does not. Files of
torch before 1.6 are no zip files; `torch_legacy` reads them.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from growkit.checkpoint.files import LFS_POINTER, open_regular
from growkit.checkpoint.fill import Filled, Job, create_file
from growkit.checkpoint.raw import Span, Stamp, stamp_of
from growkit.checkpoint.tensor import Recipe, Tensor, open_raw
from growkit.checkpoint.torch_legacy import read_legacy
from growkit.checkpoint.torch_pickle import (
    LIMIT,
    Foreign,
    Storage,
    Stored,
    read_pickle,
    refuse_all,
    write_pickle,
)
from growkit.errors import GrowkitError

# Bytes that members begin at a multiple of.
ALIGNMENT = 64
# Sizes from here on stand in a record of 8 bytes, and all ones in the one of 4.
WIDE = ONES = 0xFFFFFFFF
LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
LOCAL_SIZE = 30
# The flag of names in UTF-8, and the day of a file without one: 1 January 1980.
UTF8, DAY = 0x800, 0x21
# Small members that torch writes beside the storages.
FIXED = {".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}


@dataclass(frozen=True)
class TorchFile:
    """A file of torch.save, opened: its value, with `Stored` in the place of tensors."""

    path: Path
    value: Any
    members: Mapping[str, Span]
    stamp: Stamp

    def open_tensor(self, stored: Stored, what: str) -> Tensor:
        """A tensor of the file, read by offset. Raises GrowkitError if it cannot be there."""
        storage = stored.storage
        span = self.members.get(storage.key)
        if span is None:
            raise GrowkitError(f"{self.path}: the storage {storage.key!r} of {what} is not there")
        width = storage.dtype.itemsize
        if span.size != storage.count * width:
            raise GrowkitError(
                f"{self.path}: the storage of {what} has {span.size:,} bytes, and {storage.count:,}"
                f" numbers of {storage.dtype} take {storage.count * width:,}"
            )
        if not stored.is_contiguous:
            raise GrowkitError(
                f"{self.path}: {what} has the strides {list(stored.strides)} for the shape "
                f"{list(stored.shape)}; growkit reads tensors in C order"
            )
        tensor = open_raw(
            self.path, span.offset + stored.offset * width, stored.shape, storage.dtype, self.stamp
        )
        if stored.offset * width + tensor.size > span.size:
            raise GrowkitError(f"{self.path}: {what} is larger than its storage")
        if tensor.size != span.size:
            return tensor
        return Tensor(tensor.shape, tensor.dtype, tensor.rows, span)


class _Window(io.RawIOBase):
    """The bytes of a zip file that lies within a larger file."""

    def __init__(self, file: int, base: int, size: int):
        self.file = file
        self.base = base
        self.size = size
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        # zipfile seeks before the begin of what is too short, and expects this error then.
        if begin + offset < 0:
            raise OSError("before the begin of a zip file")
        self.at = begin + offset
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = self.read_at(min(len(buffer), max(0, self.size - self.at)), self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def read_at(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes at an offset within the zip file."""
        return os.pread(self.file, size, self.base + offset)


def open_torch_file(
    path: Path,
    skipped: Callable[[str], bool] = refuse_all,
    base: int = 0,
    size: int | None = None,
) -> TorchFile:
    """Read the directory and the pickle of a file of torch.save; nothing of it is run.

    skipped: see `read_pickle`. base, size: where it lies in a file that holds others too, in bytes;
    the whole file by default.
    Raises GrowkitError, naming the class, for a pickle with other classes than tensors.
    """
    with open(open_regular(path), "rb") as file:
        status = os.fstat(file.fileno())
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise GrowkitError(f"{path} is a Git LFS pointer; `git lfs pull` fetches the file")
        if size is not None and base + size > status.st_size:
            raise GrowkitError(
                f"{path} is cut off: it has {status.st_size:,} bytes, and what lies at byte "
                f"{base:,} has {size:,}"
            )
        file.seek(0)
        window = _Window(file.fileno(), base, status.st_size if size is None else size)
        try:
            if size is None and file.read(len(LOCAL)) != LOCAL:
                return _read_old(path, file, stamp_of(status), skipped)
            with zipfile.ZipFile(window) as archive:
                return _read_archive(path, archive, window, stamp_of(status), skipped)
        except Foreign as problem:
            raise GrowkitError(
                f"{path} names {problem.args[0]}, which is no part of a state dict of tensors; "
                "nothing of it was run"
            ) from None
        except (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, ValueError):
            where = "" if size is None else f" at byte {base:,}"
            raise GrowkitError(f"{path} is no file of torch.save{where}, or is cut off") from None


def _read_old(
    path: Path, file: BinaryIO, stamp: Stamp, skipped: Callable[[str], bool]
) -> TorchFile:
    """A file of torch before 1.6."""
    file.seek(0)
    try:
        value, spans = read_legacy(path, file, stamp, skipped)
    except GrowkitError as problem:
        raise GrowkitError(f"{path} is no file of torch.save, or is cut off: {problem}") from None
    return TorchFile(path, value, spans, stamp)


def _read_archive(
    path: Path,
    archive: zipfile.ZipFile,
    window: _Window,
    stamp: Stamp,
    skipped: Callable[[str], bool],
) -> TorchFile:
    infos = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in infos if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1 or len(infos) != len(archive.infolist()):
        raise GrowkitError(f"{path} is a zip file, but not one of torch.save")
    prefix = pickles[0].removesuffix("data.pkl")
    if infos[pickles[0]].file_size > LIMIT:
        raise GrowkitError(f"{path}: its pickle has more than {LIMIT:,} bytes")
    spans = {name: _find_span(path, info, window, stamp) for name, info in infos.items()}
    order = spans.get(f"{prefix}byteorder")
    if order is not None and _read_span(window, order, 16) != b"little":
        raise GrowkitError(f"{path} was written by a machine of the other byte order")
    content = _read_span(window, spans[pickles[0]], LIMIT)
    # torch can be told to leave the checksums out; then none of them is right.
    summed = zlib.crc32(content) == spans[pickles[0]].checksum
    try:
        value = read_pickle(content, skipped)
    except GrowkitError as problem:
        raise GrowkitError(f"{path}: {problem}") from None
    storages = f"{prefix}data/"
    members = {
        name.removeprefix(storages): span if summed else replace(span, checksum=None)
        for name, span in spans.items()
        if name.startswith(storages)
    }
    return TorchFile(path, value, members, stamp)


def _read_span(window: _Window, span: Span, limit: int) -> bytes:
    """The bytes of a small member."""
    return os.pread(window.file, min(span.size, limit), span.offset)


def _find_span(path: Path, info: zipfile.ZipInfo, window: _Window, stamp: Stamp) -> Span:
    """Where the bytes of a member lie. Raises GrowkitError for one that is compressed."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise GrowkitError(f"{path}: {info.filename} is compressed, which torch.save never does")
    header = window.read_at(LOCAL_SIZE, info.header_offset)
    if len(header) < LOCAL_SIZE or not header.startswith(LOCAL):
        raise GrowkitError(f"{path}: {info.filename} is not where the zip file says")
    name_size, extra_size = struct.unpack("<HH", header[26:30])
    offset = info.header_offset + LOCAL_SIZE + name_size + extra_size
    if offset + info.file_size > window.size:
        raise GrowkitError(f"{path} is cut off: {info.filename} ends behind its end")
    return Span(path, window.base + offset, info.file_size, stamp, checksum=info.CRC)


@dataclass
class _Member:
    """A member of a file that is being written. content: None where jobs make it."""

    name: bytes
    size: int
    content: bytes | None = None
    start: int = 0
    offset: int = 0
    checksum: int = 0

    @property
    def local_extra(self) -> bytes:
        """Padding up to the member's bytes, which begin aligned, behind the wide sizes if any."""
        sizes = _pack_wide([self.size, self.size] if self.size >= WIDE else [])
        begin = self.start + LOCAL_SIZE + len(self.name) + len(sizes) + 4
        padding = -begin % ALIGNMENT
        return sizes + b"FB" + struct.pack("<H", padding) + b"Z" * padding

    def pack_local(self) -> bytes:
        """The header before the member's bytes."""
        size = _shorten(self.size)
        extra = self.local_extra
        lengths = (len(self.name), len(extra))
        fields = (45, UTF8, 0, 0, DAY, self.checksum, size, size, *lengths)
        return LOCAL + struct.pack("<HHHHHIIIHH", *fields) + self.name + extra

    def pack_central(self) -> bytes:
        """The member's entry in the directory at the file's end."""
        size = _shorten(self.size)
        start = _shorten(self.start)
        wide = [self.size, self.size] if size == ONES else []
        extra = _pack_wide(wide + ([self.start] if start == ONES else []))
        lengths = (len(self.name), len(extra), 0, 0, 0)
        fields = (45, 45, UTF8, 0, 0, DAY, self.checksum, size, size, *lengths, 0, start)
        return CENTRAL + struct.pack("<HHHHHHIIIHHHHHII", *fields) + self.name + extra


def _shorten(size: int) -> int:
    """A size as 4 bytes hold it: all ones say that the wide record has it."""
    return size if size < WIDE else ONES


def _pack_wide(sizes: list[int]) -> bytes:
    """The extra field of zip64 for sizes that 4 bytes do not hold."""
    return struct.pack(f"<HH{len(sizes)}Q", 1, 8 * len(sizes), *sizes) if sizes else b""


@dataclass
class TorchWriter:
    """A file of torch.save in the making: storages are added, `begin` gives the jobs that fill
    them, and `finish` writes the rest, once the bytes are there.
    """

    path: Path
    recipes: dict[str, tuple[str, str, Recipe]] = field(default_factory=dict)
    members: list[_Member] = field(default_factory=list)
    file: int = -1
    # Where it begins in a file that holds others too.
    base: int = 0

    def add(self, slot: str, name: str, recipe: Recipe, location: str) -> Stored:
        """A tensor of the file, made by a recipe. location: the device that it was saved from."""
        key = str(len(self.recipes))
        self.recipes[key] = (slot, name, recipe)
        count = recipe.size // recipe.dtype.itemsize
        steps = np.cumprod([1, *reversed(recipe.shape[1:])])[::-1].tolist()
        strides = tuple(steps) if recipe.shape else ()
        return Stored(Storage(recipe.dtype, key, location, count), 0, recipe.shape, strides)

    def begin(self, value: Any) -> list[Job]:
        """Lay out the file and reserve it. value: what the pickle holds.

        Returns the jobs that make the bytes of the storages.
        """
        return self.put(create_file(self.path, self.lay_out(value)))

    def lay_out(self, value: Any) -> int:
        """Decide where everything lies; returns the number of bytes. value: what the pickle
        holds.
        """
        small = {"data.pkl": write_pickle(value), **FIXED}
        for name, content in small.items():
            self._place(name, len(content), content)
        for key, (_, _, recipe) in self.recipes.items():
            self._place(f"data/{key}", recipe.size, None)
        self._place("version", 2, b"3\n")
        last = self.members[-1]
        ending = sum(len(member.pack_central()) for member in self.members) + 56 + 20 + 22
        return last.offset + last.size + ending

    def put(self, file: int, base: int = 0) -> list[Job]:
        """The jobs that make the bytes of the storages, in an open file from byte `base` on."""
        self.file = file
        self.base = base
        storages = [member for member in self.members if member.content is None]
        return [
            Job(slot, name, (recipe,), file, base + member.offset, True)
            for member, (slot, name, recipe) in zip(storages, self.recipes.values(), strict=True)
        ]

    def _place(self, name: str, size: int, content: bytes | None) -> _Member:
        """The next member of the file."""
        start = self.members[-1].offset + self.members[-1].size if self.members else 0
        member = _Member(f"{self.path.stem}/{name}".encode(), size, content, start)
        if content is not None:
            member.checksum = zlib.crc32(content)
        member.offset = start + LOCAL_SIZE + len(member.name) + len(member.local_extra)
        self.members.append(member)
        return member

    def finish(self, filled: Filled) -> None:
        """Write all headers, the small members and the directory; the file stays open."""
        jobs = iter(self.recipes.values())
        for member in self.members:
            if member.content is None:
                slot, name, _ = next(jobs)
                member.checksum = filled.checksums[slot, name]
            header = member.pack_local()
            os.pwrite(self.file, header + (member.content or b""), self.base + member.start)
        last = self.members[-1]
        os.pwrite(self.file, self._pack_end(), self.base + last.offset + last.size)

    def _pack_end(self) -> bytes:
        """The directory and the three records that end a zip64 file."""
        start = self.members[-1].offset + self.members[-1].size
        central = b"".join(member.pack_central() for member in self.members)
        count = len(self.members)
        end = start + len(central)
        wide = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(central), start)
        short = min(count, 0xFFFF)
        last = struct.pack("<HHHHIIH", 0, 0, short, short, len(central), _shorten(start), 0)
        locator = struct.pack("<IQI", 0, end, 1)
        return central + b"PK\x06\x06" + wide + b"PK\x06\x07" + locator + b"PK\x05\x06" + last
