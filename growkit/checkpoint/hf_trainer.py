"""Checkpoints of transformers' Trainer: a Hugging Face directory with the state of its optimizer.

    checkpoint-8000/model.safetensors      as in every Hugging Face directory
    checkpoint-8000/optimizer.pt           the moments, which grow
    checkpoint-8000/scheduler.pt           the place in the schedule
    checkpoint-8000/trainer_state.json     the step
    checkpoint-8000/rng_state.pth, training_args.bin, scaler.pt

Neither torch nor transformers is needed, and no pickle is run. All files but optimizer.pt are
carried along byte for byte; scheduler.pt is written anew only where the groups of parameters are
split.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint.carried import LIMIT, find_outside, list_inside
from growkit.checkpoint.files import LFS_POINTER, open_regular, read_json, read_regular
from growkit.checkpoint.fill import Progress, collect_jobs, fill
from growkit.checkpoint.hashes import Hashed
from growkit.checkpoint.huggingface import (
    SHARD,
    begin_shards,
    find_hashes,
    open_directory,
    read_lineage,
    write_beside,
)
from growkit.checkpoint.kinds import OPTIMIZER, SCHEDULER
from growkit.checkpoint.numbers import Findings
from growkit.checkpoint.optimizer import STEP, Optimizer, ReadOptimizer, Scalar, read_optimizer
from growkit.checkpoint.tensor import (
    Contents,
    Recipe,
    Source,
    Tensor,
    copy_tensor,
    wrap_array,
    zeros,
)
from growkit.checkpoint.torch_pickle import Stored
from growkit.checkpoint.torch_zip import TorchWriter, open_torch_file
from growkit.errors import GrowkitError
from growkit.models import read_config
from growkit.models.architecture import Architecture
from growkit.models.fused import find_fused

KIND = "hf_trainer"
STATE = "trainer_state.json"
# What else the Trainer needs to go on, carried byte for byte.
TRAINING = re.compile(
    r"scheduler\.pt|trainer_state\.json|training_args\.bin|scaler\.pt|rng_state(_\d+)?\.pth"
)


def open_trained(path: Path) -> Source:
    """Open a checkpoint of transformers' Trainer; reads headers and the optimizer's pickle.

    Where the optimizer cannot be read, the model is opened without it, and `Source.refusal` says
    why; where it is of another kind altogether, a note says so. Raises GrowkitError naming the file
    at fault.
    """
    if _is_of_another_kind(path / OPTIMIZER):
        return _open_alone(path)
    files = list_inside(path, TRAINING)
    source = open_directory(path, (OPTIMIZER, *files))
    try:
        found = _read_state(path, source)
        step = _read_step(path, found.optimizer)
    except GrowkitError as problem:
        return _open_without(path, str(problem))
    hashed, tensors = find_slot_hashes(path, source.tensors | found.slots)
    read_others = source.read_files
    return replace(
        source,
        kind=KIND,
        tensors=tensors,
        weights=[*source.weights, path / OPTIMIZER],
        record={
            "step": step,
            "schedule_step": _find_place(found.optimizer, step),
            "count": found.optimizer.count,
        },
        read_files=lambda: read_others() | {n: read_regular(path / n, LIMIT) for n in files},
        torch_optimizer=found.optimizer,
        hashed=hashed,
    )


def find_slot_hashes(
    path: Path, slots: Mapping[str, Mapping[str, Tensor]]
) -> tuple[Hashed | None, dict[str, dict[str, Tensor]]]:
    """The hashes on record of the tensors of all slots, and the tensors, now hashed as they are
    read.
    """
    named = {_stated_name(slot, name): each[name] for slot, each in slots.items() for name in each}
    # The tensors that have a hash on record are others from here on.
    hashed = find_hashes(path, read_lineage(path), named)
    tensors = {
        slot: {name: named[_stated_name(slot, name)] for name in each}
        for slot, each in slots.items()
    }
    return hashed, tensors


def _stated_name(slot: str, name: str) -> str:
    """What the lineage's hashes call a tensor."""
    return name if slot == "params" else f"{slot}.{name}"


def _is_of_another_kind(path: Path) -> bool:
    """Whether a file begins as none of torch.save's does, nor as one that a disk has zeroed."""
    if path.is_symlink():
        return False
    with open(open_regular(path), "rb") as file:
        begin = file.read(len(LFS_POINTER))
    return bool(begin.strip(b"\0")) and not begin.startswith((b"PK", b"\x80", LFS_POINTER))


def _open_alone(path: Path) -> Source:
    """The model, where what is called optimizer.pt is not torch's."""
    source = open_directory(path)
    note = (
        f"{path / OPTIMIZER} is no file of torch.save: the model is taken without it, and what "
        "belongs to its training is left behind"
    )
    return replace(source, notes=(*source.notes, note))


def _open_without(path: Path, problem: str) -> Source:
    """The model alone, which knows why its optimizer is not read."""
    source = open_directory(path)
    refusal = f"{problem}; to take the model without its optimizer, move {OPTIMIZER} elsewhere"
    return replace(source, refusal=refusal, notes=(*source.notes, problem))


def _read_state(path: Path, source: Source) -> ReadOptimizer:
    """The optimizer, with the schedule that belongs to it."""
    outside = find_outside(path, path / OPTIMIZER)
    if outside:
        raise GrowkitError(f"{path / OPTIMIZER} is not read: {outside}")
    if source.around is not None:
        raise GrowkitError(
            f"{path / OPTIMIZER} is of a model around a text decoder, and growkit grows optimizers "
            "of decoders alone"
        )
    found = read_optimizer(open_torch_file(path / OPTIMIZER), source.model)
    schedule = _read_schedule(path)
    rates = None if schedule is None else schedule.get("base_lrs")
    groups = len(found.optimizer.groups)
    if isinstance(rates, list) and len(rates) != groups:
        raise GrowkitError(
            f"{path / SCHEDULER} has learning rates for {len(rates)} groups of parameters, and "
            f"{OPTIMIZER} has {groups}"
        )
    return replace(found, optimizer=replace(found.optimizer, schedule=schedule))


def _read_schedule(path: Path) -> Mapping[str, Any] | None:
    """What scheduler.pt holds; None where there is none, or it holds more than numbers."""
    if not (path / SCHEDULER).is_file() or find_outside(path, path / SCHEDULER):
        return None
    try:
        value = open_torch_file(path / SCHEDULER).value
    except GrowkitError:
        return None
    return value if isinstance(value, Mapping) else None


def _read_step(path: Path, optimizer: Optimizer) -> int:
    """The Trainer's global step; the optimizer's where trainer_state.json has none."""
    if not (path / STATE).is_file() or find_outside(path, path / STATE):
        return optimizer.count
    state = read_json(path / STATE, LIMIT)
    step = state.get("global_step") if isinstance(state, dict) else None
    return step if type(step) is int and step >= 0 else optimizer.count


def _find_place(optimizer: Optimizer, step: int) -> int:
    """How many updates of its schedule were taken, as growkit's trainer counts them.

    That trainer's update after `step` others takes the rate of step + 1, transformers' that of
    `last_epoch`, so that its first one stands still in a warm-up.
    """
    schedule = optimizer.schedule or {}
    last = schedule.get("last_epoch")
    # A schedule by plateaus counts evaluations, and has no base_lrs.
    if type(last) is int and 0 < last < 1 << 31 and "base_lrs" in schedule:
        return last - 1
    return max(step - 1, 0)


def write_trained(
    path: Path, contents: Contents, progress: Progress | None = None, shard: int = SHARD
) -> Findings:
    """Write `contents` as a checkpoint of transformers' Trainer at `path`, which must not exist.

    shard: the most bytes of weights in one file. Returns what was found in the numbers.
    """
    optimizer = contents.torch_optimizer
    if optimizer is None:
        raise GrowkitError(f"{path} is to hold an optimizer, and none was given")
    path.mkdir()
    writer = TorchWriter(path / OPTIMIZER)
    model = read_config(contents.config, contents.lineage)
    slots = {slot: join_experts(contents.recipes[slot], model) for slot in optimizer.entries}
    value = _make_state_dict(writer, optimizer, slots)
    with collect_jobs() as jobs:
        weight_map = begin_shards(path, contents.recipes["params"], shard, jobs)
        jobs += writer.begin(value)
        filled = fill(jobs, progress)
        writer.finish(filled)
    training = tuple(name for name in contents.files if TRAINING.fullmatch(name))
    write_beside(path, contents, weight_map, filled, training)
    if optimizer.schedule is not None and SCHEDULER not in contents.files:
        _write_schedule(path / SCHEDULER, optimizer.schedule)
    return filled.findings


def _make_state_dict(
    writer: TorchWriter, optimizer: Optimizer, recipes: Mapping[str, Mapping[str, Recipe]]
) -> dict[str, Any]:
    """The state dict, its tensors added to the writer, parameter by parameter."""
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.groups:
        first = len(state)
        for name in group.names:
            entry: dict[str, Any] = {}
            if name in optimizer.steps:
                entry[STEP] = _add_scalar(writer, f"{STEP} of {name}", optimizer.steps[name])
            moments = {
                key: writer.add(slot, name, recipes[slot][name], optimizer.locations[slot])
                for slot, key in optimizer.entries.items()
            }
            wrapper = optimizer.wrapper
            state[len(state)] = entry | ({wrapper: moments} if wrapper else moments)
        options = {
            key: _add_scalar(writer, f"{key} of group {len(groups)}", value)
            for key, value in group.options.items()
        }
        groups.append(options | {"params": list(range(first, len(state)))})
    return {"state": state, "param_groups": groups}


def join_experts(recipes: Mapping[str, Recipe], model: Architecture) -> dict[str, Recipe]:
    """The recipes of a slot by the names of parameters in memory, which holds experts as one."""
    joined = dict(recipes)
    for fused in find_fused(model).values():
        shape = fused.row.shape(model.sizes)
        for position in fused.row.positions(model.sizes):
            names = list(fused.list_names(position, shape[0]))
            # Layers without experts have none of these.
            if names[0] in recipes:
                parts = [joined.pop(name) for name in names]
                joined[fused.row.name_at(position)] = join_recipes(parts, shape)
    return joined


def join_recipes(recipes: Sequence[Recipe], shape: tuple[int, ...]) -> Recipe:
    """The recipe for tensors of one dtype that lie end to end in one of this shape."""
    if all(recipe.is_zeros for recipe in recipes):
        return zeros(shape, recipes[0].dtype)

    def pieces() -> Iterator[tuple[int, np.ndarray]]:
        begin = 0
        for recipe in recipes:
            for start, block in recipe.make_blocks():
                yield begin + start * recipe.dtype.itemsize, block
            begin += recipe.size

    return Recipe(shape, recipes[0].dtype, pieces=pieces)


def _add_scalar(writer: TorchWriter, name: str, value: Any) -> Any:
    """A plain value as it is; one that was a tensor as one again."""
    if not isinstance(value, Scalar):
        return value
    array = np.asarray(value.value, value.dtype)
    stored: Stored = writer.add("", name, copy_tensor(wrap_array(array)), value.location)
    return stored


def _write_schedule(path: Path, schedule: Mapping[str, Any]) -> None:
    writer = TorchWriter(path)
    writer.begin(dict(schedule))
    try:
        writer.finish(fill([]))
    finally:
        os.close(writer.file)
