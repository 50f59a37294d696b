"""PyTorch's distributed checkpoints (`.metadata` and `*.distcp`): a model with its optimizer.

    SRC/.metadata, SRC/*.distcp                  torchtitan, OLMo-core's model_and_optim, own loops
    SRC/pytorch_model_fsdp_0/.metadata, ...      accelerate with FSDP, and transformers' Trainer
    SRC/optimizer_0/.metadata, ...

The model's config.json lies in SRC. A tensor may lie in several files, cut into chunks: each range
of rows is read from the chunks that hold it. torch is not needed, and no pickle is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from growkit.checkpoint.carried import (
    LIMIT,
    Beside,
    drop_code_keys,
    list_beside,
    list_inside,
    require_inside,
)
from growkit.checkpoint.dcp_items import Items
from growkit.checkpoint.dcp_layout import (
    PARAMS,
    Carried,
    Distributed,
    Held,
    Sorted,
    join_keys,
    sort_entries,
)
from growkit.checkpoint.dcp_metadata import read_metadata
from growkit.checkpoint.dcp_names import (
    Spelling,
    find_program,
    find_rotated,
    make_templates,
    rotate_rows,
    translate,
)
from growkit.checkpoint.files import read_json, read_regular
from growkit.checkpoint.hashes import drop_hashes
from growkit.checkpoint.hf_trainer import find_slot_hashes
from growkit.checkpoint.huggingface import JSON_LIMIT, OWN, read_lineage
from growkit.checkpoint.kinds import FOLDERS, METADATA
from growkit.checkpoint.naming import HEADS, Named, name_tensors
from growkit.checkpoint.optimizer import STEP, Group, Optimizer, find_entries, require_step
from growkit.checkpoint.tensor import Source, Tensor, read_model
from growkit.checkpoint.unsuited import refuse_config
from growkit.errors import GrowkitError
from growkit.models.architecture import Architecture
from growkit.models.given import describe_origin

KIND = "dcp"
# What accelerate and transformers' Trainer need besides to go on, carried byte for byte.
TRAINING = re.compile(
    r"scheduler(_\d+)?\.(pt|bin)|trainer_state\.json|training_args\.bin|scaler\.pt"
    r"|(sampler|dl_state_dict)(_\d+)?\.bin|rng_state(_\d+)?\.pth|random_states_\d+\.pkl"
    r"|custom_checkpoint_\d+\.pkl"
)
Slots = dict[str, dict[str, Tensor]]


def open_distributed(path: Path) -> Source:
    """Open a distributed checkpoint; reads its metadata and the headers of its tensors.

    Raises GrowkitError naming the file, key or class at fault.
    """
    config, dropped = _read_config(path)
    lineage = read_lineage(path)
    model = read_model(config, path, lineage if isinstance(lineage, list) else [])
    folders = ("", "") if (path / METADATA).is_file() else FOLDERS
    found = sort_entries(_read_held(path, folders), path)
    items = Items()
    named, spelling = _read_parameters(path, found, items, model, config)
    optimizer, slots = _read_optimizer(path, found, items, spelling)
    hashed, tensors = find_slot_hashes(path, {"params": named.tensors} | slots)
    _turn_heads(tensors, spelling, named.model)
    layout = _lay_out(found, items, folders, spelling)
    training = list_inside(path, TRAINING)
    beside = _list_beside(path, items, training)
    count = 0 if optimizer is None else optimizer.count
    return Source(
        path=path,
        kind=KIND,
        config=config | named.config,
        tensors=tensors,
        weights=[*items.stamps, path / "config.json"],
        lineage=drop_hashes(lineage) if isinstance(lineage, list) else lineage,
        record={"step": count, "schedule_step": count, "count": count} if optimizer else {},
        read_files=lambda: beside.read() | {n: read_regular(path / n, LIMIT) for n in training},
        known_model=named.model,
        notes=(*named.notes, *_note(named.model, spelling), *dropped, *beside.notes),
        torch_optimizer=optimizer,
        hashed=hashed,
        distributed=layout,
    )


def _read_config(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The model's config.json, and notes on it."""
    file = path / "config.json"
    if not file.is_file():
        raise GrowkitError(
            f"{path} is a distributed checkpoint of PyTorch without the model's config.json: put "
            f"it there (model.config.save_pretrained({str(path)!r}))"
        )
    require_inside(path, file)
    config = read_json(file, JSON_LIMIT)
    if not isinstance(config, dict):
        raise GrowkitError(f"{file} is not a JSON object")
    refuse_config(path, config)
    return drop_code_keys(config)


def _note(model: Architecture, spelling: Spelling) -> tuple[str, ...]:
    """Notes on the table and the names."""
    notes = []
    if model.family.given:
        notes.append(f"the table is {describe_origin(model.family)}")
    if spelling.program:
        notes.append(f"the names of parameters are {spelling.program}'s own")
    return tuple(notes)


def _read_held(path: Path, folders: tuple[str, str]) -> dict[str, Held]:
    """The entries of all directories of a checkpoint, by key."""
    held: dict[str, Held] = {}
    for folder in dict.fromkeys(folders):
        directory = path / folder
        if not (directory / METADATA).is_file():
            # A model that was saved without its optimizer.
            continue
        require_inside(path, directory / METADATA)
        for key, entry in read_metadata(directory).items():
            if key in held:
                raise GrowkitError(f"{path} holds {key} in two directories")
            held[key] = Held(directory, entry)
    return held


def _list_beside(path: Path, items: Items, training: tuple[str, ...]) -> Beside:
    """What lies beside the checkpoint's own files."""
    own = [file.name for file in items.stamps if file.parent == path]
    return list_beside(path, (*OWN, *FOLDERS, *training, *own))


def _read_parameters(
    path: Path, found: Sorted, items: Items, model: Architecture, config: Mapping[str, Any]
) -> tuple[Named, Spelling]:
    """The parameters by the table's names, and what the checkpoint calls them."""
    program = find_program(found.parameters, model)
    try:
        known = {name: translate(name, program, model) for name in found.parameters}
    except GrowkitError as problem:
        raise GrowkitError(f"{path}: {problem}") from None
    opened = {name: items.open_tensor(held, name) for name, held in found.parameters.items()}
    tensors = {known[name]: tensor for name, tensor in opened.items()}
    named = name_tensors(tensors, model, config, path)
    # The tensors themselves say which name of the table means which in the checkpoint.
    own = {id(tensor): name for name, tensor in opened.items()}
    pairs = {name: own.get(id(tensor), "") for name, tensor in named.tensors.items()}
    for name, other in pairs.items():
        if not other:
            raise GrowkitError(
                f"{path}: {name} is a part of a larger parameter in the checkpoint, and growkit "
                "does not write such ones there; export the model and grow that"
            )
    spelling = _make_spelling(path, pairs, known, named.model, program)
    dropped = sorted(known.keys() - set(pairs.values()) - spelling.copies.keys())
    if dropped:
        more = f" and {len(dropped) - 1} tensors more" if len(dropped) > 1 else ""
        note = f"{dropped[0]}{more} left behind: no parameter, and no model reads it"
        named = replace(named, notes=(*named.notes, note))
    return named, spelling


def _make_spelling(
    path: Path,
    pairs: Mapping[str, str],
    known: Mapping[str, str],
    model: Architecture,
    program: str,
) -> Spelling:
    """pairs: table's name -> checkpoint's. known: checkpoint's name -> transformers'."""
    embedding = next((row.name for row in model.table.rows if row.role == "embedding"), "")
    copies = {
        name: embedding
        for name, other in known.items()
        if model.tied and other in HEADS and name not in pairs.values()
    }
    try:
        templates = make_templates(pairs, model)
    except GrowkitError as problem:
        raise GrowkitError(f"{path}: {problem}") from None
    names = {other: name for name, other in pairs.items()}
    return Spelling(names, templates, copies, program, find_rotated(program, model))


def _turn_heads(tensors: Slots, spelling: Spelling, model: Architecture) -> None:
    """Bring the heads of a program's own order into transformers'."""
    rows = [row for row in model.table.rows if row.name in spelling.rotated]
    for slot in tensors.values():
        for name in slot:
            if any(row.match(name) is not None for row in rows):
                slot[name] = rotate_rows(slot[name], model.sizes["head_dim"])


def _read_optimizer(
    path: Path, found: Sorted, items: Items, spelling: Spelling
) -> tuple[Optimizer | None, Slots]:
    """The optimizer and its moments, by the table's names; None where there is none."""
    if found.optimizer is None:
        return None, {}
    where = path / join_keys(found.optimizer)
    if not found.state:
        raise GrowkitError(f"{where} holds no state, as of SGD without momentum: nothing grows")
    names = spelling.names
    if all(str(name).isdecimal() for name in found.state):
        raise GrowkitError(
            f"{where} has moments by number, as optimizer.state_dict() gives them, and which "
            "parameter has which number is not stated; save what get_optimizer_state_dict of "
            "torch.distributed.checkpoint.state_dict gives"
        )
    missing = names.keys() ^ found.state.keys()
    if missing:
        raise GrowkitError(
            f"{where} has the moments of {len(found.state)} parameters, and the model has "
            f"{len(names)}; {min(missing)!r} is on one side only"
        )
    entries = find_entries(where, found.state)
    slots: Slots = {slot: {} for slot in entries.values()}
    steps: dict[str, Any] = {}
    for own, state in found.state.items():
        for entry, slot in entries.items():
            slots[slot][names[own]] = items.open_tensor(state[entry], f"{entry} of {own}")
        if STEP in state:
            steps[names[own]] = items.read_value(state[STEP], f"the step of {own}")
    for name, step in steps.items():
        require_step(where, name, step)
    groups = _read_groups(where, found, items, names)
    slot_names = {slot: entry for entry, slot in entries.items()}
    locations = dict.fromkeys(slots, "cpu")
    return Optimizer(groups, slot_names, locations, steps, named=True), slots


def _read_groups(
    where: Path, found: Sorted, items: Items, names: Mapping[str, str]
) -> tuple[Group, ...]:
    """The parameter groups. Where options are kept by parameter, those with equal ones are one."""
    made: list[tuple[list[str], dict[str, Any]]] = []
    listed = found.options if found.flattened else dict(sorted(found.options.items()))
    for label, held in listed.items():
        options = {
            option: items.read_value(each, f"{option} of {label}") for option, each in held.items()
        }
        members = [label] if found.flattened else options.pop(PARAMS, None)
        if not isinstance(members, list) or not all(name in names for name in members):
            raise GrowkitError(
                f"{where}: the group {label} does not name its parameters as the model does; save "
                "what get_optimizer_state_dict of torch.distributed.checkpoint.state_dict gives"
            )
        known = [names[name] for name in members]
        same = next((group for group, each in made if found.flattened and each == options), None)
        if same is None:
            made.append((known, options))
        else:
            same += known
    groups = tuple(Group(tuple(members), options) for members, options in made)
    grouped = [name for group in groups for name in group.names]
    if sorted(grouped) != sorted(names.values()):
        raise GrowkitError(f"{where}: the groups do not hold every parameter once")
    return groups


def _lay_out(
    found: Sorted, items: Items, folders: tuple[str, str], spelling: Spelling
) -> Distributed:
    others = {
        key: Carried(held.entry, items.list_spans(held), held.directory.name == FOLDERS[1])
        for key, held in found.others.items()
    }
    return Distributed(folders, found.model, found.optimizer, found.flattened, spelling, others)
