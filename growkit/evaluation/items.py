"""Items of the tasks in local files: found in a directory, read, checked, and made into the harness's documents.

Every task has its published columns; here they become the few columns that the task files name (context, query,
choices, gold, ...), by the same rules as the harness's own tasks. Knows files and columns; leaves asking to `harness`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from growkit.errors import GrowkitError, UsageError
from growkit.evaluation.catalogue import BPB, SEED

T = TypeVar("T")
Row = dict[str, Any]
TEXTS = (".jsonl", ".txt", ".md", ".py", ".rst", ".tex")


@dataclass
class Items:
    """The documents of a task: those chosen of `total`. files: sha256 by path. empty: documents left out as empty."""

    name: str
    documents: list[Row]
    total: int
    files: dict[str, str] = field(default_factory=dict)
    empty: int = 0


def find_task_file(directory: Path, task: str) -> Path | None:
    """The one file of a task, TASK*.jsonl or TASK*.jsonl.gz; None without one. Raises UsageError for several."""
    found = sorted([*directory.glob(f"{task}*.jsonl"), *directory.glob(f"{task}*.jsonl.gz")])
    if len(found) > 1:
        raise UsageError(
            f"{directory} has several files for {task}: {', '.join(path.name for path in found)}; keep one"
        )
    return found[0] if found else None


def find_parts(directory: Path) -> dict[str, list[Path]]:
    """The files of bits per byte by part: a file or a folder of `bpb/` each, named without its endings."""
    folder = directory / BPB
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        files = (
            sorted(file for file in path.rglob("*") if is_text(file)) if path.is_dir() else [path]
        )
        files = [file for file in files if is_text(file)]
        if not files:
            continue
        name = path.name if path.is_dir() else path.name.removesuffix(".gz").rsplit(".", 1)[0]
        if name in found:
            raise UsageError(
                f"{folder} has both {found[name][0].name} and {path.name}, two texts of one name"
            )
        found[name.lower().replace("-", "_") if name.lower().startswith("pile") else name] = files
    return found


def is_text(path: Path) -> bool:
    """Whether a file is one that bits per byte are taken of."""
    return (
        path.is_file()
        and not path.name.startswith(".")
        and path.name.removesuffix(".gz").endswith(TEXTS)
    )


def read_items(task: str, path: Path, limit: int | None) -> Items:
    """The items of a task in a jsonl file, `limit` of them by a fixed seed. Raises GrowkitError for a broken one."""
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
    """The documents of a part, `limit` of them by a fixed seed; empty ones are left out and counted."""
    items = Items(f"{BPB}/{name}", [], 0, {str(path): hash_file(path) for path in files})

    def texts() -> Iterator[Row]:
        for path in files:
            for text in _texts(path):
                if text.strip():
                    items.total += 1
                    yield {"text": text}
                else:
                    items.empty += 1

    items.documents = draw_sample(texts(), limit)
    if not items.documents:
        raise GrowkitError(
            f"{files[0] if len(files) == 1 else files[0].parent} holds no text: every document is empty"
        )
    return items


def draw_sample(documents: Iterable[T], limit: int | None) -> list[T]:
    """All documents, or `limit` of them by a fixed seed (Vitter's algorithm R), in their order."""
    generator = random.Random(SEED)
    kept: list[tuple[int, T]] = []
    for number, document in enumerate(documents):
        if limit is None or len(kept) < limit:
            kept.append((number, document))
        elif (place := generator.randrange(number + 1)) < limit:
            kept[place] = (number, document)
    return [document for _, document in sorted(kept, key=lambda pair: pair[0])]


def hash_file(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Columns:
    """A row of a file, and where it stands for whoever must repair it."""

    row: Row
    where: str

    def make_error(self, words: str) -> GrowkitError:
        return GrowkitError(f"{self.where}: {words}")

    def value(self, column: str) -> Any:
        if column not in self.row:
            raise self.make_error(
                f"the column {column!r} is missing; the line has {', '.join(self.row) or 'none'}"
            )
        return self.row[column]

    def text(self, column: str, may_be_empty: bool = False) -> str:
        return self.check_text(self.value(column), f"the column {column!r}", may_be_empty)

    def texts(self, column: str) -> list[str]:
        return self.check_texts(self.value(column), f"the column {column!r}")

    def check_texts(self, value: Any, what: str) -> list[str]:
        if not isinstance(value, list) or not value:
            raise self.make_error(f"{what} must be a list of texts, got {value!r}")
        return [self.check_text(part, f"{what}, number {number}") for number, part in enumerate(value)]

    def check_text(self, value: Any, what: str, may_be_empty: bool = False) -> str:
        if not isinstance(value, str):
            raise self.make_error(f"{what} must be text, got {value!r}")
        if not may_be_empty and not value.strip():
            raise self.make_error(f"{what} is empty")
        if re.search("[\ud800-\udfff]", value):
            raise self.make_error(f"{what} is not text: it has half a surrogate pair")
        return value

    def number(self, column: str, choices: int) -> int:
        value = self.value(column)
        if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)) or int(value) >= choices:
            raise self.make_error(
                f"the column {column!r} must be a number from 0 to {choices - 1}, got {value!r}"
            )
        return int(value)


def _lambada(columns: Columns) -> Row:
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
    context = f"{columns.text('ctx_a')} {columns.text('ctx_b', may_be_empty=True).capitalize()}"
    endings = columns.texts("endings")
    return {
        "query": _without_marks(f"{columns.text('activity_label')}: {context}"),
        "choices": [_without_marks(ending) for ending in endings],
        "gold": columns.number("label", len(endings)),
    }


def _without_marks(text: str) -> str:
    """Without the marks in brackets that WikiHow's articles have."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(columns: Columns) -> Row:
    before, gap, after = columns.text("sentence").partition("_")
    if not gap or not after.strip():
        raise columns.make_error("the column 'sentence' must have a gap, written _, and text after it")
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
        texts, labels, key = inner.texts("text"), inner.texts("label"), columns.text("answerKey")
        if len(labels) != len(texts) or key not in labels:
            raise columns.make_error(
                f"the column 'answerKey' must be one of the {len(texts)} labels {labels}, got {key!r}"
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
    """(line number, object) of a jsonl file. Raises GrowkitError for a line that is none."""
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise GrowkitError(f"{path}, line {number}: not JSON ({problem})") from None
        if not isinstance(row, dict):
            raise GrowkitError(
                f"{path}, line {number}: must be a JSON object, got {type(row).__name__}"
            )
        yield number, row


def _texts(path: Path) -> Iterator[str]:
    """The documents of a file: those of a jsonl file under "text", else the whole of it."""
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        for number, row in read_rows(path):
            yield Columns(row, f"{path}, line {number}").text("text", may_be_empty=True)
    else:
        yield _decoded(path, b"".join(_bytes(path)), "")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of those that are not blank."""
    for number, line in enumerate(_bytes(path), 1):
        if line.strip():
            yield number, _decoded(path, line, f", line {number}")


def _decoded(path: Path, data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as problem:
        raise GrowkitError(
            f"{path}{where}: not UTF-8 text (byte {problem.start} is 0x{data[problem.start]:02x})"
        ) from None


def _bytes(path: Path) -> Iterator[bytes]:
    """The lines of a file as bytes, unzipped where its name says so."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield from file
    except (gzip.BadGzipFile, zlib.error, EOFError) as problem:
        raise GrowkitError(f"{path} is not a whole gzip file ({problem})") from None
