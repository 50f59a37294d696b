"""The state of training: of a new model, of a model on disk, and as a checkpoint holds it.

On disk the moments lie beside the parameters, by name (params, mu, nu). In memory they lie within
optax's state, and are found there by structure, never by position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from growkit.checkpoint.numbers import Findings
from growkit.checkpoint.tensor import Source, Tensor
from growkit.models.architecture import Architecture
from growkit.models.notation import Position, Row
from trainer.config.sections import Config
from trainer.devices.sharding import place
from trainer.model.decoder import init_params
from trainer.step.part import ALL, Part
from trainer.step.update import State, init_state

# Before the names of moments that only a part of the parameters has.
PARTIAL = "new_"


def new_state(config: Config, model: Architecture, like: State) -> State:
    """The state of a new model, computed where it is to lie. like: its shapes and shardings."""

    def make() -> State:
        params = init_params(model, config.precision, config.seed)
        return init_state(config, model, params)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    state: State = jax.jit(make, out_shardings=shardings)()
    return state


def from_source(
    source: Source,
    like: State,
    continued: bool = False,
    step: int = 0,
    findings: Findings | None = None,
    part: Part = ALL,
) -> State:
    """The state that begins with a model on disk: its parameters, moments and Adam's count.

    like: its shapes, dtypes and shardings. The schedule begins again unless it is `continued`. A
    source without Adam's moments starts them at zero with count 0. step: the run's, 0 unless the
    model was grown on the way. findings: told the numbers of this process's parts. part: the
    parameters that are trained, which alone have moments.
    """

    def counter(value: int) -> jax.Array:
        return place(np.asarray(value, np.int32), like.step.sharding)

    table = source.model.table
    tree = jax.tree.map(_zeros, to_tree(like))
    # One that has found nothing is false.
    findings = Findings() if findings is None else findings
    adam = {"mu", "nu"} <= source.tensors.keys()
    for slot in ("params", "mu", "nu") if adam else ("params",):
        held = ALL if slot == "params" else part
        key = slot if slot == "params" else _name_slot(slot, like)
        read = partial(_read, source.tensors[slot], partial(findings.look, slot), held)
        rows = held.tree(table, lambda row: row)
        tree[key] = jax.tree.map(read, rows, tree[key])
    # Adam's count belongs to the moments: without them it begins at 0.
    if adam:
        tree["count"] = counter(source.record.get("count", 0))
    if continued:
        tree["schedule_step"] = counter(source.record.get("schedule_step", 0))
    tree["step"] = counter(step)
    return from_tree(tree, like)


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    # A view of one zero: the zeros of a large moment take no memory of the host.
    return place(np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), leaf.sharding)


def _read(
    tensors: Mapping[str, Tensor],
    look: Callable[[str, np.ndarray], None],
    part: Part,
    row: Row,
    leaf: jax.ShapeDtypeStruct,
) -> jax.Array:
    """One row's parameter, in the dtype and sharding of `leaf`.

    Read one layer at a time. Only the shards of this process's devices are kept. look: told each
    layer's name and its part. part: whose layers the first dimension of `leaf` counts.
    """
    indices = {
        _key(index): index
        for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    }
    shard_shape = leaf.sharding.shard_shape(leaf.shape)
    # Equal places are one array: replicas on several devices are read once.
    shards = {key: np.empty(shard_shape, leaf.dtype) for key in indices}
    stacked = len(row.stacked)
    # One layer, or expert of one, is in memory at a time, whatever the size of the model.
    for position in np.ndindex(leaf.shape[:stacked]):
        within = {key: _find_within(position, index) for key, index in indices.items()}
        if all(unit is None for unit in within.values()):
            continue
        name = row.name_at(part.find_unit(position))
        array = tensors[name].read()
        for key, unit in within.items():
            if unit is not None:
                shards[key][unit] = array[indices[key][stacked:]]
                look(name, np.asarray(shards[key][unit]))
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: shards[_key(index)]
    )


def _find_within(position: Position, index: tuple[slice, ...]) -> Position | None:
    """Where a unit of the stacked axes lies in a shard of these indices; None for in another."""
    within = []
    for unit, part in zip(position, index, strict=False):
        first = part.start or 0
        if unit < first or (part.stop is not None and unit >= part.stop):
            return None
        within.append(unit - first)
    return tuple(within)


def _key(index: tuple[slice, ...]) -> tuple[tuple[int | None, int | None], ...]:
    """A shard's place in the whole array, hashable."""
    return tuple((part.start, part.stop) for part in index)


def to_tree(state: State) -> dict[str, Any]:
    """The state as a checkpoint holds it: params, mu, nu and the counters.

    Moments of a part of the parameters are no model's moments, and have names of their own.
    """
    return {
        "params": state.params,
        _name_slot("mu", state): optax.tree.get(state.optimizer, "mu"),
        _name_slot("nu", state): optax.tree.get(state.optimizer, "nu"),
        "count": optax.tree.get(state.optimizer, "count"),
        "step": state.step,
        "schedule_step": state.schedule_step,
    }


def from_tree(tree: dict[str, Any], like: State) -> State:
    """The inverse of `to_tree`; the optimizer's state has the structure of `like`'s."""
    mu, nu = (tree[_name_slot(slot, like)] for slot in ("mu", "nu"))
    optimizer = optax.tree.set(like.optimizer, mu=mu, nu=nu, count=tree["count"])
    return State(tree["params"], optimizer, tree["step"], tree["schedule_step"])


def _name_slot(slot: str, state: State) -> str:
    """The name of a moment in a checkpoint: 'mu', or 'new_mu' where only a part has one."""
    moment = optax.tree.get(state.optimizer, slot)
    whole = jax.tree.structure(moment) == jax.tree.structure(state.params)
    return slot if whole else f"{PARTIAL}{slot}"
