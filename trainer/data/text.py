"""Text files of many forms, read in blocks of whole documents.

Plain files, JSON lines, Parquet, gzip, Zstandard and whole directories, on a disk or in a bucket. A
block is what is sent to a process. JSON lines are parsed there, so that the one process that reads
can keep many others busy. A shard is the part of the text that one of several machines takes.
"""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, cast

from etils import epath

from growkit.errors import GrowkitError, UsageError

BLOCK_SIZE = 1 << 18  # bytes of JSON lines, characters of other text

_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")
_COMPRESSED = (".gz", ".zst")
_PARQUET_ROWS = 100  # read at once

T = TypeVar("T")


@dataclass(frozen=True)
class Documents:
    """A block of documents."""

    texts: list[str]
    number: int = 0  # of the first document
    source: int = 0  # number of the input that they are from

    def read_documents(self) -> Iterator[tuple[str, str]]:
        """Each document, and where it stands in words."""
        for number, text in enumerate(self.texts, self.number):
            yield text, f"document {number}"


@dataclass(frozen=True)
class JsonLines:
    """A block of whole lines of a JSON lines file, not parsed yet."""

    data: bytes
    path: str
    number: int  # of the first line
    offset: int  # of the first byte in the file
    source: int = 0  # number of the input that they are from

    def read_documents(self) -> Iterator[tuple[str, str]]:
        """Each document, and where it stands in words. Raises GrowkitError for a broken line."""
        offset = self.offset
        for number, line in enumerate(self.data.split(b"\n"), self.number):
            text = _decode(line, self.path, offset)
            offset += len(line) + 1
            if text.strip():
                where = f"{self.path}, line {number}"
                yield _parse_json_line(text, where), where


Block = Documents | JsonLines


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count` parts of the inputs, for one of several machines.

    With at least as many files as parts, part i is every count-th file beginning with the i-th, and
    the machine reads no other file. With fewer files it is every count-th block of all files, and
    every machine reads everything.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "i/n". Raises UsageError."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError(
                f"a shard is i/n, from 1/n to n/n, as 1/8 for the first of eight; got {text!r}"
            )
        return cls(int(found[1]), int(found[2]))

    def select(self, things: Iterable[T]) -> Iterator[T]:
        """Every count-th thing, beginning with the number-th."""
        return itertools.islice(things, self.number - 1, None, self.count)


@dataclass(frozen=True)
class Inputs:
    """Text files by the names they were given under. Made by `open_inputs`."""

    names: list[str]
    files: list[tuple[int, epath.Path]]  # (number of the name, file), in order

    def read_blocks(self, shard: Shard | None = None) -> Iterator[Block]:
        """All text, or one shard of it, in order; the same blocks at every reading."""
        if shard is None:
            return _read_blocks(self.files)
        if shard.count <= len(self.files):
            return _read_blocks(shard.select(self.files))
        return shard.select(_read_blocks(self.files))

    def read_documents(self) -> Iterator[str]:
        """All documents, empty ones included. Raises GrowkitError for what is not text."""
        for block in self.read_blocks():
            for text, where in block.read_documents():
                count_utf8_bytes(text, where)
                yield text


def open_inputs(texts: Sequence[str | os.PathLike[str]]) -> Inputs:
    """Files, and the text files under directories, sorted.

    Raises UsageError where there are none.
    """
    if not texts:
        raise UsageError("name at least one text file or directory to tokenize")
    files = []
    for number, text in enumerate(texts):
        files += [(number, file) for file in _find_files(epath.Path(text))]
    return Inputs([os.fspath(text) for text in texts], files)


def group_documents(texts: Iterable[str], source: int = 0) -> Iterator[Documents]:
    """Documents in blocks of bounded size; a longer document is a block of its own."""
    group: list[str] = []
    number = 0
    size = 0
    for text in texts:
        if group and size + len(text) > BLOCK_SIZE:
            yield Documents(group, number, source)
            number += len(group)
            group = []
            size = 0
        group.append(text)
        size += len(text)
    if group:
        yield Documents(group, number, source)


def has_text(document: str) -> bool:
    """Whether a document is more than white space."""
    return bool(document) and not document.isspace()


def count_utf8_bytes(document: str, where: str) -> int:
    """The length of a document in UTF-8. Raises GrowkitError for half a surrogate pair."""
    try:
        return len(document.encode())
    except UnicodeEncodeError as error:
        raise GrowkitError(
            f"{where} is not text: it has half a surrogate pair at character {error.start}"
        ) from error


def _find_files(path: epath.Path) -> list[epath.Path]:
    """A file itself, or the text files under a directory, sorted."""
    if not path.exists():
        raise UsageError(f"no such file or directory: {path}")
    if not path.is_dir():
        return [path]
    files = sorted(
        folder / name
        for folder, _, names in path.walk()
        for name in names
        if _get_suffix(name) in _SUFFIXES
    )
    if not files:
        raise UsageError(
            f"no text files under {path}; looked for {', '.join(_SUFFIXES)}, and these with "
            f"{' or '.join(_COMPRESSED)}"
        )
    return files


def _get_suffix(name: str) -> str:
    """The suffix of a file's name, before that of a compression."""
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return os.path.splitext(name)[1]


def _read_blocks(files: Iterable[tuple[int, epath.Path]]) -> Iterator[Block]:
    """The blocks of files. Small files of one input share a block, but not JSON lines."""

    def classify(file: tuple[int, epath.Path]) -> tuple[int, bool]:
        source, path = file
        return source, _get_suffix(path.name) == ".jsonl"

    for (source, is_json_lines), group in itertools.groupby(files, classify):
        if is_json_lines:
            for _, path in group:
                yield from _read_json_lines(path, source)
        else:
            texts = (text for _, path in group for text in _read_texts(path))
            yield from group_documents(texts, source)


def _read_texts(path: epath.Path) -> Iterator[str]:
    """The documents of one file, empty ones included."""
    with _open_text(path) as file:
        if _get_suffix(path.name) == ".parquet":
            yield from _read_parquet(file, path)
        else:
            yield _decode(file.read(), str(path), 0)


@contextmanager
def _open_text(path: epath.Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed."""
    try:
        with path.open("rb") as raw, _decompress(raw, path) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise GrowkitError(f"{path} is not a whole {path.suffix[1:]} file: {error}") from error
    except OSError as error:
        raise GrowkitError(f"cannot read {path}: {error.strerror or error}") from error


def _decompress(raw: BinaryIO, path: epath.Path) -> AbstractContextManager[BinaryIO]:
    if path.suffix == ".gz":
        return cast("AbstractContextManager[BinaryIO]", gzip.open(raw))
    if path.suffix == ".zst":
        return _decompress_zstandard(raw, path)
    return nullcontext(raw)


@contextmanager
def _decompress_zstandard(raw: BinaryIO, path: epath.Path) -> Iterator[BinaryIO]:
    try:
        from compression import zstd  # type: ignore[import-not-found]  # Python 3.14 and later
    except ImportError:
        zstd = _import_optional("backports.zstd", path)
    try:
        with zstd.open(raw) as file:
            yield file
    except zstd.ZstdError as error:
        raise GrowkitError(f"{path} is not a whole zst file: {error}") from error


def _import_optional(module: str, path: epath.Path) -> Any:
    """A package that only some files need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.removesuffix(".parquet")
        raise UsageError(
            f"reading {path} needs the package {package}: pip install {package}"
        ) from None


def _read_json_lines(path: epath.Path, source: int) -> Iterator[JsonLines]:
    number = 1
    offset = 0
    with _open_text(path) as file:
        while data := file.read(BLOCK_SIZE):
            # The rest of the last line, so that no line is in two blocks.
            if not data.endswith(b"\n"):
                data += file.readline()
            yield JsonLines(data, str(path), number, offset, source)
            number += data.count(b"\n")
            offset += len(data)


def _parse_json_line(line: str, where: str) -> str:
    """The "text" of one JSON line."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise GrowkitError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise GrowkitError(f'{where} must be an object with a string under "text"')
    text: str = value["text"]
    return text


def _read_parquet(file: BinaryIO, path: epath.Path) -> Iterator[str]:
    """The column "text" of a Parquet file, row by row; a null is an empty document."""
    parquet = _import_optional("pyarrow.parquet", path)
    arrow = importlib.import_module("pyarrow")
    try:
        table = parquet.ParquetFile(file)
        types = {field.name: field.type for field in table.schema_arrow}
        if types.get("text") not in (arrow.string(), arrow.large_string()):
            present = ", ".join(f"{name} ({kind})" for name, kind in types.items())
            raise GrowkitError(f'{path} must have a column "text" of strings; it has {present}')
        for rows in table.iter_batches(_PARQUET_ROWS, columns=["text"]):
            for text in rows.column(0).to_pylist():
                yield text or ""
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise GrowkitError(
            f"{path} is not a whole Parquet file of text: {' '.join(str(error).split())}"
        ) from error


def _decode(data: bytes, path: str, offset: int) -> str:
    """Text from bytes that begin at byte `offset` of the file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise GrowkitError(
            f"{path} is not UTF-8 text: byte {offset + error.start} is 0x{data[error.start]:02x}"
        ) from error
