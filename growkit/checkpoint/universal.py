"""DeepSpeed's universal checkpoints: a directory for each parameter, whatever the ranks were.

    checkpoint-8000/latest_universal                          the name of the next directory
    checkpoint-8000/global_step8000_universal/zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
    checkpoint-8000/global_step8000_universal/zero/optimizer_state.pt      options of the groups
    checkpoint-8000/global_step8000_universal/mp_rank_00_model_states.pt   the model as it was used
    checkpoint-8000/config.json, model.safetensors, trainer_state.json     of transformers' Trainer

DeepSpeed's ds_to_universal makes them, and an engine with `load_universal` goes on from them. The
parameters are those in float32. optimizer_state.pt is carried byte for byte; the model is written
anew from the grown parameters, rounded to its dtype. Neither torch nor deepspeed is needed, and no
pickle is run. Source: checkpoint/ds_to_universal.py, universal_checkpoint.py and runtime/engine.py
of DeepSpeed 0.19.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint.carried import (
    LIMIT,
    drop_code_keys,
    list_beside,
    list_inside,
    require_inside,
)
from growkit.checkpoint.files import read_json, read_regular
from growkit.checkpoint.hf_trainer import TRAINING, find_slot_hashes
from growkit.checkpoint.huggingface import INDEX, OWN, read_lineage
from growkit.checkpoint.kinds import LATEST
from growkit.checkpoint.naming import find_name
from growkit.checkpoint.optimizer import Group, Optimizer, read_step
from growkit.checkpoint.tensor import Source, Tensor, read_model
from growkit.checkpoint.torch_pickle import Inert, Stored
from growkit.checkpoint.torch_zip import TorchFile, open_torch_file
from growkit.checkpoint.zero import open_state
from growkit.errors import GrowkitError
from growkit.models.architecture import Architecture

KIND = "universal"
FILES = {"params": "fp32", "mu": "exp_avg", "nu": "exp_avg_sq"}
STATES = "mp_rank_00_model_states.pt"
OPTIMIZER = "optimizer_state.pt"
STEP = "step"
# What DeepSpeed and the Trainer write beside it.
UNUSED = (INDEX, LATEST, "latest", "zero_to_fp32.py", "zero_to_torch.py")
# What the file of states holds that is written anew.
MODULE, SHAPES = "module", "param_shapes"


@dataclass(frozen=True)
class Universal:
    """What a universal checkpoint has beside tensors and steps.

    tag: the name of its directory. states: the plain values of the file of states. options: the
    bytes of optimizer_state.pt. dtype: of the model as it was used. renamed: name in the table ->
    name in the model, where they differ. shared: further names in the model -> name in the table.
    forms: template of a name -> what its files state beside the tensor. weights: whether
    safetensors files lie beside it.
    """

    tag: str
    states: Mapping[str, Any]
    options: bytes
    dtype: np.dtype
    renamed: Mapping[str, str]
    shared: Mapping[str, str]
    forms: Mapping[str, Mapping[str, Any]]
    weights: bool


def open_universal(path: Path) -> Source:
    """Open a universal checkpoint; reads the pickles, no tensor.

    Raises GrowkitError, naming the file, for one that cannot be read whole.
    """
    config = _read_config(path)
    lineage = read_lineage(path)
    model = read_model(config, path, lineage if isinstance(lineage, list) else ())
    home = _find_home(path)
    states = _open_inside(path, home / STATES)
    groups = _read_groups(states, model)
    reading = _Reading(path, home, model)
    for group in groups:
        for name, known in group.items():
            reading.read(name, known)
    reading.check_all_read()
    count = reading.find_count()
    universal, left = reading.describe(states, groups)
    hashed, tensors = find_slot_hashes(path, reading.tensors)
    optimizer = _make_optimizer(groups, reading, universal)
    training = list_inside(path, TRAINING)
    safe = tuple(file.name for file in path.glob("*.safetensors"))
    beside = list_beside(path, (*OWN, *training, *safe, *UNUSED, universal.tag))
    return Source(
        path=path,
        kind=KIND,
        config=config,
        tensors=tensors,
        weights=[*reading.files, states.path, path / "config.json"],
        lineage=lineage,
        record=_read_record(states, optimizer, count),
        read_files=lambda: beside.read() | {n: read_regular(path / n, LIMIT) for n in training},
        notes=(*left, *beside.notes),
        torch_optimizer=optimizer,
        hashed=hashed,
    )


def _make_optimizer(
    groups: Sequence[Mapping[str, str]], reading: _Reading, universal: Universal
) -> Optimizer:
    return Optimizer(
        tuple(Group(tuple(group.values()), {}) for group in groups),
        {slot: key for slot, key in FILES.items() if slot != "params"},
        reading.locations,
        reading.steps,
        universal=universal,
    )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise GrowkitError(
            f"{path} is a universal checkpoint of DeepSpeed without config.json; put the model's "
            "there"
        )
    require_inside(path, file)
    config = read_json(file, LIMIT)
    if not isinstance(config, dict):
        raise GrowkitError(f"{file} is not a JSON object")
    return drop_code_keys(config)[0]


def _find_home(path: Path) -> Path:
    """The directory that latest_universal names."""
    require_inside(path, path / LATEST)
    tag = read_regular(path / LATEST, 1000).decode(errors="replace").strip()
    if not re.fullmatch(r"[\w-][\w.-]*", tag) or not (path / tag / "zero").is_dir():
        raise GrowkitError(f"{path / LATEST} names {tag!r}, which has no zero/ there")
    several = sorted(file.name for file in (path / tag).glob("*mp_rank_*_model_states.pt"))
    if several != [STATES]:
        raise GrowkitError(
            f"{path / tag} must have {STATES} alone, without tensor or pipeline parallelism or "
            f"ZeRO 3, and has {', '.join(several[:3]) or 'none'}"
        )
    return path / tag


def _open_inside(path: Path, file: Path) -> TorchFile:
    if not os.path.lexists(file):
        raise GrowkitError(f"{file} is missing")
    require_inside(path, file)
    return open_state(file)


def _read_groups(states: TorchFile, model: Architecture) -> list[dict[str, str]]:
    """Of each group: name in the model -> name in the table. Raises GrowkitError for no groups."""
    groups = states.value.get(SHAPES)
    if not isinstance(groups, list) or not all(isinstance(each, Mapping) for each in groups):
        raise GrowkitError(f"{states.path} has no {SHAPES}, the parameters by group")
    if states.value.get("frozen_param_shapes"):
        raise GrowkitError(f"{states.path} has frozen parameters, whose moments are nowhere")
    return [{str(name): find_name(str(name), model) for name in group} for group in groups]


class _Reading:
    """The files of a universal checkpoint as they are opened."""

    def __init__(self, path: Path, home: Path, model: Architecture) -> None:
        self.path = path
        self.home = home
        self.model = model
        self.tensors: dict[str, dict[str, Tensor]] = {slot: {} for slot in FILES}
        self.locations: dict[str, str] = {}
        self.steps: dict[str, Any] = {}
        self.files: list[Path] = []
        self.names: set[str] = set()
        self.forms: dict[str, Mapping[str, Any]] = {}

    def read(self, name: str, known: str) -> None:
        """Open the files of a parameter. known: its name in the table."""
        if "/" in name or name.startswith("."):
            raise GrowkitError(f"{self.home / STATES} names the parameter {name!r}, which is none")
        if known in self.tensors["params"]:
            raise GrowkitError(f"{self.home / STATES} has {known} twice among its parameters")
        self.names.add(name)
        for slot, key in FILES.items():
            file = _open_inside(self.path, self.home / "zero" / name / f"{key}.pt")
            self.files.append(file.path)
            stored = file.value.get("param")
            if not isinstance(stored, Stored) or stored.dtype.kind not in "fV":
                raise GrowkitError(f"{file.path} holds no tensor 'param'")
            self.tensors[slot][known] = file.open_tensor(stored, "param")
            self.locations.setdefault(slot, stored.storage.location)
            self._keep_form(file, known)
        step = self.home / "zero" / name / f"{STEP}.pt"
        if os.path.lexists(step):
            require_inside(self.path, step)
            self.files.append(step)
            file = open_torch_file(step)
            self.steps[known] = read_step(file, file.value, name)

    def _keep_form(self, file: TorchFile, known: str) -> None:
        """Note what a file states beside its tensor. Raises GrowkitError where layers differ."""
        form = {key: value for key, value in file.value.items() if key != "param"}
        if not is_plain(form):
            raise GrowkitError(
                f"{file.path} says of {known} how its parts were cut, which growkit does not grow"
            )
        if self.forms.setdefault(make_template(known), form) != form:
            raise GrowkitError(f"{file.path} states other than the same parameter of other layers")

    def check_all_read(self) -> None:
        """Raise GrowkitError for a parameter that no group has."""
        found = {each.name for each in (self.home / "zero").iterdir() if each.is_dir()}
        other = found - self.names
        if other:
            raise GrowkitError(
                f"{self.home / 'zero' / min(other)} is of a parameter that {STATES} does not list"
            )

    def find_count(self) -> Any:
        """Adam's step in the options of the first group, where parameters have none."""
        file = _open_inside(self.path, self.home / "zero" / OPTIMIZER)
        groups = file.value.get("param_groups")
        first = groups[0] if isinstance(groups, list) and groups else None
        return first.get(STEP) if isinstance(first, Mapping) else None

    def describe(
        self, states: TorchFile, groups: Sequence[Mapping[str, str]]
    ) -> tuple[Universal, tuple[str, ...]]:
        """What is kept beside the tensors, and a note of what is not."""
        named = {name: known for group in groups for name, known in group.items()}
        dtype, shared = self._read_module(states, named)
        plain = {}
        left = []
        for key, value in states.value.items():
            if key in (MODULE, SHAPES):
                continue
            if is_plain(value):
                plain[key] = value
            else:
                left.append(str(key))
        universal = Universal(
            self.home.name,
            plain,
            read_regular(self.home / "zero" / OPTIMIZER, LIMIT),
            dtype,
            {known: name for name, known in named.items() if name != known},
            shared,
            self.forms,
            any(self.path.glob("*.safetensors")),
        )
        words = f"{STATES}: {', '.join(left)} left behind, which hold objects of other programs"
        return universal, (words,) if left else ()

    def _read_module(
        self, states: TorchFile, named: Mapping[str, str]
    ) -> tuple[np.dtype, dict[str, str]]:
        """The dtype of the model as it was used, and its further names of parameters."""
        module = states.value.get(MODULE)
        if not isinstance(module, Mapping):
            raise GrowkitError(f"{states.path} has no {MODULE!r}")
        shared = {}
        dtypes = set()
        for name, stored in module.items():
            known = named.get(name)
            if known is None and self.model.tied and find_name(name, self.model) == self._head:
                shared[str(name)] = self._embedding
                continue
            if known is None or not isinstance(stored, Stored):
                raise GrowkitError(f"{states.path}: {name!r} of the model is no parameter")
            if stored.shape != self.tensors["params"][known].shape:
                raise GrowkitError(f"{states.path}: {name} has another shape than its parameter")
            dtypes.add(stored.dtype)
        missing = named.keys() - module.keys()
        if missing or len(dtypes) != 1:
            what = f"lacks {min(missing)}" if missing else "has parameters of several dtypes"
            raise GrowkitError(f"{states.path}: the model {what}")
        return dtypes.pop(), shared

    @property
    def _head(self) -> str:
        return self.model.family.head_name

    @property
    def _embedding(self) -> str:
        return next(row.name for row in self.model.table.rows if row.role == "embedding")


def make_template(name: str) -> str:
    """A name without the numbers of layers and the like."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)


def is_plain(value: Any) -> bool:
    """Whether a value is made of dicts, lists, tuples, numbers and texts alone."""
    if isinstance(value, Mapping):
        return all(is_plain(each) for pair in value.items() for each in pair)
    if isinstance(value, list | tuple):
        return all(is_plain(each) for each in value)
    return not isinstance(value, Inert | Stored) and isinstance(
        value, str | int | float | type(None)
    )


def _read_record(states: TorchFile, optimizer: Optimizer, count: Any) -> dict[str, Any]:
    """The step of training, and how many steps Adam took."""
    numbers = [states.value.get(key) for key in ("global_steps", "skipped_steps")]
    step, skipped = (each if type(each) is int and each >= 0 else 0 for each in numbers)
    taken = max(0, step - skipped)
    if optimizer.steps:
        taken = optimizer.count
    elif type(count) is int and count >= 0:
        taken = count
    return {"step": step, "schedule_step": max(0, step - skipped), "count": taken}
