"""Text files as they come: compressed under any name, with byte order marks, as JSON lines.

`open_text` opens a file decompressed and in UTF-8, by what it holds and not by its name. The other
functions tell what a file is from its name or its first bytes, and read one JSON document.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, BinaryIO

from growkit.errors import GrowkitError, UsageError

HEAD = 1 << 16  # bytes at the beginning of a file that tell what it is
MARK = "\ufeff"  # the byte order mark, as a character
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")  # one JSON document a line
PARQUET = ".parquet"
ARROW = ".arrow"
TEXT = "text"  # the key of a document's text, and the column of a table's, where none is named

# Endings of compressed files, and the name of the compression.
_COMPRESSED = {".gz": "gzip", ".zst": "zst", ".zstd": "zst", ".bz2": "bz2", ".xz": "xz"}
_MOST_LAYERS = 3  # of compression, one within the other
# The decoder of the standard library takes windows up to 2^27 bytes; `zstd --long` writes more.
_LARGEST_WINDOW = 31
_MARKS = (
    # UTF-32 first: the mark of UTF-16 begins that of UTF-32.
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
ARROW_MAGIC = b"ARROW1"
# Files that are not text, though their bytes may pass for it: (offset, first bytes, what to do).
_FOREIGN = (
    (0, b"version https://git-lfs", "a Git LFS pointer; `git lfs pull` brings the file itself"),
    (257, b"ustar", "a tar archive; unpack it and name the files in it"),
    (0, b"PK\x03\x04", "a zip archive; unpack it and name the files in it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it and name the files in it"),
    (0, b"Rar!\x1a\x07", "a rar archive; unpack it and name the files in it"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4, which cannot be read; decompress it"),
    (0, b"\x1f\x9d", "compressed with compress, which cannot be read; decompress it"),
    (0, b"%PDF-", "a PDF document; extract its text"),
    (0, b"{\\rtf", "an RTF document; extract its text"),
    (0, ARROW_MAGIC, "an Arrow file; write its table as Parquet"),
    (0, b"SQLite format 3\x00", "an SQLite database; export its text"),
)
# A file with more zero bytes than this among its first ones is not text in UTF-8.
_MOST_ZEROS = 0.1
# Python converts no whole number of more digits (sys.set_int_max_str_digits).
_MOST_DIGITS = 4000


def strip_compression(name: str) -> str:
    """A file's name in small letters, without the endings of compressions."""
    name = name.lower()
    while (parts := os.path.splitext(name))[1] in _COMPRESSED:
        name = parts[0]
    return name


def get_ending(name: str) -> str:
    """The ending of a file's name before that of a compression, in small letters: ".jsonl"."""
    return os.path.splitext(strip_compression(name))[1]


@contextmanager
def open_text(raw: BinaryIO, name: str) -> Iterator[io.BufferedReader]:
    """A file that is open for reading, decompressed, and in UTF-8 where it has another mark.

    `peek(HEAD)` of what is yielded shows the first bytes. Raises GrowkitError, in the block too,
    where the file is broken; UsageError where a package is missing.
    """
    try:
        with ExitStack() as opened:
            file = _decompress(raw, name, opened)
            yield _recode(file, opened)
    except UnicodeDecodeError as error:
        raise GrowkitError(f"{name} is not whole {error.encoding} text: {error.reason}") from error
    except OSError as error:
        raise GrowkitError(f"cannot read {name}: {error.strerror or error}") from error


def _decompress(raw: BinaryIO, name: str, opened: ExitStack) -> io.BufferedReader:
    file = _buffer(raw, opened)
    expected = _COMPRESSED.get(os.path.splitext(name.lower())[1])
    for layer in range(_MOST_LAYERS):
        head = file.peek(HEAD)
        kind = find_compression(head)
        # What is no text is named by whoever reads it.
        if kind is None and expected and layer == 0 and not describe_foreign(head):
            begins = f"it begins with {head[:8]!r}" if head else "it is empty"
            raise GrowkitError(
                f"{name} is not a whole {expected} file: {begins}; decompress it again, or rename "
                f"it if it is not compressed"
            )
        if kind is None:
            return file
        inner = opened.enter_context(_explain_damage(_OPENERS[kind](file, name), kind, name))
        file = _buffer(inner, opened)
    return file


def _buffer(file: Any, opened: ExitStack) -> io.BufferedReader:
    """A reader whose `peek` shows HEAD bytes, or the whole of a shorter file.

    It lets go of the file before that is closed.
    """
    reader = io.BufferedReader(file, HEAD)
    opened.callback(_let_go, reader)
    return reader


def _let_go(reader: io.BufferedReader | io.TextIOWrapper) -> None:
    with suppress(ValueError):  # closed, or let go, already
        reader.detach()


def find_compression(head: bytes) -> str | None:
    """gzip, zst, bz2 or xz, by the first bytes of a file; None for anything else."""
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    skippable = head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F
    if head.startswith(b"\x28\xb5\x2f\xfd") or skippable:
        return "zst"
    # After BZh and the level come the digits of pi, or of its root where nothing is compressed.
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bz2"
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    return None


@contextmanager
def _explain_damage(
    opened: AbstractContextManager[Any], kind: str, name: str
) -> Iterator[BinaryIO]:
    try:
        with opened as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise GrowkitError(f"{name} is not a whole {kind} file: {error}") from error
    except OSError as error:
        # bz2 has no error of its own: damage is an OSError without a number.
        if error.errno is not None:
            raise
        raise GrowkitError(f"{name} is not a whole {kind} file: {error}") from error


@contextmanager
def _open_zstandard(file: BinaryIO, name: str) -> Iterator[BinaryIO]:
    try:
        zstd = importlib.import_module("compression.zstd")  # Python 3.14 and later
    except ImportError:
        zstd = import_optional("backports.zstd", name)
    options = {zstd.DecompressionParameter.window_log_max: _LARGEST_WINDOW}
    try:
        with zstd.open(file, options=options) as inner:
            yield inner
    except zstd.ZstdError as error:
        raise GrowkitError(f"{name} is not a whole zst file: {error}") from error


_OPENERS: dict[str, Callable[[Any, str], AbstractContextManager[Any]]] = {
    "gzip": lambda file, name: gzip.GzipFile(fileobj=file, mode="rb"),
    "zst": _open_zstandard,
    "bz2": lambda file, name: bz2.BZ2File(file),
    "xz": lambda file, name: lzma.LZMAFile(file),  # noqa: SIM115 (the caller closes it)
}


def import_optional(module: str, name: str) -> Any:
    """A package that only some files need. Raises UsageError, with its name, without it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.removesuffix(".parquet").removesuffix(".ipc")
        raise UsageError(
            f"reading {name} needs the package {package}: pip install {package}"
        ) from None


class _Recoder(io.RawIOBase):
    """Text in an encoding that its byte order mark names, read as UTF-8."""

    def __init__(self, file: io.BufferedReader, encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding=encoding, newline="")
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or a part of it; 0 at the end."""
        if not self._left:
            self._left = self._text.read(len(buffer)).encode()
        part = self._left[: len(buffer)]
        self._left = self._left[len(part) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """Let go of the file, which others close."""
        _let_go(self._text)
        super().close()


def _recode(file: io.BufferedReader, opened: ExitStack) -> io.BufferedReader:
    head = file.peek(HEAD)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return _buffer(opened.enter_context(_Recoder(file, encoding)), opened)
    return file


def describe_foreign(head: bytes) -> str | None:
    """What a file is that only passes for text, and what to do about it; None for text."""
    for offset, magic, words in _FOREIGN:
        if head[offset:].startswith(magic):
            return words
    if head.count(0) > _MOST_ZEROS * len(head):
        return "binary, or UTF-16 without a byte order mark; convert it to UTF-8"
    return None


def parse_json(text: str, where: str, strict: bool = True) -> Any:
    """A JSON document. Raises GrowkitError for what is none, and for one that nests too deeply.

    strict: refuse control characters in strings, as the standard does. Whole numbers of thousands
    of digits become floats.
    """
    try:
        return _DECODERS[strict].decode(text)
    except RecursionError:
        raise GrowkitError(f"{where} nests too deeply to be read") from None
    except ValueError as error:
        raise GrowkitError(f"{where} is not JSON: {error}") from error


def _read_whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


_DECODERS = {
    strict: json.JSONDecoder(strict=strict, parse_int=_read_whole_number)
    for strict in (True, False)
}


def holds_json_lines(head: bytes, key: str = TEXT) -> bool:
    """Whether a file is JSON lines with a text each under `key`, by its first HEAD bytes.

    It is where most lines are: a broken one among them is then named, and not read as prose.
    """
    lines = _split_lines(head)
    if not lines and head:
        return re.match(rb'(\xef\xbb\xbf)?\s*\{\s*"', head) is not None and _names(head, key)
    return _are_most(lines, lambda line: _is_document(_parse_line(line), key))


def describe_other_objects(head: bytes, key: str = TEXT, advice: str = "") -> str | None:
    """What a file is that holds JSON objects without a text, one a line, and what to do about it.

    None for any other file. One such line alone may be anything. advice: what else may be done.
    """
    lines = _split_lines(head)
    if len(lines) < 2 or not _are_most(lines, lambda line: isinstance(_parse_line(line), dict)):
        return None
    return (
        f'of JSON objects, one a line, without a text under "{key}"; '
        f"{advice or 'give their texts that name'}, or rename the file to .md to have it read as "
        f"it stands"
    )


def _split_lines(head: bytes) -> list[bytes]:
    """The whole lines at a file's beginning that are not blank."""
    lines = head.split(b"\n")
    if len(head) >= HEAD:
        lines.pop()  # cut off
    return [line for line in lines if line.strip()]


def _are_most(lines: list[bytes], holds: Callable[[bytes], bool]) -> bool:
    return sum(map(holds, lines)) * 2 > len(lines)


def holds_json_documents(head: bytes, key: str = TEXT) -> bool:
    """Whether a file is JSON lines or a JSON array of objects with a text, by its first bytes."""
    if not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return holds_json_lines(head, key)
    text = head.decode(errors="ignore").lstrip(MARK).lstrip()[1:].lstrip()
    try:
        first, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return len(head) >= HEAD and _names(head, key)
    return _is_document(first, key)


def _names(head: bytes, key: str) -> bool:
    """Whether a key stands anywhere in the first bytes of a file."""
    return json.dumps(key, ensure_ascii=False).encode() in head


def _is_document(value: Any, key: str) -> bool:
    return isinstance(value, dict) and isinstance(value.get(key, 0), str | None)


def _parse_line(line: bytes) -> Any:
    """The JSON object of a line; None for any other line."""
    line = line.removeprefix(b"\xef\xbb\xbf").strip()
    if not line.startswith(b"{"):
        return None
    try:
        return parse_json(line.decode(), "it")
    except (GrowkitError, UnicodeDecodeError):
        return None
