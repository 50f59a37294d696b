"""How long training stands still for a checkpoint, as a part of the time between two of them.

    python benchmarks/checkpoint_blocking.py [--embed 768] [--saves N] [--no-sync]

Expect less than 2 % of 500 steps of 50 ms, which is 0.5 s. The state has 12 bytes a parameter: 12
layers of embed 768 are 1.0 GB, and the directory for temporary files needs three times that. A save
is timed as the loop calls it: it waits until the state is copied to the host, and Orbax writes in
its own threads. Those must be done before the next save begins; between two real checkpoints they
are, so that is waited for, and printed, but does not count. The script prints both medians, with
the least and the largest, and how long a step takes while a checkpoint is written, over a step
without one: on a CPU the threads that write take time from those that compute.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trainer.data.tokens import TokenWriter
from trainer.run.begin import begin, prepare
from trainer.run.damage import Trust
from trainer.run.loop import Run

STEP = 0.05  # seconds; what the loop's step is taken to be
STEPS_BETWEEN = 500
AFTER = 3  # steps that are timed after a save, and before it
VOCAB = 4096
CONTEXT = 32


def write_tokens(directory: Path) -> Path:
    directory.mkdir()
    with TokenWriter(directory, VOCAB) as writer:
        writer.add(np.random.default_rng(0).integers(0, VOCAB, 100_000))
    return directory / "tokens"


def make_values(tokens: Path, embed: int, saves: int) -> dict[str, Any]:
    """A model whose state is large and whose step is short: one sequence of 32 tokens."""
    never = {"every": 10**9}
    sizes = {"layer": 12, "embed": embed, "head": embed // 64, "mlp": 4 * embed}
    return {
        "model": sizes | {"vocab": VOCAB, "context": CONTEXT},
        "dropout": {"hidden": 0.0, "attention": 0.0},
        "precision": {"compute": "float32"},
        "batch": {"sequences": 1},
        "data": {"train": {str(tokens): 1.0}},
        "schedule": {"steps": 4 * AFTER * saves, "warmup": 0},
        "checkpoint": {"every": 4 * AFTER, "minutes": 0.0, "keep_last": 1},
        "eval": never | {"windows": 1},
        "log": {"every": 1},
    }


class TimedRun(Run):
    """A run that times its saves, and its steps before and after them."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.blocked: list[float] = []
        self.writing: list[float] = []
        self.beside: list[float] = []
        self.alone: list[float] = []
        self.begun = time.perf_counter()
        self.since = 10**9  # steps since the last save

    def _save(self) -> None:
        begun = time.perf_counter()
        self.checkpoints.wait()
        self.writing.append(time.perf_counter() - begun)
        jax.block_until_ready(self.state)
        begun = time.perf_counter()
        super()._save()
        self.blocked.append(time.perf_counter() - begun)
        self.since = 0
        self.begun = time.perf_counter()

    def _note(self, step: int, metrics: dict[str, jax.Array]) -> None:
        super()._note(step, metrics)
        now = time.perf_counter()
        self.since += 1
        # A checkpoint is long written before the last steps ahead of the next one, or the wait for
        # it says so.
        (self.beside if self.since <= AFTER else self.alone).append(now - self.begun)
        self.begun = now


def describe(times: list[float]) -> str:
    return f"{statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--embed", type=int, default=768)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--no-sync", action="store_true")
    options = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="blocking-") as name:
        directory = Path(name)
        values = make_values(write_tokens(directory / "data"), options.embed, options.saves)
        trust = Trust(sync=not options.no_sync)
        run = TimedRun(begin(prepare(values, directory / "run", trust=trust)))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state))
        with contextlib.redirect_stderr(io.StringIO()):
            run.go()
    # The first is at step 0 of nothing: it makes the directories and imports Orbax.
    blocked = run.blocked[1:]
    part = statistics.median(blocked) / (STEP * STEPS_BETWEEN)
    print(f"a state of {size / 1e9:.2f} GB blocks training for {describe(blocked)}")
    print(f"that is {part:.2%} of {STEPS_BETWEEN} steps of {1e3 * STEP:.0f} ms")
    print(f"what was left to write at the next save took {describe(run.writing[1:])}")
    ratio = statistics.median(run.beside) / statistics.median(run.alone)
    print(f"a step while it is written takes {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
