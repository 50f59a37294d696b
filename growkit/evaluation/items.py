"""Items of the tasks in local files: find, read and check them, make the harness's documents.

Every task has published columns. They become the few columns that the task files name (context,
query, choices, gold, ...), by the same rules as in the harness's own tasks.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from growkit.errors import GrowkitError, UsageError
from growkit.evaluation.catalogue import BPB, SEED, TASKS
from growkit.textfiles import (
    HEAD,
    JSON_LINES,
    describe_foreign,
    describe_other_objects,
    get_ending,
    holds_json_lines,
    open_text,
    parse_json,
    strip_compression,
)

T = TypeVar("T")
Row = dict[str, Any]
# Files that bits per byte are taken of; each may be compressed as well.
PROSE = (".md", ".py", ".rst", ".tex")  # never JSON lines, whatever they begin with
TEXTS = (".txt", *PROSE, *JSON_LINES)


@dataclass
class Items:
    """The documents of a task: those drawn, of `total`.

    files: sha256 by path. empty: how many documents were left out because they are empty.
    """

    name: str
    documents: list[Row]
    total: int
    files: dict[str, str] = field(default_factory=dict)
    empty: int = 0


def find_task_file(directory: Path, task: str) -> Path | None:
    """The one file TASK*.jsonl, compressed or not, or None. Raises UsageError for several."""
    found = [path for path in sorted(directory.iterdir()) if _is_task_file(path, task)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UsageError(f"{directory} has several files for {task}: {names}; keep one")
    return found[0] if found else None


def _is_task_file(path: Path, task: str) -> bool:
    named = path.name.lower().startswith(task) and get_ending(path.name) in JSON_LINES
    return named and path.is_file()


def list_passed_over(directory: Path) -> list[str]:
    """The files of a directory of items that no task and no part is read from, as bpb/a.pdf."""
    folder = directory / BPB
    passed = [
        path
        for path in directory.iterdir()
        if path.is_file() and not any(_is_task_file(path, task) for task in TASKS)
    ]
    if folder.is_dir():
        passed += [path for path in folder.rglob("*") if path.is_file() and not is_text(path)]
    return sorted(str(path.relative_to(directory)) for path in passed)


def find_parts(directory: Path) -> dict[str, list[Path]]:
    """The texts of bits per byte: part -> its files. A part is a file or a folder in `bpb/`.

    It has the name of the file or folder, without the file's endings. Raises UsageError if two have
    the same name.
    """
    folder = directory / BPB
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    found: dict[str, list[Path]] = {}
    for path in children:
        candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
        texts = [file for file in candidates if is_text(file)]
        if not texts:
            continue
        part = _name_part(path)
        if part in found:
            raise UsageError(
                f"{folder} has both {found[part][0].name} and {path.name}, two texts of one name"
            )
        found[part] = texts
    return found


def _name_part(path: Path) -> str:
    """The name of a part: without a file's endings; the Pile's parts as they are published."""
    name = path.name
    if not path.is_dir():
        name = name[: len(strip_compression(name))].rsplit(".", 1)[0]
    if name.lower().startswith("pile"):
        return name.lower().replace("-", "_")
    return name


def is_text(path: Path) -> bool:
    """Whether bits per byte are taken of this file."""
    if not path.is_file() or path.name.startswith("."):
        return False
    return get_ending(path.name) in TEXTS


def read_items(task: str, path: Path, limit: int | None) -> Items:
    """The items of a task in a jsonl file, `limit` of them by a fixed seed (None: all).

    Raises GrowkitError, naming the line, for a file that is broken.
    """
    items = Items(task, [], 0, {str(path): hash_file(path)})

    def documents() -> Iterator[Row]:
        for line, row in read_rows(path):
            items.total += 1
            yield DOCUMENTS[task](Columns(row, f"{path}, line {line}"))

    items.documents = draw_sample(documents(), limit)
    if not items.documents:
        raise GrowkitError(f"{path} holds no items")
    return items


def read_texts(name: str, files: list[Path], limit: int | None) -> Items:
    """The documents of a part, `limit` of them by a fixed seed (None: all).

    Empty documents are left out and counted. Raises GrowkitError if there is no other.
    """
    items = Items(f"{BPB}/{name}", [], 0, {str(path): hash_file(path) for path in files})

    def texts() -> Iterator[Row]:
        for path in files:
            for text in _read_documents(path):
                if text.strip():
                    items.total += 1
                    yield {"text": text}
                else:
                    items.empty += 1

    items.documents = draw_sample(texts(), limit)
    if not items.documents:
        where = files[0] if len(files) == 1 else files[0].parent
        raise GrowkitError(f"{where} holds no text: every document is empty")
    return items


def draw_sample(documents: Iterable[T], limit: int | None) -> list[T]:
    """All documents, or `limit` of them by a fixed seed, in their order.

    One pass over the documents, each as likely to be drawn: Vitter's algorithm R (ACM Transactions
    on Mathematical Software 11, 1985).
    """
    generator = random.Random(SEED)
    kept: list[tuple[int, T]] = []
    for number, document in enumerate(documents):
        if limit is None or len(kept) < limit:
            kept.append((number, document))
            continue
        place = generator.randrange(number + 1)
        if place < limit:
            kept[place] = (number, document)
    return [document for _, document in sorted(kept, key=lambda pair: pair[0])]


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Columns:
    """A row of a file, and where it is, for the messages. Its methods raise GrowkitError."""

    row: Row
    where: str

    def make_error(self, words: str) -> GrowkitError:
        """The error that this row is broken."""
        return GrowkitError(f"{self.where}: {words}")

    def value(self, column: str) -> Any:
        """The value of a column."""
        if column not in self.row:
            known = ", ".join(self.row) or "none"
            raise self.make_error(f"the column {column!r} is missing; the line has {known}")
        return self.row[column]

    def text(self, column: str, may_be_empty: bool = False) -> str:
        """A column that holds text."""
        return self._check_text(self.value(column), f"the column {column!r}", may_be_empty)

    def texts(self, column: str) -> list[str]:
        """A column that holds a list of texts."""
        value = self.value(column)
        what = f"the column {column!r}"
        if not isinstance(value, list) or not value:
            raise self.make_error(f"{what} must be a list of texts, got {value!r}")
        return [self._check_text(part, f"{what}, number {n}") for n, part in enumerate(value)]

    def number(self, column: str, choices: int) -> int:
        """A column that holds the number of a choice, from 0."""
        value = self.value(column)
        digits = not isinstance(value, bool) and re.fullmatch(r"\d+", str(value))
        if not digits or int(value) >= choices:
            raise self.make_error(
                f"the column {column!r} must be a number from 0 to {choices - 1}, got {value!r}"
            )
        return int(value)

    def _check_text(self, value: Any, what: str, may_be_empty: bool = False) -> str:
        if not isinstance(value, str):
            raise self.make_error(f"{what} must be text, got {value!r}")
        if not may_be_empty and not value.strip():
            raise self.make_error(f"{what} is empty")
        if re.search("[\ud800-\udfff]", value):
            raise self.make_error(f"{what} is not text: it has half a surrogate pair")
        return value


def _lambada(columns: Columns) -> Row:
    """The last word is the target, with the space before it."""
    text = columns.text("text")
    context, space, last = text.rpartition(" ")
    if not space or not last:
        raise columns.make_error(
            "the column 'text' must be a passage and a last word, with a space between them"
        )
    return {"context": context, "target": f" {last}"}


def _piqa(columns: Columns) -> Row:
    choices = [columns.text("sol1"), columns.text("sol2")]
    return {
        "query": f"Question: {columns.text('goal')}\nAnswer:",
        "choices": choices,
        "gold": columns.number("label", len(choices)),
    }


def _hellaswag(columns: Columns) -> Row:
    context = columns.text("ctx_a")
    begun = columns.text("ctx_b", may_be_empty=True).capitalize()
    query = f"{columns.text('activity_label')}: {context} {begun}"
    endings = columns.texts("endings")
    return {
        "query": _remove_marks(query),
        "choices": [_remove_marks(ending) for ending in endings],
        "gold": columns.number("label", len(endings)),
    }


def _remove_marks(text: str) -> str:
    """Text without the marks in brackets that WikiHow's articles have."""
    titled = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", titled).replace("  ", " ")


def _winogrande(columns: Columns) -> Row:
    """Each choice is the sentence up to the gap with one option in it; scored is what follows."""
    before, gap, after = columns.text("sentence").partition("_")
    if not gap or not after.strip():
        raise columns.make_error(
            "the column 'sentence' must have a gap, written _, and text after it"
        )
    answer = columns.value("answer")
    if answer not in ("1", "2", 1, 2):
        raise columns.make_error(f"the column 'answer' must be 1 or 2, got {answer!r}")
    choices = [before + columns.text(option) for option in ("option1", "option2")]
    return {"gold": int(answer) - 1, "choices": choices, "ending": after.strip()}


def _arc(columns: Columns) -> Row:
    """With choices {text, label} and answerKey as published, or choices [text] and gold."""
    choices = columns.value("choices")
    if isinstance(choices, dict):
        inner = Columns(choices, f"{columns.where}, in the column 'choices'")
        texts = inner.texts("text")
        labels = inner.texts("label")
        key = columns.text("answerKey")
        if len(labels) != len(texts) or key not in labels:
            raise columns.make_error(
                f"the column 'answerKey' must be one of the {len(texts)} labels {labels}, "
                f"got {key!r}"
            )
        gold = labels.index(key)
    else:
        texts = columns.texts("choices")
        gold = columns.number("gold", len(texts))
    return {
        "query": f"Question: {columns.text('question')}\nAnswer:",
        "choices": texts,
        "gold": gold,
    }


DOCUMENTS: dict[str, Callable[[Columns], Row]] = {
    "lambada": _lambada,
    "piqa": _piqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_easy": _arc,
    "arc_challenge": _arc,
}


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, object) of JSON lines. Raises GrowkitError for a line that is not an object."""
    with _open(path) as file:
        yield from _read_lines(path, file)


# Its earlier name, which scripts of users import.
rows_of = read_rows


def _read_lines(path: Path, file: BufferedReader) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, 1):
        where = f"{path}, line {number}"
        text = _decode(line, where)
        if not text.strip():
            continue
        row = parse_json(text, where)
        if not isinstance(row, dict):
            raise GrowkitError(f"{where}: must be a JSON object, got {type(row).__name__}")
        yield number, row


def _read_documents(path: Path) -> Iterator[str]:
    """The documents of a file: the "text" of each of its JSON lines, else the whole file."""
    ending = get_ending(path.name)
    with _open(path) as file:
        are_lines = ending not in PROSE and holds_json_lines(file.peek(HEAD))
        if ending not in JSON_LINES and not are_lines:
            foreign = None if ending in PROSE else describe_other_objects(file.peek(HEAD))
            if foreign:
                raise GrowkitError(f"{path} is {foreign}")
            yield _decode(file.read(), str(path))
            return
        for number, row in _read_lines(path, file):
            # A null is an empty document, as it is where text is tokenized.
            if row.get("text", row) is None:
                row["text"] = ""
            yield Columns(row, f"{path}, line {number}").text("text", may_be_empty=True)


def _decode(data: bytes, where: str) -> str:
    """UTF-8 text, without a byte order mark. Raises GrowkitError."""
    mark = data.startswith(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8-sig" if mark else "utf-8")
    except UnicodeDecodeError as problem:
        raise GrowkitError(
            f"{where}: not UTF-8 text (byte {problem.start} is 0x{data[problem.start]:02x})"
        ) from None


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    """A file that is open for reading, decompressed. Raises GrowkitError for what is not text."""
    with open(path, "rb") as raw, open_text(raw, str(path)) as file:
        foreign = describe_foreign(file.peek(HEAD))
        if foreign:
            raise GrowkitError(f"{path} is {foreign}")
        yield file
