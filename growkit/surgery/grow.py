"""Growth from disk to disk: for every tensor of the output, the recipe that makes it from the
source.

Nothing is read here: recipes are followed when the writer asks for them, so the model is never
whole in memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from growkit.checkpoint.kinds import SCHEDULER
from growkit.checkpoint.optimizer import Optimizer
from growkit.checkpoint.tensor import Contents, Recipe, Source, Tensor, copy_tensor, zeros
from growkit.entries import Growth, Origin
from growkit.errors import UsageError
from growkit.growth.padding import MU, NU, VALUE
from growkit.growth.plan import Plan
from growkit.growth.rule import find_source, moment_fate, needs_work
from growkit.models.layer_fields import follow_layers
from growkit.models.notation import Position, Row
from growkit.surgery.blocks import grown_recipe
from growkit.surgery.groups import check_layout, grow_groups
from growkit.surgery.upcycling import read_upcycled

# What the tensors of each slot of a source are to growth.
SLOT_MOMENTS = {"params": VALUE, "mu": MU, "nu": NU, "nu_max": NU}


def prepare_growth(source: Source, plan: Plan, groups: str = "keep") -> Contents:
    """Everything the grown output holds, nothing of it read yet.

    groups: 'keep' or 'split', what becomes of the parameter groups of an optimizer of PyTorch; see
    `growkit.surgery.groups`. Raises GrowkitError for a source whose optimizer cannot grow,
    UsageError for groups that cannot be split.
    """
    source.require_readable()
    entry = Growth.of(plan, Origin.of(source))
    source = read_upcycled(source, plan)
    recipes = {
        slot: {
            name: _recipe(source, plan, slot, row, position)
            for name, row, position in plan.grown.table.names(plan.grown.sizes)
        }
        for slot in source.tensors
    }
    files = source.files
    optimizer = _grow_optimizer(source, plan, groups)
    if groups == "split":
        entry = replace(entry, more={"groups": groups})
        # Its rates are by group.
        files = {name: content for name, content in files.items() if name != SCHEDULER}
    return Contents(
        config=grow_config(source, plan),
        recipes=recipes,
        lineage=[*source.lineage, entry.to_json()],
        # Adam's count corrects the bias of moments that began at zero: with new ones it begins
        # again.
        record=source.record | ({"count": 0} if plan.moments == "reset" else {}),
        files=files,
        torch_optimizer=optimizer,
        around=source.around,
        distributed=source.distributed,
    )


def _grow_optimizer(source: Source, plan: Plan, groups: str) -> Optimizer | None:
    """The groups of the grown model, None for a source without an optimizer of PyTorch."""
    check_layout(groups)
    optimizer = source.torch_optimizer
    if groups != "keep" and source.distributed is not None:
        raise UsageError(
            f"--groups {groups} is for checkpoints of transformers' Trainer; the groups of a "
            "distributed checkpoint are kept, because the schedule that lies with them is carried "
            "as it is; leave it out"
        )
    if optimizer is not None:
        return grow_groups(optimizer, plan, groups, int(source.record.get("step", 0)))
    if groups != "keep":
        raise UsageError(
            f"--groups is for checkpoints of transformers' Trainer, and {source.path} holds no "
            "optimizer.pt; leave it out"
        )
    return None


def grow_config(source: Source, plan: Plan) -> dict[str, Any]:
    """The grown model's config.json; fields with one entry for each layer follow the map.

    Raises UsageError where the map would give a layer another kind than its source's.
    """
    config = plan.grown.update(source.config)
    if plan.experts:
        config |= plan.experts.fields
    # Width changes sizes alone: fields about single layers stay.
    if "layer" not in plan.maps:
        return config
    index = plan.maps["layer"].index.tolist()
    return follow_layers(config, source.config, plan.grown.family, index)


def _recipe(source: Source, plan: Plan, slot: str, row: Row, position: Position) -> Recipe:
    """The recipe of one new tensor: zeros, the source's bytes again, or a growth of them."""
    moment = SLOT_MOMENTS[slot]
    plan = plan.at(row, position)
    tensor = source.tensors[slot][row.name_at(find_source(plan, row, position))]
    # Nothing is written for zeros: a new file holds them already.
    if moment_fate(plan, row, moment, position) == "zero":
        return zeros(row.shape(plan.grown.sizes), tensor.dtype)
    if not needs_work(row, plan, moment, position):
        return copy_tensor(tensor)
    return grown_recipe(tensor, row, plan, moment, position)


def open_grown(source: Source, plan: Plan) -> Source:
    """The grown model as a source without an output: its tensors are made when they are read."""
    contents = prepare_growth(source, plan)
    tensors = {
        slot: {name: _made_when_read(recipe) for name, recipe in recipes.items()}
        for slot, recipes in contents.recipes.items()
    }
    grown = Source(
        path=source.path,
        kind=source.kind,
        config=contents.config,
        tensors=tensors,
        weights=source.weights,
        lineage=contents.lineage,
        record=contents.record,
        read_files=lambda: contents.files,
    )
    # What is read is the source's files, as they were when it was opened.
    grown.stamps = source.stamps
    return grown


def _made_when_read(recipe: Recipe) -> Tensor:
    """A recipe as a tensor. Rows are cut from the whole, so read it whole."""
    return Tensor(recipe.shape, recipe.dtype, lambda start, stop: recipe.make_array()[start:stop])
