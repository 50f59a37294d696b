"""How busy each expert of a mixture was: RUN/experts.jsonl, a line at every row of metrics.

    {"step": 10, "load": [[0.26, 0.24, 0.25, 0.25], ...]}

The load of an expert is its share of the work of its layer, [layer, X]; all shares of a layer sum
to 1.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from etils import epath

from growkit.checkpoint.files import is_remote
from trainer.devices.hosts import is_writer, write_once

LOADS = "experts.jsonl"
DIGITS = 4  # of each share in a line


class Loads:
    """Adds lines to the file of a run that begins or resumes at step `first`.

    Lines of later steps, which the run will write again, are removed.
    """

    def __init__(self, run: epath.Path, first: int) -> None:
        self.path = run / LOADS
        self.remote = is_remote(run)
        # Objects in a bucket cannot be appended to: the lines are kept until `flush`.
        self.lines: list[str] = []
        if self.path.exists():
            self.lines = _select_lines(self.path.read_text(), first)
            write_once(self.path, _join(self.lines))
        if not self.remote:
            self.lines = []

    def add(self, step: int, load_LxX: np.ndarray) -> None:
        """Add the line of a step."""
        shares = [[float(f"{share:.{DIGITS}g}") for share in layer] for layer in load_LxX.tolist()]
        line = json.dumps({"step": step, "load": shares})
        if self.remote:
            self.lines.append(line)
        elif is_writer():
            with self.path.open("a") as file:
                file.write(f"{line}\n")

    def flush(self) -> None:
        """Write the lines of a run in a bucket."""
        if self.remote and self.lines:
            write_once(self.path, _join(self.lines))


def _join(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _select_lines(text: str, last: int) -> list[str]:
    """The lines up to a step, without one that a kill cut off."""
    kept = []
    for line in text.splitlines():
        try:
            step: Any = json.loads(line)["step"]
        except (KeyError, TypeError, ValueError):
            break
        if step <= last:
            kept.append(line)
    return kept


def describe_load(load_LxX: np.ndarray) -> dict[str, float]:
    """The largest and the smallest share that an expert had of its layer's work."""
    return {"busiest": float(load_LxX.max()), "idlest": float(load_LxX.min())}
