"""How a plain text file is cut into documents: not at all, at blank lines, or at every line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BufferedReader

from etils import epath

from growkit.errors import UsageError, did_you_mean
from growkit.textfiles import MARK
from trainer.data.cleaning import Cleaner

WHOLE = "file"

# Where a document begins in its file, in bytes, and its bytes.
Piece = tuple[int, bytes]


def read_plain_text(
    file: BufferedReader, path: epath.Path, cleaner: Cleaner, cut: str = WHOLE
) -> Iterator[str]:
    """The documents of a plain text file. cut: one of CUTS; file takes the file as one document."""
    for offset, data in CUTS[cut](file):
        text = cleaner.decode(data, str(path), offset)
        if text is not None:
            yield text.removeprefix(MARK)


def _take_whole(file: BufferedReader) -> Iterator[Piece]:
    yield 0, file.read()


def _cut_at_lines(file: BufferedReader) -> Iterator[Piece]:
    """Each line that is not blank, without its end."""
    offset = 0
    for line in file:
        if line.strip():
            yield offset, line.rstrip(b"\r\n")
        offset += len(line)


def _cut_at_blank_lines(file: BufferedReader) -> Iterator[Piece]:
    """The lines between blank ones, without the end of the last."""
    offset = 0
    begin = 0
    lines: list[bytes] = []
    for line in file:
        if line.strip():
            begin = begin if lines else offset
            lines.append(line)
        elif lines:
            yield begin, b"".join(lines).rstrip(b"\r\n")
            lines = []
        offset += len(line)
    if lines:
        yield begin, b"".join(lines).rstrip(b"\r\n")


CUTS: dict[str, Callable[[BufferedReader], Iterator[Piece]]] = {
    WHOLE: _take_whole,
    "blank-line": _cut_at_blank_lines,
    "line": _cut_at_lines,
}


def check_cut(word: str) -> None:
    """Raise UsageError for a word that is not a way to cut."""
    if word not in CUTS:
        listed = ", ".join(CUTS)
        near = did_you_mean(word, CUTS)
        raise UsageError(f"--documents must be one of {listed}, got {word!r}{near}")
