"""Names of tensors in files, brought to those of the axis table; and the head of a model said to be
tied.

Files of one model differ: a base model's lack the prefix, some name the head otherwise, old ones
carry buffers. transformers loads them all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint.tensor import BLOCK, Tensor
from growkit.errors import GrowkitError
from growkit.models.architecture import Architecture
from growkit.models.family import Family
from growkit.models.notation import Position

# What transformers' classes call the output head, now and in earlier versions.
HEADS = ("lm_head.weight", "embed_out.weight")

# How names of causal masks end, in files of old versions.
MASKS = (".attn.bias", ".attention.bias")


@dataclass(frozen=True)
class Named:
    """Tensors under the table's names, the model that they are of, and what was decided on the way.

    config: fields of config.json that the tensors contradict, with the values that hold.
    """

    tensors: dict[str, Tensor]
    model: Architecture
    config: dict[str, Any]
    notes: tuple[str, ...] = ()


def name_tensors(
    tensors: Mapping[str, Tensor], model: Architecture, config: Mapping[str, object], path: Path
) -> Named:
    """The tensors of a file by the table's names, without old buffers.

    Raises GrowkitError where two names of the file mean one parameter.
    """
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unread = []
    for name, tensor in tensors.items():
        if name.endswith(model.buffers) or is_mask(name, tensor, model.family):
            continue
        if is_unread(name, model):
            unread.append(name)
            continue
        for known, part in read_aliases(name, tensor, model.family).items():
            if known in found:
                raise GrowkitError(
                    f"{path} holds the parameter {known!r} twice, as {origin[known]!r} and as "
                    f"{name!r}"
                )
            found[known] = part
            origin[known] = name
    named = _settle_head(found, model, config)
    return replace(named, notes=(*named.notes, *_note_unread(unread)))


def is_mask(name: str, tensor: Tensor, family: Family) -> bool:
    """Whether a tensor is a causal mask, as attention of old checkpoints carries."""
    if not name.endswith(MASKS) or tensor.shape[:2] != (1, 1):
        return False
    candidates = list_candidates(name, family)
    return not any(row.match(each) is not None for row in family.rows for each in candidates)


def _note_unread(names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    more = f" and {len(names) - 1} tensors more" if len(names) > 1 else ""
    return (f"{names[0]}{more} left behind: transformers does not load them",)


def find_name(name: str, model: Architecture) -> str:
    """The table's name for a tensor's name in a file; the name itself where no row covers it."""
    family = model.family
    # Two generations of transformers' names for the head; no row of another role has either name.
    if name in HEADS and family.head_name:
        return family.head_name
    candidates = list_candidates(name, family)
    for candidate in candidates:
        if any(row.match(candidate) is not None for row in family.rows):
            return candidate
    renamed = (_find_renamed(candidate, family) for candidate in candidates)
    return next((known for known in renamed if known), name)


def _find_renamed(name: str, family: Family) -> str:
    """The table's name for one that transformers' memory has instead, empty where there is none."""
    for row, alias in family.aliases.items():
        layer = None if " " in alias else _match_layer(alias, name)
        if layer is not None:
            return row.replace("{layer}", layer)
    return ""


def list_candidates(name: str, family: Family) -> list[str]:
    """What a name in a file may be in the table, the likeliest first.

    A base model's lacks the prefix; a decoder taken out of a larger model has a word more.
    """
    # LayerNorm's first names.
    name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
    inner = name.replace("language_model.", "", 1)
    names = [name] if inner == name else [name, inner]
    return [each for given in names for each in (given, f"{family.prefix}.{given}")]


def is_unread(name: str, model: Architecture) -> bool:
    """Whether a tensor is one that transformers does not load, and no parameter of the model."""
    family = model.family
    if not any(re.search(pattern, name) for pattern in family.unread):
        return False
    known = find_name(name, model)
    positions = [row.match(known) for row in family.rows]
    return not any(found is not None and is_within(found, model) for found in positions)


def is_within(position: Position, model: Architecture) -> bool:
    """Whether a row's unit is of a layer that the model has."""
    return not position or position[0] < model.layer


def read_aliases(name: str, tensor: Tensor, family: Family) -> dict[str, Tensor]:
    """What a tensor of a file holds, by the names of the table: itself, or the blocks of many."""
    head = family.head_name
    if name in HEADS and head:
        return {head: tensor}
    candidates = list_candidates(name, family)
    for candidate in candidates:
        if any(row.match(candidate) is not None for row in family.rows):
            return {candidate: tensor}
    for candidate in candidates:
        parts = _split_alias(candidate, tensor, family)
        if parts:
            return parts
    return {name: tensor}


def _split_alias(name: str, tensor: Tensor, family: Family) -> dict[str, Tensor]:
    """The parts of a tensor that files of transformers' memory hold under this name."""
    parts: dict[str, Tensor] = {}
    for row, alias in family.aliases.items():
        template, _, block = alias.partition(" ")
        layer = _match_layer(template, name)
        if layer is None:
            continue
        known = row.replace("{layer}", layer)
        if not block:
            parts[known] = tensor
            continue
        number, count = map(int, block.split("/"))
        for unit in range(tensor.shape[0] if tensor.shape else 0):
            cut = cut_block(tensor, unit, number, count)
            parts[re.sub(r"\{\w+\}", str(unit), known)] = cut
    return parts


def _match_layer(template: str, name: str) -> str | None:
    """The layer's number in a name, "" for one without; None for another name."""
    before, _, after = template.partition("{layer}")
    if not after:
        return "" if name == template else None
    found = re.fullmatch(rf"{re.escape(before)}([0-9]+){re.escape(after)}", name)
    return found[1] if found else None


def cut_block(tensor: Tensor, unit: int, number: int, count: int) -> Tensor:
    """One of `count` blocks of one unit of a tensor's first dimension, not read yet."""
    rows = tensor.shape[1] // count
    width = math.prod(tensor.shape[2:])
    first = (unit * count + number) * rows * width
    shape = (rows, *tensor.shape[2:])

    def read(start: int, stop: int) -> np.ndarray:
        numbers = tensor.read_numbers(first + start * width, first + stop * width)
        return numbers.reshape(stop - start, *shape[1:])

    size = tensor.dtype.itemsize
    span = tensor.span.part(first * size, rows * width * size) if tensor.span else None
    return Tensor(shape, tensor.dtype, read, span)


def _settle_head(
    found: dict[str, Tensor], model: Architecture, config: Mapping[str, object]
) -> Named:
    """Drop a tied head's copy, keep one that differs, do without one that a base model lacks."""
    head = model.head_name
    if not head:
        return Named(found, model, {})
    if not model.tied:
        return Named(found, _allow_no_head(found, model, config), {})
    if head not in found:
        return Named(found, model, {})
    embedding = next(row.name for row in model.table.rows if row.role == "embedding")
    # Equal copies are dropped: a tied model has one parameter, and growth must change both alike.
    if embedding not in found or are_equal(found[head], found[embedding]):
        del found[head]
        return Named(found, model, {})
    field = model.family.options["tied"]
    note = (
        f"{field} is true, but {head} differs from {embedding}: transformers 5 does not tie such "
        f"a pair, so the head is kept and {field} is false from here on"
    )
    return Named(found, model.change(tied=False), {field: False}, (note,))


def _allow_no_head(
    found: Mapping[str, Tensor], model: Architecture, config: Mapping[str, object]
) -> Architecture:
    """The model without its head, where the file is of a base model that has none."""
    # GPTNeoXModel and the like are saved without a head; ...ForCausalLM without one is broken.
    classes = config.get("architectures")
    base = isinstance(classes, list) and all(str(name).endswith("Model") for name in classes)
    if model.head_name in found or not classes or not base:
        return model
    return replace(model, headless=True)


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers.

    Read a block at a time, up to the first difference.
    """
    if one.shape != other.shape:
        return False
    for start, stop in one.split_rows(BLOCK):
        if not np.array_equal(one.rows(start, stop), other.rows(start, stop)):
            return False
    return True
