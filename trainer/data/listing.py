"""Which files the inputs of a tokenization are: those that are read, and those passed over.

A file that is named is read, whatever it is called. In a directory the endings decide, and what is
passed over is counted by ending, so that nothing is left out in silence.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from etils import epath

from growkit.checkpoint.files import is_remote
from growkit.errors import GrowkitError, UsageError
from growkit.textfiles import (
    ARROW,
    HEAD,
    JSON_LINES,
    PARQUET,
    TEXT,
    get_ending,
    holds_json_documents,
    open_text,
)
from trainer.data.saved_datasets import NOT_OF_DATASET, SavedDatasets

# What is read of a directory; a .json file where it holds documents.
READ = (".txt", ".md", ".rst", ".py", *JSON_LINES, PARQUET, ARROW)
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
# Tables, which would pass for text.
TABLES = (".csv", ".tsv")
_EXAMPLES = 2  # names shown for an ending
_ENDINGS = 8  # shown one by one

Numbered = tuple[int, epath.Path]  # number of the input that a file is from, and the file


@dataclass
class Listing:
    """Files in order, and the names of those that a directory holds besides, by ending.

    key: that a .json file has its texts under.
    """

    key: str = TEXT
    files: list[Numbered] = field(default_factory=list)
    passed: dict[str, list[str]] = field(default_factory=dict)

    def add_input(self, number: int, path: epath.Path) -> None:
        """A file, or all that is under a directory. Raises UsageError where nothing is read."""
        if not path.exists():
            raise UsageError(f"no such file or directory: {path}")
        if not path.is_dir():
            _check_named(path)
            self.files.append((number, path))
            return
        before = len(self.files)
        saved = SavedDatasets()
        for file in self._walk(path):
            if not _is_file(file):
                self._pass_over("broken links, pipes or devices", file.name)
            elif saved.passes_over(file):
                self._pass_over(NOT_OF_DATASET, file.name)
            elif _is_read(file, self.key):
                self.files.append((number, file))
            else:
                self._pass_over(_name_ending(file.name), file.name)
        if len(self.files) == before:
            raise UsageError(
                f"no text files under {path}; looked for {', '.join(READ)}, and these with "
                f"{', '.join(COMPRESSED)}{self._describe_passed('; it holds ')}"
            )

    def _walk(self, directory: epath.Path) -> list[epath.Path]:
        """All files under a directory, sorted; directories behind links are passed over."""
        if is_remote(directory):
            return sorted(folder / name for folder, _, names in directory.walk() for name in names)
        found = []
        for folder, inner, names in os.walk(directory, onerror=_refuse_unread):
            links = [name for name in inner if os.path.islink(os.path.join(folder, name))]
            for name in links:
                self._pass_over("linked directories", name)
            found += [epath.Path(folder) / name for name in names]
        return sorted(found)

    def _pass_over(self, ending: str, name: str) -> None:
        self.passed.setdefault(ending, []).append(name)

    def describe(self, files: Sequence[Numbered]) -> str:
        """A line: how many of these files are read, and how many passed over, by ending."""
        counts = Counter(_name_ending(path.name) for _, path in files)
        read = ", ".join(f"{count:,} {ending}" for ending, count in counts.most_common())
        total = "1 file" if len(files) == 1 else f"{len(files):,} files"
        return f"reading {total} ({read}){self._describe_passed('; passed over: ')}"

    def _describe_passed(self, begin: str) -> str:
        """How many files were passed over, with some of their names; empty for none."""
        if not self.passed:
            return ""
        listed = sorted(self.passed.items(), key=lambda item: (-len(item[1]), item[0]))
        shown = _ENDINGS if len(listed) > _ENDINGS + 1 else len(listed)
        words = [_describe_ending(ending, names) for ending, names in listed[:shown]]
        others = listed[shown:]
        if others:
            count = sum(len(names) for _, names in others)
            words.append(f"{count:,} of {len(others)} other endings")
        return begin + ", ".join(words)


def list_inputs(texts: Sequence[str | os.PathLike[str]], key: str = TEXT) -> Listing:
    """The files of all inputs, sorted within each. Raises UsageError where there are none.

    key: that a .json file has its texts under.
    """
    if not texts:
        raise UsageError("name at least one text file or directory to tokenize")
    listing = Listing(key)
    for number, text in enumerate(texts):
        listing.add_input(number, epath.Path(os.path.expanduser(text)))
    return listing


def _is_file(path: epath.Path) -> bool:
    """Whether a path on this machine is a file; what a bucket lists is one."""
    return is_remote(path) or os.path.isfile(path)


def is_pipe(path: epath.Path) -> bool:
    """Whether a file can be read only once."""
    return not is_remote(path) and stat.S_ISFIFO(os.stat(path).st_mode)


def _check_named(path: epath.Path) -> None:
    """Refuse a file that is named and cannot hold text."""
    if not _is_file(path) and not is_pipe(path):
        raise UsageError(f"{path} is a device or a socket, and text is read from files and pipes")
    ending = get_ending(path.name)
    if ending in TABLES:
        raise UsageError(
            f"{path} is a table, which is not text: write its texts as JSON lines or Parquet, or "
            f"rename it to .txt to have it read as it stands"
        )


def _refuse_unread(error: OSError) -> None:
    raise GrowkitError(f"cannot read the directory {error.filename}: {error.strerror}") from error


def _is_read(path: epath.Path, key: str) -> bool:
    """Whether a file of a directory holds text, by its ending."""
    ending = get_ending(path.name)
    if ending not in READ:
        return False
    return ending != ".json" or _holds_documents(path, key)


def _holds_documents(path: epath.Path, key: str) -> bool:
    """Whether a .json file is JSON lines or an array of documents, and no settings or the like."""
    try:
        with path.open("rb") as raw, open_text(cast(BinaryIO, raw), str(path)) as file:
            return holds_json_documents(file.peek(HEAD), key)
    except UsageError:
        raise
    except GrowkitError:
        # What is broken is read, and refused with its name.
        return True


def _name_ending(name: str) -> str:
    """The ending of a name in small letters, with that of a compression: ".jsonl.gz"."""
    ending = get_ending(name)
    compression = os.path.splitext(name.lower())[1]
    if compression == ending:
        return ending or "without an ending"
    return f"{ending}{compression}"


def _describe_ending(ending: str, names: Iterable[str]) -> str:
    """`3 .pdf (a.pdf, b.pdf, ...)`."""
    listed = [name if name.isprintable() else ascii(name) for name in sorted(names)]
    shown = listed[:_EXAMPLES] + ["..."] * (len(listed) > _EXAMPLES)
    return f"{len(listed):,} {ending} ({', '.join(shown)})"
