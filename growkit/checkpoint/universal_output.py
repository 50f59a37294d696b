"""Universal checkpoints of DeepSpeed, written: the files of each parameter, and the model anew.

`growkit.checkpoint.universal` says what a directory holds. Parameters are written some at a time,
because each takes four files, and a process may have 1024 open.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint.fill import Filled, Progress, collect_jobs, fill
from growkit.checkpoint.hf_trainer import TRAINING
from growkit.checkpoint.huggingface import SHARD, begin_shards, write_beside
from growkit.checkpoint.kinds import LATEST
from growkit.checkpoint.numbers import Findings
from growkit.checkpoint.optimizer import Optimizer, Scalar
from growkit.checkpoint.rounding import round_to_dtype
from growkit.checkpoint.tensor import Contents, Recipe, copy_tensor, wrap_array
from growkit.checkpoint.torch_zip import TorchWriter
from growkit.checkpoint.universal import (
    FILES,
    MODULE,
    OPTIMIZER,
    SHAPES,
    STATES,
    STEP,
    Universal,
    make_template,
)
from growkit.errors import GrowkitError

# Parameters written at once.
BATCH = 100


def write_universal(
    path: Path, contents: Contents, progress: Progress | None = None, shard: int = SHARD
) -> Findings:
    """Write `contents` as a universal checkpoint at `path`, which must not exist.

    shard: the most bytes of one safetensors file. Returns what was found in the numbers.
    """
    optimizer = contents.torch_optimizer
    if optimizer is None or optimizer.universal is None:
        raise GrowkitError(f"{path} is to be a universal checkpoint, and nothing was given for it")
    universal = optimizer.universal
    if contents.record.get("count") == 0 and not optimizer.steps:
        raise GrowkitError(
            f"moments cannot be reset: Adam's step is in {OPTIMIZER}, which is carried as it is"
        )
    home = path / universal.tag
    (home / "zero").mkdir(parents=True)
    names = [name for group in optimizer.groups for name in group.names]
    filled = Filled()
    for start in range(0, len(names), BATCH):
        batch = names[start : start + BATCH]
        done = _write_parameters(home, contents, optimizer, universal, batch, progress)
        _add(filled, done)
    (home / "zero" / OPTIMIZER).write_bytes(universal.options)
    low = {
        name: _round(name, recipe, universal.dtype)
        for name, recipe in contents.recipes["params"].items()
    }
    _write_states(home / STATES, optimizer, universal, low)
    weight_map: dict[str, str] = {}
    if universal.weights:
        with collect_jobs() as jobs:
            weight_map = begin_shards(path, low, shard, jobs)
            fill(jobs)
    training = tuple(name for name in contents.files if TRAINING.fullmatch(name))
    write_beside(path, contents, weight_map, filled, training)
    (path / LATEST).write_text(universal.tag)
    return filled.findings


def _write_parameters(
    home: Path,
    contents: Contents,
    optimizer: Optimizer,
    universal: Universal,
    names: Sequence[str],
    progress: Progress | None,
) -> Filled:
    """Write the files of some parameters; returns what is known of their tensors."""
    writers = []
    with collect_jobs() as jobs:
        for name in names:
            directory = home / "zero" / universal.renamed.get(name, name)
            directory.mkdir()
            form = universal.forms[make_template(name)]
            for slot, key in FILES.items():
                writer = TorchWriter(directory / f"{key}.pt")
                recipe = contents.recipes[slot][name]
                stored = writer.add(slot, name, recipe, optimizer.locations[slot])
                jobs += writer.begin({**form, "param": stored})
                writers.append(writer)
        done = fill(jobs, progress)
        for writer in writers:
            writer.finish(done)
    for name in names:
        if name in optimizer.steps:
            directory = home / "zero" / universal.renamed.get(name, name)
            _write_step(directory / f"{STEP}.pt", optimizer.steps[name])
    return done


def _add(filled: Filled, done: Filled) -> None:
    """Add what is known of some tensors to what is known of others."""
    filled.hashes |= done.hashes
    for found, more in (
        (filled.findings.nonfinite, done.findings.nonfinite),
        (filled.findings.negative, done.findings.negative),
    ):
        for slot, counts in more.items():
            found.setdefault(slot, {}).update(counts)


def _write_step(path: Path, step: Any) -> None:
    """Write a number as it was: plain, or a tensor without dimensions."""
    writer = TorchWriter(path)
    value = step
    if isinstance(step, Scalar):
        array = np.asarray(step.value, step.dtype)
        value = writer.add("", STEP, copy_tensor(wrap_array(array)), step.location)
    jobs = writer.begin(value)
    try:
        writer.finish(fill(jobs))
    finally:
        os.close(writer.file)


def _round(name: str, recipe: Recipe, dtype: np.dtype) -> Recipe:
    """The recipe of the same numbers in another dtype."""
    if recipe.dtype == dtype or recipe.is_zeros:
        return replace(recipe, dtype=dtype)

    def pieces() -> Iterator[tuple[int, np.ndarray]]:
        for start, block in recipe.make_blocks():
            yield start * dtype.itemsize, round_to_dtype(name, block, dtype)

    return Recipe(recipe.shape, dtype, pieces=pieces)


def _write_states(
    path: Path, optimizer: Optimizer, universal: Universal, low: Mapping[str, Recipe]
) -> None:
    """Write the file of states: the model as it is used, its shapes, and what was there."""
    writer = TorchWriter(path)
    module = {}
    for name, recipe in low.items():
        module[universal.renamed.get(name, name)] = writer.add("", name, recipe, "cpu")
    module |= {
        name: module[universal.renamed.get(known, known)]
        for name, known in universal.shared.items()
    }
    shapes = [
        {universal.renamed.get(name, name): low[name].shape for name in group.names}
        for group in optimizer.groups
    ]
    value = {MODULE: module, SHAPES: shapes, **universal.states}
    with collect_jobs() as jobs:
        jobs += writer.begin(value)
        writer.finish(fill(jobs))
