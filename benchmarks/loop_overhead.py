"""What the trainer's loop costs over the bare jitted step, on this machine.

    python benchmarks/loop_overhead.py

Expect a ratio below 1.03 on a quiet machine: drawing batches, reading metrics, log lines and the
CSV, against the same compiled step on one fixed batch. Both are timed in turns in one process,
compilation apart; printed are the medians and the median, least and largest of the rounds' ratios.
The loop's time is the one its metrics.csv states.
"""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from trainer.data.tokens import TokenWriter
from trainer.run.begin import begin, prepare
from trainer.run.loop import Run

ROUNDS, STEPS, EVERY = 6, 40, 10
MODEL = {"layer": 6, "embed": 128, "head": 4, "mlp": 512, "vocab": 2048, "context": 256}
SEQUENCES = 8


def write_tokens(directory: Path) -> Path:
    """A file of random tokens, large enough that every batch is a new one."""
    directory.mkdir()
    with TokenWriter(directory, MODEL["vocab"]) as writer:
        writer.add(np.random.default_rng(0).integers(0, MODEL["vocab"], 4_000_000))
    return directory / "tokens"


def make_values(tokens: Path) -> dict:
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
    """Seconds a step of a whole run, the first rows (compilation) apart; and the run."""
    run = Run(begin(prepare(make_values(tokens), directory)))
    with contextlib.redirect_stderr(io.StringIO()):
        run.go()
    speeds = [
        float(row["tokens_per_second"]) for row in run.history.rows if row["tokens_per_second"]
    ][1:]
    return SEQUENCES * MODEL["context"] / statistics.median(speeds), run


def time_bare_step(run: Run) -> float:
    """Seconds a step on one batch, nothing else."""
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
    pairs = []
    with tempfile.TemporaryDirectory() as directory:
        tokens = write_tokens(Path(directory) / "data")
        for number in range(ROUNDS):
            loop, run = time_loop(tokens, Path(directory) / f"run{number}")
            pairs.append((time_bare_step(run), loop))
    bare, loop = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(loop / bare for bare, loop in pairs)
    print(
        f"bare step {1e3 * bare:.1f} ms, trainer's loop {1e3 * loop:.1f} ms, "
        f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


if __name__ == "__main__":
    main()
