"""What the training loop costs on top of the bare jitted step, on this machine.

    python benchmarks/loop_overhead.py

Expect a ratio below 1.03 on a quiet machine: the loop also draws batches, reads metrics and writes
log lines and the CSV, and the bare step runs on one fixed batch. Both are timed in turns in one
process, without compilation; the loop's time is the one that its metrics.csv gives. The script
prints the medians, and the median, smallest and largest ratio of all rounds.
"""

from __future__ import annotations

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
from trainer.run.loop import Run

ROUNDS = 6
STEPS = 40
EVERY = 10  # steps between two rows of metrics
MODEL = {"layer": 6, "embed": 128, "head": 4, "mlp": 512, "vocab": 2048, "context": 256}
SEQUENCES = 8


def write_tokens(directory: Path) -> Path:
    """A file of random tokens, large enough that every batch is a new one."""
    directory.mkdir()
    with TokenWriter(directory, MODEL["vocab"]) as writer:
        writer.add(np.random.default_rng(0).integers(0, MODEL["vocab"], 4_000_000))
    return directory / "tokens"


def make_values(tokens: Path) -> dict[str, Any]:
    """A small model without dropout; nothing is validated or saved on the way."""
    never = {"every": 10**9}
    return {
        "model": MODEL,
        "dropout": {"hidden": 0.0, "attention": 0.0},
        "precision": {"compute": "float32"},
        "batch": {"sequences": SEQUENCES},
        "data": {"train": {str(tokens): 1.0}},
        "schedule": {"steps": STEPS, "warmup": 0},
        "checkpoint": never | {"minutes": 0.0},
        "eval": never | {"windows": 8},
        "log": {"every": EVERY},
    }


def time_loop(tokens: Path, directory: Path) -> tuple[float, Run]:
    """Train a whole run: (seconds a step, the run). The first row is left out: it may compile."""
    run = Run(begin(prepare(make_values(tokens), directory)))
    with contextlib.redirect_stderr(io.StringIO()):
        run.go()
    texts = [row["tokens_per_second"] for row in run.history.rows]
    speeds = [float(text) for text in texts if text]
    return SEQUENCES * MODEL["context"] / statistics.median(speeds[1:]), run


def time_bare_step(run: Run) -> float:
    """Seconds a step on one batch, and nothing else."""
    tokens = run.position.stream.batch(0, SEQUENCES)[None]
    times = []
    for _ in range(STEPS // EVERY - 1):
        begun = time.perf_counter()
        for _ in range(EVERY):
            run.state, metrics = run.train_step(run.state, tokens)
        jax.block_until_ready((run.state, metrics))
        times.append((time.perf_counter() - begun) / EVERY)
    return statistics.median(times)


def main() -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)
    bare_times = []
    loop_times = []
    with tempfile.TemporaryDirectory() as directory:
        tokens = write_tokens(Path(directory) / "data")
        for number in range(ROUNDS):
            loop_time, run = time_loop(tokens, Path(directory) / f"run{number}")
            loop_times.append(loop_time)
            bare_times.append(time_bare_step(run))
    ratios = sorted(loop / bare for loop, bare in zip(loop_times, bare_times, strict=True))
    print(
        f"bare step {1e3 * statistics.median(bare_times):.1f} ms, "
        f"training loop {1e3 * statistics.median(loop_times):.1f} ms, "
        f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


if __name__ == "__main__":
    main()
