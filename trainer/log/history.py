"""The metrics of a run: rows of metrics.csv, after the rows of the runs that it grew from.

Every number is written with all its digits, so that a resumed run's file equals an uninterrupted
one's.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from contextlib import suppress
from typing import Any

from etils import epath

from growkit.checkpoint.files import is_remote, refuse_pointer, sync_file
from growkit.errors import GrowkitError
from trainer.devices.hosts import is_writer, write_once

METRICS = "metrics.csv"
EARLIER = "history.csv"
COLUMNS = (
    "step",
    "tokens",
    "flops",
    "loss",
    "validation_loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    # Of a mixture: the loss that balances experts, the largest and the smallest load of one.
    "balance_loss",
    "busiest",
    "idlest",
    "scores",
    "validation_losses",
    "event",
)
REMEDY = "remove the file, and the run makes it again from its last checkpoint"
# The columns that every row has, and those that hold a number or nothing.
NEEDED = ("step", "tokens", "flops", "loss", "validation_loss", "event")
NUMBERS = (
    "tokens",
    "flops",
    "loss",
    "validation_loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "balance_loss",
    "busiest",
    "idlest",
)
# The columns that hold a JSON object or nothing.
OBJECTS = ("scores", "validation_losses")
# The first words of the events that begin a run, and that mark a growth within it.
START = "start"
GROWN = "grown"
# A checkpoint carries about this many rows with nothing but a training loss, and all rows that have
# a value in one of the columns of CARRIED_WHOLE.
CARRIED = 1000
CARRIED_WHOLE = ("validation_loss", "scores", "event")

Row = dict[str, str]


def parse_rows(text: str, where: object = "the metrics") -> list[Row]:
    """The rows of a CSV text, without a last line that a kill cut off.

    where: what the text is, for errors. Raises GrowkitError naming a line that is not a row.
    """
    complete = text[: text.rfind("\n") + 1]
    lines = csv.reader(io.StringIO(complete))
    rows: list[Row] = []
    try:
        header = next(lines, [])
        _check_header(header)
        for line in lines:
            if line:
                rows.append(_parse_row(header, line))
    except (ValueError, RecursionError, csv.Error) as problem:
        raise GrowkitError(
            f"{where}, line {max(lines.line_num, 1)}, is not a row of metrics ({problem})"
        ) from None
    return rows


def _check_header(header: list[str]) -> None:
    """Raise ValueError for a first line without the columns that every row has."""
    missing = [column for column in NEEDED if header and column not in header]
    if missing:
        raise ValueError(f"the header has no {missing[0]}")


def _parse_row(header: list[str], line: list[str]) -> Row:
    """A row by column. Raises ValueError for what no run wrote."""
    if len(line) != len(header):
        raise ValueError(f"it has {len(line)} columns and the header {len(header)}")
    row = dict(zip(header, line, strict=True))
    if not row["step"].isdecimal():
        raise ValueError(f"the step is {row['step'][:20]!r}")
    for column in NUMBERS:
        if row.get(column):
            float(row[column])
    for column in OBJECTS:
        if not isinstance(json.loads(row.get(column) or "{}"), dict):
            raise ValueError(f"the {column} are not an object")
    return row


def render_rows(rows: list[Row]) -> str:
    """Rows as a CSV text, with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_rows(path: epath.Path) -> list[Row]:
    """The rows of a file, none where there is no file. Raises GrowkitError for a damaged one."""
    if not path.exists():
        return []
    content = path.read_bytes()
    refuse_pointer(content, path)
    try:
        text = content.decode()
    except UnicodeDecodeError as problem:
        raise GrowkitError(
            f"{path} is damaged: byte {problem.start} is not text; {REMEDY}"
        ) from None
    try:
        return parse_rows(text, path)
    except GrowkitError as problem:
        raise GrowkitError(f"{problem}; {REMEDY}") from None


class History:
    """The rows of a run, in RUN/metrics.csv, and `earlier` its source's, in RUN/history.csv."""

    def __init__(self, run: epath.Path):
        self.run = run
        self.earlier = read_rows(run / EARLIER)
        self.rows = read_rows(run / METRICS)

    def begin(self, earlier: bytes) -> None:
        """Start without rows. earlier: the CSV text that a source carried, which may be empty."""
        if earlier:
            write_once(self.run / EARLIER, earlier)
        self.earlier = _parse_carried(earlier)
        self.rows = []
        self.flush()

    def restore(self, carried: bytes, step: int) -> int:
        """Bring the rows to those that the checkpoint of a step carries.

        A checkpoint carries all rows until its step, plain training losses thinned out. What was
        lost of them is made again. A validation at its step that it does not have is forgotten, as
        where a run was killed before it saved again, and is done again. Returns how
        many rows were lost. `keep_until` writes them.
        """
        rows = _parse_carried(carried)
        if not rows:
            return 0
        own = _find_start(rows)
        if not self.earlier and own:
            self.earlier = rows[:own]
            write_once(self.run / EARLIER, render_rows(self.earlier).encode())
        known = _index(rows[own:])
        found = _index(self.rows)
        lost = [row for name, row in known.items() if name not in found]
        kept = [
            known.get(name, row)
            for name, row in found.items()
            if row["step"] != str(step) or not _is_carried_whole(row) or name in known
        ]
        # Sorting keeps the order of the rows of one step.
        self.rows = sorted(kept + lost, key=lambda row: int(row["step"]))
        return len(lost)

    def keep_until(self, step: int) -> None:
        """Remove the rows after `step`, which a resumed run will write again."""
        self.rows = [row for row in self.rows if int(row["step"]) <= step]
        self.flush()

    def forget_growth(self, step: int) -> None:
        """Remove the row of a growth at `step` and all after it: the growth will be done again."""
        for number, row in enumerate(self.rows):
            if row["step"] == str(step) and row["event"].startswith(GROWN):
                self.rows = self.rows[:number]
                break
        self.flush()

    def add(self, **values: Any) -> Row:
        """Append a row of values by column; returns it as text."""
        row = {column: _format_value(values.get(column)) for column in COLUMNS}
        self.rows.append(row)
        # Objects in a bucket cannot be appended to: there `flush` writes the whole file.
        if is_writer() and not is_remote(self.run):
            _, line = render_rows([row]).split("\n", 1)
            with (self.run / METRICS).open("a") as file:
                file.write(line)
        return row

    def flush(self) -> None:
        """Write the whole file."""
        write_once(self.run / METRICS, render_rows(self.rows).encode())

    def secure(self, sync: bool) -> None:
        """Have all rows where a power cut leaves them: in the bucket, or on the disk where `sync`.

        Rows that are lost all the same are made again from the last checkpoint, but not all.
        """
        if is_remote(self.run):
            self.flush()
        elif sync and is_writer():
            # Somebody may have removed it: the next row makes it anew.
            with suppress(FileNotFoundError):
                sync_file(self.run / METRICS)

    def list_validation_losses(self) -> list[float]:
        """The validation losses in order, since the last growth within the run."""
        rows = self._list_rows_since_growth()
        return [float(row["validation_loss"]) for row in rows if row["validation_loss"]]

    def find_validation_loss(self, step: int) -> float | None:
        """The validation loss at a step, in nats a token; None when it was not validated."""
        text = self._find_last(step, "validation_loss")
        return float(text) if text else None

    def find_scores(self, step: int) -> dict[str, float] | None:
        """The tasks' scores at a step, {"TASK METRIC": value}; None when they were not measured."""
        text = self._find_last(step, "scores")
        return json.loads(text) if text else None

    def _find_last(self, step: int, column: str) -> str:
        """The last text of a column at a step; empty when there is none."""
        for row in reversed(self._list_rows_since_growth()):
            if row["step"] == str(step) and row.get(column):
                return row[column]
        return ""

    def _list_rows_since_growth(self) -> list[Row]:
        """The rows of the model that the run trains now."""
        for number in reversed(range(len(self.rows))):
            if self.rows[number]["event"].startswith(GROWN):
                return self.rows[number:]
        return self.rows

    def export(self) -> bytes:
        """The CSV text for a checkpoint: all rows so far, plain training losses thinned out."""
        rows = self.earlier + self.rows
        plain = [number for number, row in enumerate(rows) if not _is_carried_whole(row)]
        stride = max(1, len(plain) // CARRIED)
        dropped = set(plain) - set(plain[::stride])
        kept = [row for number, row in enumerate(rows) if number not in dropped]
        return render_rows(kept).encode()


def _parse_carried(carried: bytes) -> list[Row]:
    """The rows that a checkpoint or a source carries, with all columns. Raises GrowkitError."""
    try:
        text = carried.decode()
    except UnicodeDecodeError:
        raise GrowkitError(f"the {EARLIER} that the checkpoint carries is not text") from None
    rows = parse_rows(text, f"the {EARLIER} that the checkpoint carries")
    return [{column: row.get(column, "") for column in COLUMNS} for row in rows]


def _find_start(rows: list[Row]) -> int:
    """Where the rows of the last run begin."""
    for number in reversed(range(len(rows))):
        if rows[number]["event"].startswith(START):
            return number
    return 0


def _index(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    """The rows by what no other has: the step, the kinds of values, and which such row it is.

    A step at which the model grows is validated twice, before and after.
    """
    found: dict[tuple[Any, ...], Row] = {}
    counts: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        kinds = tuple(bool(row.get(column)) for column in ("loss", "validation_loss", "scores"))
        name = (row["step"], kinds, row["event"])
        found[(*name, counts[name])] = row
        counts[name] += 1
    return found


def _is_carried_whole(row: Row) -> bool:
    return any(row.get(column) for column in CARRIED_WHOLE)


def _format_value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(float(value))  # every digit, also of numpy's floats
    return str(value)
