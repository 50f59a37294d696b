"""Text: files of many forms, read in blocks of whole documents.

Knows plain files, JSON lines, Parquet, gzip, Zstandard and whole directories, on a disk or in a bucket, and
which part of them one of several machines takes. A block is what is sent to a process: JSON lines are parsed
there, not here, so that one reader keeps many processes busy. Leaves what becomes of the text to
`trainer.data.tokenize`.
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
from typing import Any, BinaryIO

from etils import epath

from growkit.errors import GrowkitError, UsageError

BLOCK_SIZE = 1 << 18  # bytes of JSON lines, characters of other text

_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")
_COMPRESSED = (".gz", ".zst")
_ROWS = 100  # of Parquet, read at once


@dataclass(frozen=True)
class Documents:
    """Documents one after the other; `number` is the first one's."""

    texts: list[str]
    number: int = 0
    source: int = 0  # which of the inputs it is from

    def read_documents(self) -> Iterator[tuple[str, str]]:
        """Each document and where it stands, in words."""
        return ((text, f"document {number}") for number, text in enumerate(self.texts, self.number))


@dataclass(frozen=True)
class JsonLines:
    """Lines of a JSON lines file, not parsed yet: whole ones, from line `number` at byte `offset` on."""

    data: bytes
    path: str
    number: int
    offset: int
    source: int = 0

    def read_documents(self) -> Iterator[tuple[str, str]]:
        """Each document and where it stands, in words. Raises GrowkitError where a line is broken."""
        offset = self.offset
        for number, line in enumerate(self.data.split(b"\n"), self.number):
            text = _decode(line, self.path, offset)
            offset += len(line) + 1
            if text.strip():
                where = f"{self.path}, line {number}"
                yield _json_text(text, where), where


Block = Documents | JsonLines


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count` parts of the inputs, so that several machines share the work.

    With at least as many files as parts, part i is every count-th file beginning with the i-th, and no other is
    read. With fewer files it is every count-th block of all files: then every machine reads everything.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "i/n". Raises UsageError."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError(
                f"a shard is i/n, from 1/n to n/n, as 1/8 for the first of eight; got {text!r}"
            )
        return cls(int(found[1]), int(found[2]))

    def select(self, things: Iterable) -> Iterator:
        """Every count-th thing, beginning with the number-th."""
        return itertools.islice(things, self.number - 1, None, self.count)


@dataclass(frozen=True)
class Inputs:
    """Text files by the names they were given under. Make one with `open_inputs`."""

    names: list[str]
    files: list[tuple[int, epath.Path]]  # (which name, file), in order

    def read_blocks(self, shard: Shard | None = None) -> Iterator[Block]:
        """All text, or one shard of it, in order; the same blocks however often it is read."""
        files, spread = self.files, False
        if shard is not None and shard.count <= len(files):
            files = list(shard.select(files))
        elif shard is not None:
            spread = True
        blocks = _blocks(files)
        return shard.select(blocks) if spread else blocks

    def read_documents(self) -> Iterator[str]:
        """All documents, empty ones included. Raises GrowkitError for what is not text."""
        for text, where in itertools.chain.from_iterable(
            block.read_documents() for block in self.read_blocks()
        ):
            count_utf8_bytes(text, where)
            yield text


def open_inputs(texts: Sequence[str | os.PathLike]) -> Inputs:
    """Files, and the text files under directories, sorted. Raises UsageError where there are none."""
    if not texts:
        raise UsageError("name at least one text file or directory to tokenize")
    files = [
        (number, file) for number, text in enumerate(texts) for file in _files_of(epath.Path(text))
    ]
    return Inputs([os.fspath(text) for text in texts], files)


def group_documents(texts: Iterable[str], source: int = 0) -> Iterator[Documents]:
    """Documents in blocks of bounded size; a long one is in a block of its own."""
    group: list[str] = []
    number = size = 0
    for text in texts:
        if group and size + len(text) > BLOCK_SIZE:
            yield Documents(group, number, source)
            number, group, size = number + len(group), [], 0
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


def _files_of(path: epath.Path) -> list[epath.Path]:
    if not path.exists():
        raise UsageError(f"no such file or directory: {path}")
    if not path.is_dir():
        return [path]
    files = sorted(
        folder / name
        for folder, _, names in path.walk()
        for name in names
        if _form(name) in _SUFFIXES
    )
    if not files:
        raise UsageError(
            f"no text files under {path}; looked for {', '.join(_SUFFIXES)}, and these with {' or '.join(_COMPRESSED)}"
        )
    return files


def _form(name: str) -> str:
    """The suffix of a file's name, that of its compression apart."""
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return os.path.splitext(name)[1]


def _blocks(files: Iterable[tuple[int, epath.Path]]) -> Iterator[Block]:
    """The blocks of files; small files of one input share some."""
    for (source, lines), group in itertools.groupby(
        files, lambda file: (file[0], _form(file[1].name) == ".jsonl")
    ):
        paths = (path for _, path in group)
        if lines:
            yield from itertools.chain.from_iterable(
                _read_json_lines(path, source) for path in paths
            )
        else:
            yield from group_documents(itertools.chain.from_iterable(map(_read_texts, paths)), source)


def _read_texts(path: epath.Path) -> Iterator[str]:
    """The documents of one file, empty ones included."""
    with _open(path) as file:
        if _form(path.name) == ".parquet":
            yield from _read_parquet(file, path)
        else:
            yield _decode(file.read(), str(path), 0)


@contextmanager
def _open(path: epath.Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as raw, _unpacked(raw, path) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise GrowkitError(f"{path} is not a whole {path.suffix[1:]} file: {error}") from error
    except OSError as error:
        raise GrowkitError(f"cannot read {path}: {error.strerror or error}") from error


def _unpacked(raw: BinaryIO, path: epath.Path) -> AbstractContextManager[BinaryIO]:
    if path.suffix == ".gz":
        return gzip.open(raw)
    return _unpacked_zstandard(raw, path) if path.suffix == ".zst" else nullcontext(raw)


@contextmanager
def _unpacked_zstandard(raw: BinaryIO, path: epath.Path) -> Iterator[BinaryIO]:
    try:
        from compression import zstd  # Python 3.14 and later
    except ImportError:
        zstd = _optional("backports.zstd", path)
    try:
        with zstd.open(raw) as file:
            yield file
    except zstd.ZstdError as error:
        raise GrowkitError(f"{path} is not a whole zst file: {error}") from error


def _optional(module: str, path: epath.Path) -> Any:
    """A package that only some files need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.removesuffix(".parquet")
        raise UsageError(
            f"reading {path} needs the package {package}: pip install {package}"
        ) from None


def _read_json_lines(path: epath.Path, source: int) -> Iterator[JsonLines]:
    number, offset = 1, 0
    with _open(path) as file:
        # A block ends with a whole line, so that no line is in two.
        while data := file.read(BLOCK_SIZE):
            if not data.endswith(b"\n"):
                data += file.readline()
            yield JsonLines(data, str(path), number, offset, source)
            number, offset = number + data.count(b"\n"), offset + len(data)


def _json_text(line: str, where: str) -> str:
    """The "text" of one JSON line."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise GrowkitError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise GrowkitError(f'{where} must be an object with a string under "text"')
    return value["text"]


def _read_parquet(file: BinaryIO, path: epath.Path) -> Iterator[str]:
    """The column "text" of a Parquet file, row by row; a null is an empty document."""
    parquet = _optional("pyarrow.parquet", path)
    arrow = importlib.import_module("pyarrow")
    try:
        table = parquet.ParquetFile(file)
        kinds = {field.name: field.type for field in table.schema_arrow}
        if kinds.get("text") not in (arrow.string(), arrow.large_string()):
            there = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise GrowkitError(f'{path} must have a column "text" of strings; it has {there}')
        for rows in table.iter_batches(_ROWS, columns=["text"]):
            yield from (text or "" for text in rows.column(0).to_pylist())
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
