"""What the training loop costs on top of the bare jitted step, on this machine.

    python benchmarks/loop_overhead.py [--milliseconds 50|300] [--rounds N]

Expect a ratio below 1.01 on a quiet machine, with steps of about 50 ms on two cores: the loop also
draws batches, reads metrics and writes log lines and the CSV, and the bare step runs on one fixed
batch. Both are timed in turns in one process, without compilation; the loop's time is the one that
its metrics.csv gives. The script prints the medians, and the median, smallest and largest ratio of
all rounds. Last it prints the processor time, a step, of what the loop does beside dispatching and
waiting: drawing the batch and noting the metrics. Other programs hardly change that figure.
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
from trainer.devices.sharding import Layout
from trainer.run.begin import Beginning, begin, prepare
from trainer.run.loop import Run

STEPS = 60
EVERY = 10  # steps between two rows of metrics
SETTLED = 2 * EVERY  # steps that are not timed
VOCAB = 1024
# By the milliseconds that a step takes, about, on two cores.
MODELS = {
    50: {"layer": 2, "embed": 64, "head": 2, "mlp": 256, "vocab": VOCAB, "context": 256},
    300: {"layer": 6, "embed": 128, "head": 4, "mlp": 512, "vocab": VOCAB, "context": 256},
}
SEQUENCES = 8


def write_tokens(directory: Path) -> Path:
    """A file of random tokens, large enough that every batch is a new one."""
    directory.mkdir()
    with TokenWriter(directory, VOCAB) as writer:
        writer.add(np.random.default_rng(0).integers(0, VOCAB, 4_000_000))
    return directory / "tokens"


def make_values(tokens: Path, model: dict[str, int]) -> dict[str, Any]:
    """A small model without dropout; nothing is validated or saved on the way."""
    never = {"every": 10**9}
    return {
        "model": model,
        "dropout": {"hidden": 0.0, "attention": 0.0},
        "precision": {"compute": "float32"},
        "batch": {"sequences": SEQUENCES},
        "data": {"train": {str(tokens): 1.0}},
        "schedule": {"steps": STEPS, "warmup": 0},
        "checkpoint": never | {"minutes": 0.0},
        "eval": never | {"windows": 8},
        "log": {"every": EVERY},
    }


class TimedRun(Run):
    """A run that takes the processor time of what its loop does beside dispatching steps."""

    def __init__(self, beginning: Beginning) -> None:
        super().__init__(beginning)
        self.own = 0.0  # seconds since the first rows, whose time is that of compiling too
        draw = self.position.next_batch

        def next_batch(step: int, layout: Layout) -> jax.Array:
            begun = time.thread_time()
            batch = draw(step, layout)
            self._count(step, begun)
            return batch

        self.position.next_batch = next_batch  # type: ignore[method-assign]

    def _note(self, step: int, metrics: dict[str, jax.Array]) -> None:
        # Waiting for the step is no work of the loop's.
        jax.block_until_ready(metrics)
        begun = time.thread_time()
        super()._note(step, metrics)
        self._count(step - 1, begun)

    def _count(self, step: int, begun: float) -> None:
        if step >= SETTLED:
            self.own += (time.thread_time() - begun) / (STEPS - SETTLED)


def time_loop(values: dict[str, Any], directory: Path) -> tuple[float, TimedRun]:
    """Train a whole run: (seconds a step, the run). The first rows are left out: they compile."""
    run = TimedRun(begin(prepare(values, directory)))
    with contextlib.redirect_stderr(io.StringIO()):
        run.go()
    texts = [row["tokens_per_second"] for row in run.history.rows]
    speeds = [float(text) for text in texts if text]
    context = values["model"]["context"]
    return SEQUENCES * context / statistics.median(speeds[2:]), run


def time_bare_step(run: Run) -> float:
    """Seconds a step on one batch, and nothing else."""
    tokens = run.position.stream.batch(0, SEQUENCES)[None]
    times = []
    for _ in range((STEPS - SETTLED) // EVERY):
        begun = time.perf_counter()
        for _ in range(EVERY):
            run.state, metrics = run.train_step(run.state, tokens)
        jax.block_until_ready((run.state, metrics))
        times.append((time.perf_counter() - begun) / EVERY)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--milliseconds", type=int, choices=MODELS, default=50)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    bare_times, loop_times, own = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        tokens = write_tokens(Path(directory) / "data")
        values = make_values(tokens, MODELS[options.milliseconds])
        for number in range(options.rounds):
            loop_time, run = time_loop(values, Path(directory) / f"run{number}")
            loop_times.append(loop_time)
            bare_times.append(time_bare_step(run))
            own.append(run.own)
    bare = statistics.median(bare_times)
    ratios = sorted(loop / each for loop, each in zip(loop_times, bare_times, strict=True))
    print(
        f"bare step {1e3 * bare:.1f} ms, training loop {1e3 * statistics.median(loop_times):.1f} "
        f"ms, ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )
    work = statistics.median(own)
    print(
        f"the loop's own work: {1e3 * work:.2f} ms of its thread a step ({1e3 * min(own):.2f} to "
        f"{1e3 * max(own):.2f}), {work / bare:.2%} of a step"
    )


if __name__ == "__main__":
    main()
