"""What hashes and waiting for the disk cost: of a save, a resume, a growth and a load.

    python benchmarks/trust.py [--dir DIR] [--rounds 7] [--layers 12] [--embed 768]

Expect less than 3 % of a save and less than 10 % of a load for hashes. What waiting for the disk
costs is the disk's affair. With and without are timed in turns within a round, in one process,
after a round that does not count, a sync of the file system, and with a full page cache, as in
surgery.py. The script prints the median of the seconds, with the best and the worst, and the same
of the part that was added in each round. Needs memory and disk for about five times the checkpoint
(1.9 GB at the default sizes). Five rounds take eight minutes, nearly all of it to fill the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from etils import epath
from surgery import warm_cache

import growkit.checkpoint.fill
import trainer.run.checkpoint
from growkit.checkpoint.hashes import ALGORITHM
from growkit.cli import run as run_command
from trainer.data.tokens import TokenWriter
from trainer.run.begin import Beginning, begin, prepare
from trainer.run.checkpoint import Checkpoints

VOCAB = 50304
# What a checkpoint states that has no hashes.
NONE = {"algorithm": ALGORITHM, "arrays": {}}

Contender = Callable[[], None]


class NoHash:
    """Stands for a hash that costs nothing."""

    def update(self, data: Any) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 16


def begin_run(directory: Path, layers: int, embed: int) -> Beginning:
    """A new run whose state is on the device; nothing of it is compiled but its beginning."""
    (directory / "tokens").mkdir()
    with TokenWriter(directory / "tokens", VOCAB) as writer:
        writer.add(np.random.default_rng(0).integers(0, VOCAB, 200_000))
    sizes = {"layer": layers, "embed": embed, "head": embed // 64, "mlp": 4 * embed}
    values = {
        "model": sizes | {"vocab": VOCAB, "context": 256},
        "data": {"train": [str(directory / "tokens")]},
        "batch": {"sequences": 8},
        "schedule": {"steps": 1000, "warmup": 10},
        "checkpoint": {"every": 100, "minutes": 0, "keep_last": 1, "keep_best": False},
        "eval": {"every": 100, "windows": 8},
    }
    return begin(prepare(values, directory / "run"))


class Saver:
    """Saves the same state again and again, each time as another step."""

    def __init__(self, directory: Path, beginning: Beginning) -> None:
        self.beginning = beginning
        settings = beginning.stage.config.checkpoint
        self.checkpoints = {
            sync: Checkpoints(epath.Path(directory / f"saves-{sync}"), settings, sync)
            for sync in (True, False)
        }
        self.step = 0
        self.blocked: list[float] = []

    def save(self, hashed: bool, sync: bool = True) -> None:
        """Save, and wait until it is written. Remembers how long training would have waited."""
        self.step += 1
        with contextlib.ExitStack() as changed:
            if not hashed:
                patch = mock.patch.object(
                    trainer.run.checkpoint, "hash_later", lambda *given: lambda: NONE
                )
                changed.enter_context(patch)
            begun = time.perf_counter()
            self.checkpoints[sync].save(self.step, self.beginning.snapshot)
            self.blocked.append(time.perf_counter() - begun)
            self.checkpoints[sync].wait()

    def keep_source(self, directory: Path) -> Path:
        """A checkpoint with hashes of its own, to be grown."""
        self.save(True)
        kept = directory / "model"
        shutil.copytree(self.checkpoints[True].directory / str(self.step), kept)
        return kept

    def resume(self, verify: bool) -> None:
        """Restore the last step that was saved with hashes."""
        last = self.checkpoints[True].last
        assert last is not None
        self.checkpoints[True].restore(last, self.beginning.stage.like, verify)


def command(*words: object) -> None:
    """Run growkit's command line in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert run_command([str(word) for word in words]) == 0


@dataclass(frozen=True)
class Grower:
    """Grows the same checkpoint in depth again and again, half as many layers more."""

    source: Path
    out: Path
    layers: int

    def grow(self, *options: str, hashed: bool = True) -> None:
        """hashed: whether the output's hashes are made."""
        shutil.rmtree(self.out, ignore_errors=True)
        with contextlib.ExitStack() as changed:
            if not hashed:
                patch = mock.patch.object(growkit.checkpoint.fill, "begin_hash", NoHash)
                changed.enter_context(patch)
            layers = f"{self.layers}:{self.layers * 3 // 2}"
            command("depth", "--map", layers, self.source, self.out, *options)


def list_pairs(saver: Saver, grower: Grower) -> Iterator[tuple[str, Contender, Contender]]:
    """(what, with it, without it)."""
    unsynced = "--no-sync"
    yield (
        "hashes of a save by the trainer",
        lambda: saver.save(True),
        lambda: saver.save(False),
    )
    yield (
        "waiting for the disk, of a save by the trainer",
        lambda: saver.save(True),
        lambda: saver.save(True, sync=False),
    )
    yield (
        "comparing hashes, of a resume",
        lambda: saver.resume(True),
        lambda: saver.resume(False),
    )
    yield (
        "hashes of a growth's output",
        lambda: grower.grow(unsynced),
        lambda: grower.grow(unsynced, hashed=False),
    )
    yield (
        "comparing the source's hashes, of a growth",
        lambda: grower.grow(unsynced),
        lambda: grower.grow(unsynced, "--no-verify"),
    )
    yield (
        "waiting for the disk, of a growth",
        lambda: grower.grow(),
        lambda: grower.grow(unsynced),
    )


def time_in_turns(
    pair: tuple[Contender, Contender], rounds: int, directory: Path
) -> list[tuple[float, float]]:
    """Seconds with and without, by round; which comes first alternates.

    directory: where they work; what is there is in the page cache each time.
    """
    found = []
    for number in range(-1, rounds):
        seconds = [0.0, 0.0]
        for place in (0, 1) if number % 2 else (1, 0):
            os.sync()
            warm_cache(directory, [directory])
            begun = time.perf_counter()
            pair[place]()
            seconds[place] = time.perf_counter() - begun
        # The first round makes directories, fills caches and compiles.
        if number >= 0:
            found.append((seconds[0], seconds[1]))
    return found


def show(what: str, found: list[tuple[float, float]]) -> None:
    """Print a pair: seconds with and without, and the part that is added."""
    columns = list(zip(*found, strict=True))
    added = [100 * (one / other - 1) for one, other in found]
    words = [describe(column, "{:.3f} s") for column in columns]
    print(f"{what}: {words[0]} against {words[1]}, adds {describe(added, '{:.1f} %')}", flush=True)


def describe(numbers: Any, form: str) -> str:
    """The median, with the least and the largest."""
    middle, least, most = statistics.median(numbers), min(numbers), max(numbers)
    return f"{form.format(middle)} ({form.format(least)} to {form.format(most)})"


def main() -> None:
    """Time all pairs and print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--embed", type=int, default=768)
    given = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(dir=given.dir) as place:
        directory = Path(place)
        beginning = begin_run(directory, given.layers, given.embed)
        record = {"count": 1, "step": 1, "schedule_step": 1, "tokens": 0}
        snapshot = replace(beginning.snapshot, record=record)
        saver = Saver(directory, replace(beginning, snapshot=snapshot))
        grower = Grower(saver.keep_source(directory), directory / "out", given.layers)
        for what, one, other in list_pairs(saver, grower):
            show(what, time_in_turns((one, other), given.rounds, directory))
        blocked = describe(saver.blocked, "{:.3f} s")
        print(f"training waited {blocked} for a save to begin")


if __name__ == "__main__":
    main()
