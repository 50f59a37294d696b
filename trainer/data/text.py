"""Text files of many forms, read in blocks of whole documents.

Plain files, JSON lines, Parquet and Arrow, compressed or not, on a disk or in a bucket. An object
of JSON lines and a row of a table is a document; any other file is one, or is cut as
`trainer.data.plain` says. A block is what is sent to a process. JSON lines are parsed there, so
that the one process that reads can keep many others busy. A shard is the part of the text that one
of several machines takes.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedReader
from operator import itemgetter
from typing import Any, BinaryIO, TypeVar, cast

from etils import epath

from growkit.errors import GrowkitError, UsageError
from growkit.textfiles import (
    HEAD,
    JSON_LINES,
    MARK,
    describe_foreign,
    describe_other_objects,
    get_ending,
    holds_json_lines,
    open_text,
    parse_json,
)
from trainer.data.cleaning import Cleaner, Faults
from trainer.data.fields import USUAL_FIELDS, Fields
from trainer.data.listing import Listing, Numbered, list_inputs
from trainer.data.plain import WHOLE, check_cut, read_plain_text
from trainer.data.tables import begins_as_table, choose_table_reader

ADVICE = "name the key of its text with --text-key"
BLOCK_SIZE = 1 << 18  # bytes of JSON lines, characters of other text

_PROSE = (".md", ".rst", ".py")  # never JSON lines, whatever they begin with

T = TypeVar("T")


@dataclass(frozen=True)
class Documents:
    """A block of documents."""

    texts: list[str]
    number: int = 0  # of the first document
    source: int = 0  # number of the input that they are from
    faults: Faults = Faults()  # of what was read since the block before

    def read_documents(self, cleaner: Cleaner) -> Iterator[tuple[str, str]]:
        """Each document, and where it stands in words."""
        for number, text in enumerate(self.texts, self.number):
            where = f"document {number}"
            document = cleaner.clean(text, where)
            if document is not None:
                yield document, where


@dataclass(frozen=True)
class JsonLines:
    """A block of whole lines of a JSON lines file, not parsed yet."""

    data: bytes
    path: str
    number: int  # of the first line
    offset: int  # of the first byte in the file
    source: int = 0  # number of the input that they are from
    faults: Faults = Faults()  # those of its lines are found when they are read
    key: str = "text"  # of the text in an object

    def read_documents(self, cleaner: Cleaner) -> Iterator[tuple[str, str]]:
        """Each document, and where it stands in words. Raises GrowkitError for a broken line."""
        offset = self.offset
        for number, line in enumerate(self.data.split(b"\n"), self.number):
            where = f"{self.path}, line {number}"
            document = _read_json_line(line, self, offset, where, cleaner)
            offset += len(line) + 1
            if document is not None:
                yield document, where


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
    """Text files by the names they were given under. Made by `open_inputs`.

    cut: how plain text is cut into documents, see `trainer.data.plain`; source code and markup stay
    whole. disguised, plain: files that turned out to be JSON lines, and plain text, filled in as
    they are read.
    """

    names: list[str]
    listing: Listing
    policy: str = "strict"  # see `trainer.data.cleaning`
    fields: Fields = USUAL_FIELDS  # where records have their text
    cut: str = WHOLE
    disguised: set[str] = field(default_factory=set)
    plain: set[epath.Path] = field(default_factory=set)

    @property
    def files(self) -> list[Numbered]:
        """(number of the name, file), in order."""
        return self.listing.files

    def read_blocks(self, shard: Shard | None = None) -> Iterator[Block]:
        """All text, or one shard of it, in order; the same blocks at every reading."""
        if shard is None or shard.count <= len(self.files):
            return self._read_files(self.select_files(shard))
        return shard.select(self._read_files(self.files))

    def select_files(self, shard: Shard | None) -> list[Numbered]:
        """The files that a shard reads: its own, or all where there are more shards than files."""
        if shard is None or shard.count > len(self.files):
            return self.files
        return list(shard.select(self.files))

    def read_documents(self) -> Iterator[str]:
        """All documents, empty ones included. Raises GrowkitError for what is not text."""
        cleaner = Cleaner(self.policy)
        for block in self.read_blocks():
            for text, _ in block.read_documents(cleaner):
                yield text

    def _read_files(self, files: Iterable[Numbered]) -> Iterator[Block]:
        for source, group in itertools.groupby(files, itemgetter(0)):
            reading = _Reading(source, Cleaner(self.policy), self)
            yield from reading.read_files(path for _, path in group)


def open_inputs(
    texts: Sequence[str | os.PathLike[str]],
    policy: str = "strict",
    fields: Fields = USUAL_FIELDS,
    cut: str = WHOLE,
) -> Inputs:
    """Files, and the text files under directories, sorted.

    policy: what is done with bytes that are not text. fields: where JSON objects and tables have
    their text. cut: how plain text is cut into documents. Raises UsageError where there are no
    files, and for an unknown cut.
    """
    check_cut(cut)
    names = [os.fspath(text) for text in texts]
    return Inputs(names, list_inputs(texts, fields.key), policy, fields, cut)


class _Group:
    """Gathers documents into blocks of bounded size."""

    def __init__(self, source: int) -> None:
        self.source = source
        self.texts: list[str] = []
        self.number = 0
        self.size = 0

    def add(self, text: str) -> Iterator[Documents]:
        """Take a document, and yield the block that is full before it."""
        if self.texts and self.size + len(text) > BLOCK_SIZE:
            yield from self.flush()
        self.texts.append(text)
        self.size += len(text)

    def flush(self) -> Iterator[Documents]:
        """Yield what is gathered."""
        if self.texts:
            yield Documents(self.texts, self.number, self.source)
        self.number += len(self.texts)
        self.texts = []
        self.size = 0


def group_documents(texts: Iterable[str], source: int = 0) -> Iterator[Documents]:
    """Documents in blocks of bounded size; a longer document is a block of its own."""
    group = _Group(source)
    for text in texts:
        yield from group.add(text)
    yield from group.flush()


def has_text(document: str) -> bool:
    """Whether a document is more than white space."""
    return bool(document) and not document.isspace()


@dataclass(frozen=True)
class _Reading:
    """Reads the files of one input. Small files share a block, but not JSON lines."""

    source: int
    cleaner: Cleaner
    inputs: Inputs

    def read_files(self, paths: Iterable[epath.Path]) -> Iterator[Block]:
        """The blocks of files; each says what its policy did since the one before."""
        group = _Group(self.source)
        for path in paths:
            for block in self._read_file(path, group):
                yield replace(block, faults=self.cleaner.take())
        for block in group.flush():
            yield replace(block, faults=self.cleaner.take())
        left = self.cleaner.take()
        if left:
            yield Documents([], source=self.source, faults=left)

    def _read_file(self, path: epath.Path, group: _Group) -> Iterator[Block]:
        with _open(path) as file:
            head = file.peek(HEAD)
            table = choose_table_reader(path, head)
            read = table or self._choose_reader(path, head)
            foreign = None if table and begins_as_table(head) else describe_foreign(head)
            fields = self.inputs.fields
            if read == self._read_plain_text:
                foreign = foreign or describe_other_objects(head, fields.key, ADVICE)
            if foreign:
                self.cleaner.refuse(GrowkitError(f"{path} is {foreign}"))
                return
            if read is _read_json_lines:
                yield from group.flush()
                yield from _read_json_lines(file, path, self.source, fields.key)
                return
            for text in read(file, path, self.cleaner, fields):
                yield from group.add(text)

    def _choose_reader(self, path: epath.Path, head: bytes) -> Callable[..., Iterator[Any]]:
        """The function that reads a file, by its ending and by what it holds."""
        ending = get_ending(path.name)
        if ending == ".json" and _is_one_document(head):
            return _read_json_documents
        if ending in JSON_LINES:
            return _read_json_lines
        if ending not in _PROSE and holds_json_lines(head, self.inputs.fields.key):
            self.inputs.disguised.add(path.name)
            return _read_json_lines
        return _read_prose if ending in _PROSE else self._read_plain_text

    def _read_plain_text(
        self, file: BufferedReader, path: epath.Path, cleaner: Cleaner, fields: Fields
    ) -> Iterator[str]:
        """The documents of a plain text file, cut as the user asked."""
        self.inputs.plain.add(path)
        return read_plain_text(file, path, cleaner, self.inputs.cut)


@contextmanager
def _open(path: epath.Path) -> Iterator[BufferedReader]:
    """Open a file for reading, decompressed and in UTF-8."""
    try:
        with path.open("rb") as raw, open_text(cast(BinaryIO, raw), str(path)) as file:
            yield file
    except OSError as error:
        raise GrowkitError(f"cannot read {path}: {error.strerror or error}") from error


def _is_one_document(head: bytes) -> bool:
    """Whether a .json file is an array, or an object over several lines, and not JSON lines."""
    begins = head.decode(errors="replace").lstrip(MARK).lstrip()
    line, newline, _ = begins.partition("\n")
    if begins.startswith("[") or not newline:
        return begins.startswith("[")
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        # What goes on in the next line is whole up to its end; a broken line is not.
        return error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):
        return False
    return False


def _read_prose(
    file: BufferedReader, path: epath.Path, cleaner: Cleaner, fields: Fields
) -> Iterator[str]:
    """A file that is one document, whatever plain text is cut into."""
    return read_plain_text(file, path, cleaner)


def _read_json_lines(
    file: BufferedReader, path: epath.Path, source: int, key: str
) -> Iterator[JsonLines]:
    number = 1
    offset = 0
    while data := file.read(BLOCK_SIZE):
        # The rest of the last line, so that no line is in two blocks.
        if not data.endswith(b"\n"):
            data += file.readline()
        yield JsonLines(data, str(path), number, offset, source, key=key)
        number += data.count(b"\n")
        offset += len(data)


def _read_json_line(
    line: bytes, block: JsonLines, offset: int, where: str, cleaner: Cleaner
) -> str | None:
    """The document of one line; None for a blank line, and where the policy leaves it out."""
    text = cleaner.decode(line, block.path, offset)
    if text is None:
        return None
    # Files joined by `cat` have marks at the beginning of lines.
    text = text.lstrip(MARK).strip()
    if not text:
        return None
    try:
        value = parse_json(text, where, cleaner.is_strict)
    except GrowkitError as error:
        cleaner.refuse(error)
        return None
    return _clean_text(value, where, cleaner, block.key)


def _get_text(value: Any, where: str, key: str) -> str:
    """The text of a JSON object; a null is an empty document. Raises GrowkitError."""
    rule = f'{where} must be an object with a string under "{key}"'
    if not isinstance(value, dict):
        raise GrowkitError(f"{rule}, and is not an object")
    text = value.get(key, value)
    if text is None:
        return ""
    if isinstance(text, str):
        return text
    if text is not value:
        raise GrowkitError(f"{rule}, and has something else there")
    keys = ", ".join(repr(other) for other in list(value)[:10])
    if not keys:
        raise GrowkitError(f"{rule}, and has no key")
    raise GrowkitError(f"{rule}, and has {keys}; {ADVICE}")


def _read_json_documents(
    file: BufferedReader, path: epath.Path, cleaner: Cleaner, fields: Fields
) -> Iterator[str]:
    """The documents of a .json file that is one array of objects, or one object."""
    text = cleaner.decode(file.read(), str(path), 0)
    if text is None:
        return
    try:
        value = parse_json(text.lstrip(MARK), str(path), cleaner.is_strict)
    except GrowkitError as error:
        cleaner.refuse(error)
        return
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items, 1):
        where = f"{path}, item {number}" if isinstance(value, list) else str(path)
        document = _clean_text(item, where, cleaner, fields.key)
        if document is not None:
            yield document


def _clean_text(value: Any, where: str, cleaner: Cleaner, key: str) -> str | None:
    """The text of a JSON object; None where the policy leaves it out."""
    try:
        document = _get_text(value, where, key)
    except GrowkitError as error:
        cleaner.refuse(error)
        return None
    return cleaner.clean(document, where)
