"""How long commands take to start, and `train` to its first step.

    python benchmarks/start.py [--rounds N] [--preset tiny] [--only verbs|train]

Expect `inspect` and `depth --dry-run` on a small directory within 0.15 s of a bare Python, and
`train` at its first step after 4.2 seconds with no compiled program in the cache, after 2.8 with
all of them (two idle cores). Every figure is of a process of its own, from its start; the ways take
turns within a round, and the script prints medians, and the least and the largest of all rounds.
The first step is done when its line is in the log (log.every=1), which is after the validation
of step 0; the process is then killed. Imports are read from compiled files, as those of an
installed package are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from growkit.checkpoint.location import write_output
from growkit.checkpoint.tensor import Contents, copy_tensor, wrap_array
from growkit.models.gpt_neox import GPT_NEOX
from trainer.config.sections import resolve
from trainer.config.values import read_values
from trainer.data.tokens import TokenWriter

GROWKIT = [sys.executable, "-c", "from growkit.cli import main; main()"]
MODEL = GPT_NEOX.model(
    layer=4, embed=64, head=4, mlp=256, vocab=512, context=64, rotary_pct=0.25, tied=False
)
# What ends the wait for a run: its first row of metrics.
FIRST = "step 1/"
TOKENS = 2_000_000


def make_environment(cache: Path) -> dict[str, str]:
    """The environment of a command: compiled files of Python's, compiled programs in `cache`."""
    kept = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"JAX_COMPILATION_CACHE_DIR": str(cache), "GROWKIT_CACHE_DIR": str(cache)}


def write_model(path: Path) -> Path:
    """A small Hugging Face directory of random numbers."""
    random = np.random.default_rng(0)
    params = {
        name: copy_tensor(wrap_array(random.normal(size=row.shape(MODEL.sizes)).astype(np.float32)))
        for name, row, _ in MODEL.table.names(MODEL.sizes)
    }
    write_output(path, "huggingface", Contents(MODEL.config(), {"params": params}, []))
    return path


def write_tokens(path: Path, preset: str) -> Path:
    """Random tokens of a preset's vocabulary."""
    vocab = resolve(read_values(preset, [])).model.vocab
    path.mkdir()
    with TokenWriter(path, vocab) as writer:
        writer.add(np.random.default_rng(0).integers(0, vocab, TOKENS))
    return path / "tokens"


def time_command(command: list[str], environment: dict[str, str]) -> float:
    """Seconds that a command takes. Raises CalledProcessError where it fails."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def time_first_step(command: list[str], environment: dict[str, str]) -> float:
    """Seconds until a run has done its first step; then it is killed."""
    begun = time.perf_counter()
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if FIRST in line:
                taken = time.perf_counter() - begun
                process.kill()
                return taken
    raise SystemExit(f"the run ended before its first step:\n{''.join(lines)}")


def measure(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in turns, after a round that fills the caches."""
    for work in ways.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(work())
    return times


def measure_verbs(directory: Path, rounds: int) -> None:
    """Print how long verbs take on a small directory, and how much of it beyond a bare Python."""
    model = str(write_model(directory / "model"))
    environment = make_environment(directory / "cache")
    grown = str(directory / "grown")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
        "growkit --help": [*GROWKIT, "--help"],
        "growkit inspect": [*GROWKIT, "inspect", model],
        "growkit depth --dry-run": [*GROWKIT, "depth", "--dry-run", "--map", "4:6", model, grown],
        "growkit width --dry-run": [*GROWKIT, "width", "--dry-run", "--embed", "2x", model, grown],
    }
    ways = {
        name: lambda command=command: time_command(command, environment)
        for name, command in commands.items()
    }
    times = measure(ways, rounds)
    bare = times["python -c pass"]
    for name, taken in times.items():
        beyond = [mine - theirs for mine, theirs in zip(taken, bare, strict=True)]
        print(f"{name:25} {describe(taken)}; beyond a bare Python {statistics.median(beyond):.3f}")


def measure_training(directory: Path, preset: str, rounds: int) -> None:
    """Print the seconds to the first step of a preset, programs compiled anew and cached."""
    tokens = write_tokens(directory / "data", preset)
    filled, fresh = directory / "filled", directory / "fresh"

    def train(cache: Path) -> float:
        run = directory / "run"
        shutil.rmtree(run, ignore_errors=True)
        words = [f"data.train={tokens}", "log.every=1"]
        command = [*GROWKIT, "train", preset, "--out", str(run), *words]
        return time_first_step(command, make_environment(cache))

    def train_fresh() -> float:
        shutil.rmtree(fresh, ignore_errors=True)
        return train(fresh)

    ways = {"programs compiled": train_fresh, "programs cached": lambda: train(filled)}
    for name, taken in measure(ways, rounds).items():
        print(f"growkit train {preset}, {name:17} {describe(taken)} to the first step", flush=True)


def describe(times: list[float]) -> str:
    return f"{statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--only", choices=("verbs", "train"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="start-") as name:
        directory = Path(name)
        if options.only in (None, "verbs"):
            measure_verbs(directory, options.rounds)
        if options.only in (None, "train"):
            measure_training(directory, options.preset, options.rounds)


if __name__ == "__main__":
    main()
