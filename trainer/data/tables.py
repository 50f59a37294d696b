"""The text column of tables: Parquet files, and Arrow files as `datasets` saves them.

An Arrow file is a stream of record batches, or such a stream between a magic word and a footer.
Both need pyarrow, which is imported when such a file is read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from typing import Any

from etils import epath

from growkit.errors import GrowkitError
from growkit.textfiles import ARROW, ARROW_MAGIC, PARQUET, get_ending, import_optional
from trainer.data.cleaning import Cleaner
from trainer.data.fields import Fields

_PARQUET_MAGIC = b"PAR1"
_PARQUET_ROWS = 100  # read at once
# What stands before the stream in an Arrow file that has a footer: the magic word, and two zeros.
_ARROW_LEAD = 8
# How tables begin; the last is a stream of record batches.
_TABLES = (_PARQUET_MAGIC, ARROW_MAGIC, b"\xff\xff\xff\xff")

Reader = Callable[[BufferedReader, epath.Path, Cleaner, Fields], Iterator[str]]


def choose_table_reader(path: epath.Path, head: bytes) -> Reader | None:
    """The function that reads a table, by the file's ending or first bytes; None for no table."""
    ending = get_ending(path.name)
    if ending == PARQUET or head.startswith(_PARQUET_MAGIC):
        return read_parquet
    if ending == ARROW or head.startswith(ARROW_MAGIC):
        return read_arrow
    return None


def begins_as_table(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a table, and of no other kind of file."""
    return head.startswith(_TABLES)


def read_parquet(
    file: BufferedReader, path: epath.Path, cleaner: Cleaner, fields: Fields
) -> Iterator[str]:
    """The text column of a Parquet file, row by row; a null is an empty document."""
    parquet = import_optional("pyarrow.parquet", str(path))
    with _explain_damage(path, "Parquet"):
        table = parquet.ParquetFile(file)
        _check_column(table.schema_arrow, path, fields.column)
        batches = table.iter_batches(_PARQUET_ROWS, columns=[fields.column])
        yield from _read_batches(batches, path, cleaner, fields.column)


def read_arrow(
    file: BufferedReader, path: epath.Path, cleaner: Cleaner, fields: Fields
) -> Iterator[str]:
    """The text column of an Arrow file, row by row; a null is an empty document."""
    ipc = import_optional("pyarrow.ipc", str(path))
    if file.peek(_ARROW_LEAD).startswith(ARROW_MAGIC):
        file.read(_ARROW_LEAD)
    with _explain_damage(path, "Arrow"):
        stream = ipc.open_stream(file)
        _check_column(stream.schema, path, fields.column)
        yield from _read_batches(stream, path, cleaner, fields.column)


@contextmanager
def _explain_damage(path: epath.Path, kind: str) -> Iterator[None]:
    arrow = importlib.import_module("pyarrow")
    try:
        yield
    except arrow.ArrowException as error:
        raise GrowkitError(
            f"{path} is not a whole {kind} file of text: {' '.join(str(error).split())}"
        ) from error


def _check_column(schema: Any, path: epath.Path, column: str) -> None:
    """Raise GrowkitError unless a table has a column of strings of this name."""
    arrow = importlib.import_module("pyarrow")
    types = {field.name: field.type for field in schema}
    if types.get(column) in (arrow.string(), arrow.large_string(), arrow.string_view()):
        return
    present = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    raise GrowkitError(
        f'{path} must have a column "{column}" of strings; it has {present}; name the column of '
        f"its text with --column"
    )


def _read_batches(batches: Any, path: epath.Path, cleaner: Cleaner, column: str) -> Iterator[str]:
    arrow = importlib.import_module("pyarrow")
    row = 0
    for rows in batches:
        # As bytes: files exist whose strings are not UTF-8.
        for data in rows.column(column).cast(arrow.large_binary()).to_pylist():
            text = cleaner.decode(data or b"", f"row {row} of {path}", 0)
            row += 1
            if text is not None:
                yield text
