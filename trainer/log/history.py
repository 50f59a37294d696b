"""The metrics of a run: rows of a CSV file, and the rows of the runs it came from.

Knows columns, how rows are kept through a resume, and how a history travels with a checkpoint. Leaves what is
measured to the loop and pictures to `trainer.log.curves`.
"""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from etils import epath

from growkit.checkpoint.files import is_remote
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
    "scores",
    "event",
)
# How the event of a growth within a run begins.
GROWN = "grown"
# Rows of training loss that travel with a checkpoint; rows with anything else all do.
CARRIED = 1000
BESIDE = ("validation_loss", "scores", "event")


def parse_rows(text: str) -> list[dict[str, str]]:
    """The rows of a CSV text, without a last line that a kill cut off."""
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def render_rows(rows: list[dict[str, str]]) -> str:
    """Rows as a CSV text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


class History:
    """The rows of one run, kept in `metrics.csv`, after those of earlier ones, kept in `history.csv`."""

    def __init__(self, run: epath.Path):
        self.run = run
        self.earlier = parse_rows((run / EARLIER).read_text()) if (run / EARLIER).exists() else []
        self.rows = parse_rows((run / METRICS).read_text()) if (run / METRICS).exists() else []

    def begin(self, earlier: bytes) -> None:
        """Start without rows, after those that a source carried (a CSV text, which may be empty)."""
        if earlier:
            write_once(self.run / EARLIER, earlier)
        self.earlier = parse_rows(earlier.decode())
        self.rows = []
        self.flush()

    def keep_until(self, step: int) -> None:
        """Forget rows after `step`, which a resumed run will write again."""
        self.rows = [row for row in self.rows if int(row["step"]) <= step]
        self.flush()

    def forget_growth(self, step: int) -> None:
        """Forget a growth at `step`, the last one there are rows of, which will be made again."""
        begun = (
            n
            for n, row in enumerate(self.rows)
            if row["step"] == str(step) and row["event"].startswith(GROWN)
        )
        self.rows = self.rows[: next(begun, None)]
        self.flush()

    def add(self, **values: Any) -> dict[str, str]:
        """Append a row; returns it as text."""
        row = {column: _text(values.get(column)) for column in COLUMNS}
        self.rows.append(row)
        # Objects of a bucket cannot be appended to: there the file is written whole, by `flush`.
        if is_writer() and not is_remote(self.run):
            with (self.run / METRICS).open("a") as file:
                file.write(render_rows([row]).split("\n", 1)[1])
        return row

    def flush(self) -> None:
        """Write the file whole."""
        write_once(self.run / METRICS, render_rows(self.rows).encode())

    def list_validation_losses(self) -> list[float]:
        """The validation losses in order, as far back as the model was what it is."""
        return [
            float(row["validation_loss"]) for row in self._of_this_model() if row["validation_loss"]
        ]

    def find_validation_loss(self, step: int) -> float | None:
        """The validation loss of a step, None when none is on record."""
        found = self._last(step, "validation_loss")
        return float(found) if found else None

    def find_scores(self, step: int) -> dict[str, float] | None:
        """What the tasks gave at a step, None when nothing is on record."""
        found = self._last(step, "scores")
        return json.loads(found) if found else None

    def _last(self, step: int, column: str) -> str:
        rows = reversed(self._of_this_model())
        return next(
            (row[column] for row in rows if row["step"] == str(step) and row.get(column)), ""
        )

    def _of_this_model(self) -> list[dict[str, str]]:
        """The rows since the last growth within the run."""
        grown = [number for number, row in enumerate(self.rows) if row["event"].startswith(GROWN)]
        return self.rows[grown[-1] :] if grown else self.rows

    def export(self) -> bytes:
        """What travels with a checkpoint: all rows so far, those of plain training loss thinned out."""
        rows = self.earlier + self.rows
        beside = [row for row in rows if any(row.get(column) for column in BESIDE)]
        plain = [row for row in rows if not any(row.get(column) for column in BESIDE)]
        stride = max(1, len(plain) // CARRIED)
        kept = {id(row) for row in (*beside, *plain[::stride])}
        return render_rows([row for row in rows if id(row) in kept]).encode()


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return json.dumps(value)
    return repr(float(value)) if isinstance(value, float) else str(value)
