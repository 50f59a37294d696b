"""Growth from disk to disk: name -> source name -> recipe, for every tensor of every slot, and the lineage.

Nothing is read here: the recipes are made when the writer asks for them, so the model is never whole in
memory. Knows how a plan and a source make contents; leaves the plan's meaning, formats and printing to others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from growkit.checkpoint.tensor import Contents, Recipe, Source, Tensor, copy_of, zeros
from growkit.entries import Growth, Origin
from growkit.growth.padding import MU, NU, VALUE
from growkit.growth.plan import Plan
from growkit.growth.rule import moment_fate, needs_work
from growkit.models.notation import Row
from growkit.surgery.blocks import grown_recipe

MOMENTS = {"params": VALUE, "mu": MU, "nu": NU}


def grown(source: Source, plan: Plan) -> Contents:
    """Everything the grown output holds, nothing of it read yet."""
    recipes = {
        slot: {
            name: _recipe(source, plan, slot, row, layer)
            for name, row, layer in plan.grown.table.names(plan.grown.sizes)
        }
        for slot in source.tensors
    }
    entry = Growth.of(plan, Origin.of(source))
    return Contents(
        config=plan.grown.written(source.config),
        recipes=recipes,
        lineage=[*source.lineage, entry.to_json()],
        record=source.record | ({"count": 0} if plan.moments == "reset" else {}),
        files=source.files,
    )


def _recipe(source: Source, plan: Plan, slot: str, row: Row, layer: int | None) -> Recipe:
    """The recipe of one new tensor: zeros, the source's bytes again, or a growth of them."""
    moment = MOMENTS[slot]
    from_layer = layer
    if layer is not None and "layer" in plan.maps:
        from_layer = int(plan.maps["layer"].index[layer])
    tensor = source.tensors[slot][row.named(from_layer)]
    shape = row.shape(plan.grown.sizes)
    if moment != VALUE and moment_fate(plan, row, moment, layer) == "zero":
        return zeros(shape, tensor.dtype)
    if not needs_work(row, plan, moment, layer):
        return copy_of(tensor)
    return grown_recipe(tensor, row, plan, moment, layer)


def stacked(source: Source, slot: str = "params", dtype: Any = None) -> dict[str, Any]:
    """A slot as the trainer's tree: nested dicts of numpy arrays, layers stacked first; one copy in memory.

    dtype: what to convert to, or None for the source's own (the widest where layers differ).
    """
    model = source.model

    def leaf(row: Row) -> np.ndarray:
        layers = range(model.layer) if row.stacked else [None]
        tensors = [source.tensors[slot][row.named(layer)] for layer in layers]
        array = np.empty(
            (len(tensors), *tensors[0].shape), dtype or np.result_type(*(t.dtype for t in tensors))
        )
        for place, tensor in enumerate(tensors):
            array[place] = tensor.read()
        return array if row.stacked else array[0]

    return model.table.tree(leaf)


def grown_source(source: Source, plan: Plan) -> Source:
    """The grown model as a source, its tensors made when they are read: growth without an output."""
    contents = grown(source, plan)
    tensors = {
        slot: {name: _made_when_read(recipe) for name, recipe in recipes.items()}
        for slot, recipes in contents.recipes.items()
    }
    return Source(
        path=source.path,
        kind=source.kind,
        config=contents.config,
        tensors=tensors,
        weights=source.weights,
        lineage=contents.lineage,
        record=contents.record,
        read_files=lambda: contents.files,
    )


def _made_when_read(recipe: Recipe) -> Tensor:
    """A recipe as a tensor. Rows are cut from the whole, so read it whole."""
    return Tensor(recipe.shape, recipe.dtype, lambda start, stop: recipe.array()[start:stop])
