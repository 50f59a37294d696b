"""Names of tensors in files, brought to those of the axis table; and the head of a model said to be
tied.

Files of one model differ: a base model's lack the prefix, some name the head otherwise, old ones
carry buffers. transformers loads them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from growkit.checkpoint.tensor import BLOCK, Tensor
from growkit.errors import GrowkitError
from growkit.models.architecture import Architecture

# What transformers' classes call the output head, now and in earlier versions.
HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Named:
    """Tensors under the table's names, the model that they are of, and what was decided on the way.

    config: fields of config.json that the tensors contradict, with the values that hold.
    """

    tensors: dict[str, Tensor]
    model: Architecture
    config: dict[str, bool]
    notes: tuple[str, ...] = ()


def name_tensors(
    tensors: Mapping[str, Tensor], model: Architecture, config: Mapping[str, object], path: Path
) -> Named:
    """The tensors of a file by the table's names, without old buffers.

    Raises GrowkitError where two names of the file mean one parameter.
    """
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name.endswith(model.buffers):
            continue
        known = find_name(name, model)
        if known in found:
            raise GrowkitError(
                f"{path} holds the parameter {known!r} twice, as {origin[known]!r} and as {name!r}"
            )
        found[known] = tensor
        origin[known] = name
    return _settle_head(found, model, config)


def find_name(name: str, model: Architecture) -> str:
    """The table's name for a tensor's name in a file; the name itself where no row covers it."""
    family = model.family
    # Two generations of transformers' names for the head; no row of another role has either name.
    if name in HEADS and family.head_name:
        return family.head_name
    for candidate in (name, f"{family.prefix}.{name}"):
        if any(row.match(candidate) is not None for row in family.rows):
            return candidate
    return name


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
