"""Growth in memory: parameters and optimizer states as trees, grown as `growkit.surgery` grows what
lies on disk.

A parameter tree is nested containers that hold exactly the parameters of the axis table (see
`growkit.growth.layout`). It is found by that wherever it stands in a state: in dicts, tuples, named
tuples, lists and dataclasses. What a tree holds, the class of the optax state says that it lies in
(`growkit.growth.optimizers`); in any other container the nearest key above it (`mu`, `nu`). All
else (counts, schedules, masks) passes through.

Arrays keep their kind. numpy stays numpy; jax arrays, traced or sharded, are grown by jax
operations. A box with one array in it (an nnx Variable, linen's Partitioned) is opened, and closed
again. An nnx module stands for its parameters, an nnx optimizer for its state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from growkit.errors import GrowkitError, UsageError
from growkit.growth.containers import (
    is_array,
    is_nnx_optimizer,
    list_parts,
    open_module,
    put_in_optimizer,
    rebuild,
    set_to_zero,
)
from growkit.growth.layout import (
    Layout,
    Leaf,
    assemble,
    iterate_leaves,
    join,
    list_units,
    path_at,
)
from growkit.growth.optimizers import (
    AVERAGE,
    KEY_MOMENTS,
    PASSED,
    REASONS,
    STEPS,
    UNKNOWN,
    find_kind,
    find_rule,
    is_chain,
    is_counter,
    is_foreign_state,
    is_numbered,
    is_optimizer_state,
    normalises,
    refuse_array,
    refuse_lars,
    refuse_unknown,
    refuse_unordered,
)
from growkit.growth.padding import MU, VALUE
from growkit.growth.plan import FIRST_UNSCALED, Plan
from growkit.growth.rule import find_source, grow_array
from growkit.growth.short import plan_short
from growkit.models.architecture import Architecture
from growkit.models.notation import Position, Row

# What stands beside a moment. Without one of these, `mu` may be parameters: those of a
# distribution, {"mu": tree, "sigma": tree}.
BESIDE_MOMENTS = {"params", "count", *KEY_MOMENTS}
NUMBERS = (bool, int, float, complex, str, np.generic, type(None))


def grow(
    tree: Any,
    plan: Plan | Architecture,
    nu: str = "square",
    mu: str = "gradient",
    *,
    map: str | None = None,
    method: str | None = None,
    embed: str | int | None = None,
    heads: str | int | None = None,
    mlp: str | int | None = None,
    head_dim: str | int | None = None,
) -> Any:
    """The tree grown by a plan; the tree given is left as it was.

    tree: parameters, or a state that holds them, or both; an nnx module stands for
    `nnx.state(module, nnx.Param)` and an nnx optimizer for its `nnx.state`. plan: or a model, with
    what shall grow: map and method as `plan_depth` takes them ("18:24", "identity"), sizes as
    `plan_width` does. Two optimizers have states that look like Adam's. nu: "maximum" for Adamax's,
    whose nu is the largest absolute gradient. mu: "step" for ADOPT's, whose mu averages normalised
    steps.

    Returns the same containers with the same kinds of arrays, at the sizes of `plan.grown`. Copies
    have the bits that growth on disk writes; means (mean-pad) agree to the last digits. Raises
    GrowkitError when the tree holds no parameters, when a parameter is missing, unknown or of
    another shape, and for an optimizer that cannot grow; TypeError for what is not a plan or not an
    array.
    """
    sizes = {"embed": embed, "heads": heads, "mlp": mlp, "head_dim": head_dim}
    chosen = plan_short(plan, map, method, sizes)
    if nu not in ("square", "maximum"):
        raise UsageError(f"nu is 'square', or 'maximum' for Adamax; got {nu!r}")
    if mu not in ("gradient", "step"):
        raise UsageError(f"mu is 'gradient', or 'step' for ADOPT; got {mu!r}")
    walk = _Walk(chosen, nu == "maximum", mu == "step")
    grown = walk.visit(tree, VALUE)
    if not walk.found:
        raise GrowkitError(_describe_nothing_found(tree, walk.layout))
    return grown


class _Walk:
    """One passage through a state. found: how many parameter trees were met on it."""

    def __init__(self, plan: Plan, maximum: bool = False, steps: bool = False):
        if plan.upcycling:
            raise UsageError(
                "a dense model becomes a mixture on disk: growkit.write_grown(source, plan, out)"
            )
        self.plan = plan
        self.maximum = maximum
        self.steps = steps
        self.layout = Layout(plan.model.table)
        self.found = 0
        # The class and field of the optimizer's state that was entered last.
        self.within = ("", "")
        # Whether the node that is being visited lies in a state of optax.
        self.in_optimizer = False
        # Whether the chain normalised its gradients before the state that is being visited.
        self.normalised = False

    def visit(self, node: Any, moment: int) -> Any:
        """A node of the state: grown if it is a parameter tree, else with its children grown."""
        if is_nnx_optimizer(node):
            return put_in_optimizer(node, self.visit(node.opt_state, VALUE))
        node = open_module(node)
        if self._is_parameters(node):
            return self._grow_tree(node, moment)
        children = list_parts(node)
        if children is None:
            return node
        grown = self._visit_children(node, children, moment)
        if all(grown[name] is child for name, child in children.items()):
            return node
        return rebuild(node, grown)

    def _is_parameters(self, node: Any) -> bool:
        """Whether a node is a parameter tree."""
        if isinstance(node, Mapping):
            return self.layout.holds(node)
        return self.layout.holds_units(node)

    def _grow_tree(self, tree: Any, moment: int) -> Any:
        """A parameter tree, grown by the rule of what it holds."""
        if moment == UNKNOWN:
            raise refuse_unknown(*self.within)
        self.found += 1
        if moment != STEPS:
            return grow_parameters(tree, self.layout, self.plan, moment)
        # Steps that were divided by their own size carry no power of the share: they are copied.
        fates = {"reset": "reset", "first": FIRST_UNSCALED}
        copied = dataclasses.replace(self.plan, moments=fates.get(self.plan.moments, "copy"))
        return grow_parameters(tree, self.layout, copied, MU)

    def _visit_children(
        self, node: Any, children: Mapping[Any, Any], moment: int
    ) -> dict[Any, Any]:
        """The children of a container, grown; moment: what the container itself stands for."""
        grown = {}
        chained = is_chain(node, self.within[0])
        self._check_state(node, children)
        before, outside = self.normalised, self.in_optimizer
        parts = [node, *children.values()] if chained else [node]
        self.in_optimizer = outside or any(map(is_optimizer_state, parts))
        # The keys of a numbered dict may be sorted as text: "10" before "2".
        names = sorted(children, key=int) if is_numbered(node) else list(children)
        for name in names:
            child = children[name]
            rule = self._find_moment(node, name, children, moment)
            resets = self._resets(node, name, children)
            grown[name] = set_to_zero(child) if resets else self.visit(child, rule)
            self.normalised = self.normalised or (chained and normalises(child))
        self.normalised, self.in_optimizer = before, outside
        return {name: grown[name] for name in children}

    def _check_state(self, node: Any, children: Mapping[Any, Any]) -> None:
        """Raise GrowkitError for a state of an optimizer that cannot grow."""
        if self.plan.moments != "reset":
            refuse_unordered(node, self.within[0])
            refuse_lars(node)
        kind = find_kind(node)
        # What a plain dict {count, ema} is, what it holds decides.
        if kind in REASONS and kind != AVERAGE and self._holds_parameters(node):
            raise refuse_unknown(kind, str(next(iter(children))))
        # A moment that is one array, in a state that is a plain dict: {count, mu, nu}.
        plain = {} if kind else KEY_MOMENTS
        beside = children.keys() & {"count", *KEY_MOMENTS}
        for name, child in children.items():
            moment = name in plain and len(beside) > 1
            if ((kind and name not in PASSED) or moment) and is_array(child):
                raise refuse_array(kind or "", str(name))

    def _holds_parameters(self, node: Any) -> bool:
        """Whether there is a parameter tree anywhere in a node."""
        if self._is_parameters(node):
            return True
        return any(map(self._holds_parameters, (list_parts(node) or {}).values()))

    def _find_moment(self, node: Any, name: Any, siblings: Mapping[Any, Any], moment: int) -> int:
        """What the trees below a field hold: by the class of an optax state, else by its name."""
        kind = find_kind(node)
        if kind:
            self.within = (kind, str(name))
            rule = find_rule(kind, name, self.maximum, self.normalised)
            looks_like_adam = kind == "ScaleByAdamState" and rule == MU
            return STEPS if self.steps and looks_like_adam and name == "mu" else rule
        if name not in KEY_MOMENTS:
            if not is_foreign_state(node, self.in_optimizer):
                return moment
            self.within = (type(node).__name__, str(name))
            return UNKNOWN
        self._check_moment(name, siblings)
        self._check_squares(siblings)
        if self.maximum and name == "nu":
            return MU
        rule = KEY_MOMENTS[name]
        steps = self.normalised or (self.steps and name == "mu")
        return STEPS if rule == MU and steps else rule

    def _check_squares(self, siblings: Mapping[Any, Any]) -> None:
        """Raise GrowkitError where `mu` and `nu` are not of one form: of SM3 and NovoGrad."""
        first, second = siblings.get("mu"), siblings.get("nu")
        if not isinstance(first, Mapping) or not isinstance(second, Mapping):
            return
        holds = [self.layout.holds(tree) for tree in (first, second)]
        shapes = {getattr(leaf, "shape", None) for _, leaf in iterate_leaves(second)}
        if any(holds) and (not all(holds) or shapes == {()}):
            raise GrowkitError(
                "the tree has moments under 'mu' and 'nu' that are not both one number for each "
                "parameter, as those of SM3 and NovoGrad: such a state cannot grow; start that "
                "optimizer anew after growth"
            )

    def _check_moment(self, name: str, siblings: Mapping[Any, Any]) -> None:
        """Raise GrowkitError where parameters called `mu` may be no moment, by what is beside."""
        if BESIDE_MOMENTS & siblings.keys() - {name}:
            return
        for other, child in siblings.items():
            if other != name and self._is_parameters(child):
                raise GrowkitError(
                    f"the tree has parameters under {name!r} and under {other!r}: it is not clear "
                    f"that {name!r} is an optimizer's moment, which grows by another rule; put "
                    f"moments beside 'params' or 'count', and call parameters otherwise"
                )

    def _resets(self, node: Any, name: Any, siblings: Mapping[Any, Any]) -> bool:
        """Whether a field counts steps of moments that begin again; a schedule's own goes on."""
        if self.plan.moments != "reset":
            return False
        kind = find_kind(node)
        if kind:
            return is_counter(kind, name)
        return name == "count" and bool(siblings.keys() & KEY_MOMENTS.keys())


def grow_parameters(tree: Any, layout: Layout, plan: Plan, moment: int) -> Any:
    """A parameter tree, or the tree of one moment, grown."""
    leaves = layout.read(tree, plan.model.sizes)
    # A tree may hold layers one by one; a new layer then takes the leaf of the one it copies.
    units = {(leaf.row.name, leaf.position): leaf for leaf in leaves}
    grown: list[Leaf] = []
    done = set()
    for leaf in leaves:
        row = leaf.row
        if leaf.position is None:
            value = grow_leaf(leaf.value, row, plan, moment)
            grown.append(Leaf(leaf.path, value, row, None, leaf.path))
        elif row.name not in done:
            done.add(row.name)
            for position in list_units(row, plan.grown.table, plan.grown.sizes):
                origin = units[row.name, find_source(plan, row, position)]
                grown.append(_grow_unit(origin, plan, moment, position))
    return assemble(tree, grown)


def _grow_unit(origin: Leaf, plan: Plan, moment: int, position: Position) -> Leaf:
    """The leaf of one new unit, from that of the unit that it copies."""
    row = origin.row

    def grow_it(array: Any, xp: Any) -> Any:
        _check_shape(array, row.shape(plan.model.sizes), origin.name)
        return grow_array(array, row, plan, moment, position, xp)

    scalar = not row.shape(plan.model.sizes)
    value = _change_array(origin.value, grow_it, origin.name, scalar)
    path = path_at(row, position, origin.path)
    return Leaf(path, value, row, position, origin.path)


def grow_leaf(leaf: Any, row: Row, plan: Plan, moment: int = VALUE) -> Any:
    """A leaf that holds a whole row, stacked axes first, grown.

    What has no dimensions (a mask, a rate) passes through. Raises GrowkitError for a shape that is
    not the row's.
    """
    name = join(row.path)

    def grow_it(array: Any, xp: Any) -> Any:
        _check_shape(array, row.stacked_shape(plan.model.sizes), name)
        if not row.stacked:
            return grow_array(array, row, plan, moment, (), xp)
        units = [
            grow_array(array[find_source(plan, row, position)], row, plan, moment, position, xp)
            for position in row.positions(plan.grown.sizes)
        ]
        return xp.stack(units).reshape(row.stacked_shape(plan.grown.sizes))

    scalar = not row.stacked_shape(plan.model.sizes)
    return _change_array(leaf, grow_it, name, scalar)


def _change_array(
    leaf: Any, change: Callable[[Any, Any], Any], name: str, scalar: bool = False
) -> Any:
    """The leaf with its array changed by `change(array, numpy or jax.numpy)`.

    A leaf without an array stays as it is, and so does one without dimensions (a mask, a rate)
    unless the parameter itself has none.
    """
    if isinstance(leaf, NUMBERS):
        return leaf
    if isinstance(leaf, np.ndarray):
        if not leaf.shape and not scalar:
            return leaf
        grown = np.asarray(change(leaf, np))
        # Without this, copies of one layer would be the same memory.
        return grown.copy() if np.may_share_memory(grown, leaf) else grown
    # Imported here, because trees of numpy arrays grow without jax.
    import jax

    arrays, box = jax.tree.flatten(leaf)
    if not arrays:
        # Anew, because nnx takes one box in two places for one variable.
        return jax.tree.unflatten(box, [])
    if len(arrays) > 1 or not isinstance(arrays[0], jax.Array | np.ndarray):
        kind = type(arrays[0] if len(arrays) == 1 else leaf).__name__
        raise TypeError(f"growkit.grow takes numpy and jax arrays, but {name!r} is of type {kind}")
    if arrays[0] is leaf:
        return change(leaf, jax.numpy) if leaf.shape or scalar else leaf
    return jax.tree.unflatten(box, [_change_array(arrays[0], change, name, scalar)])


def _check_shape(array: Any, wanted: tuple[int, ...], name: str) -> None:
    if tuple(array.shape) != wanted:
        raise GrowkitError(
            f"the parameter {name!r} has shape {list(array.shape)}, but the plan's model asks for "
            f"{list(wanted)}"
        )


def _describe_nothing_found(tree: Any, layout: Layout) -> str:
    path = next(_find_paths(tree), None)
    if path is not None:
        return layout.describe_unknown(path)
    return (
        "the tree holds no parameters: it has no arrays in dicts; of a Flax model take the params "
        "dict, or nnx.state(model, nnx.Param)"
    )


def _find_paths(node: Any) -> Iterator[tuple[Any, ...]]:
    """The paths of leaves below mappings, wherever the mappings stand in a state."""
    node = open_module(node)
    if isinstance(node, Mapping):
        for path, _ in iterate_leaves(node):
            yield path
        return
    for child in (list_parts(node) or {}).values():
        yield from _find_paths(child)
