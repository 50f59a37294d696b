"""Growth in memory: parameters and optimizer states as trees, grown as `growkit.surgery` grows what
lies on disk.

A parameter tree is nested containers that hold exactly the parameters of the axis table (see
`growkit.growth.layout`). It is found by that wherever it stands in a state: in dicts, tuples, named
tuples, lists and dataclasses. What a tree holds, the class of the optax state says that it lies in
(`growkit.growth.optimizers`); in any other container the nearest key above it (`mu`, `nu`). All
else (counts, schedules, masks) passes through.

Arrays keep their kind. numpy stays numpy; jax arrays, traced or sharded, are grown by jax
operations. A box with one array in it (an nnx Variable, linen's Partitioned) is opened, and closed
again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from growkit.errors import GrowkitError, UsageError, require_type
from growkit.growth.layout import (
    Layout,
    Leaf,
    assemble,
    fill_container,
    iterate_leaves,
    join,
    list_units,
    open_mapping,
    path_at,
)
from growkit.growth.optimizers import (
    KEY_MOMENTS,
    STEPS,
    UNKNOWN,
    find_kind,
    find_rule,
    is_chain,
    is_counter,
    is_numbered,
    normalises,
    refuse_unknown,
    refuse_unordered,
)
from growkit.growth.padding import MU, VALUE
from growkit.growth.plan import FIRST_UNSCALED, Plan
from growkit.growth.rule import find_source, grow_array
from growkit.models.notation import Position, Row

# What stands beside a moment. Without one of these, `mu` may be parameters: those of a
# distribution, {"mu": tree, "sigma": tree}.
BESIDE_MOMENTS = {"params", "count", *KEY_MOMENTS}
NUMBERS = (bool, int, float, complex, str, np.generic, type(None))


def grow(tree: Any, plan: Plan, nu: str = "square") -> Any:
    """The tree grown by a plan; the tree given is left as it was.

    tree: parameters, or a state that holds them, or both. nu: "maximum" for a state of Adamax,
    whose nu is the largest absolute gradient and has the class of Adam's state; else "square".
    Returns the same containers with the same kinds of arrays, at the sizes of `plan.grown`. Copies
    have the bits that growth on disk writes; means (mean-pad) agree to the last digits. Raises
    GrowkitError when the tree holds no parameters, when a parameter is missing, unknown or of
    another shape, and TypeError for what is not a plan or not an array.
    """
    require_type("plan", plan, Plan, "as growkit.plan_depth or growkit.plan_width return")
    if plan.upcycling:
        raise UsageError(
            "a dense model becomes a mixture on disk: growkit.write_grown(source, plan, out)"
        )
    if nu not in ("square", "maximum"):
        raise UsageError(f"nu is 'square', or 'maximum' for Adamax; got {nu!r}")
    walk = _Walk(plan, nu == "maximum")
    grown = walk.visit(tree, VALUE)
    if not walk.found:
        raise GrowkitError(_describe_nothing_found(tree, walk.layout))
    return grown


class _Walk:
    """One passage through a state. found: how many parameter trees were met on it."""

    def __init__(self, plan: Plan, maximum: bool = False):
        self.plan = plan
        self.maximum = maximum
        self.layout = Layout(plan.model.table)
        self.found = 0
        # The class and field of the optimizer's state that was entered last.
        self.within = ("", "")
        # Whether the chain normalised its gradients before the state that is being visited.
        self.normalised = False

    def visit(self, node: Any, moment: int) -> Any:
        """A node of the state: grown if it is a parameter tree, else with its children grown."""
        if isinstance(node, Mapping) and self.layout.holds(node):
            return self._grow_tree(node, moment)
        children = _children(node)
        if children is None:
            return node
        grown = self._visit_children(node, children, moment)
        if all(grown[name] is child for name, child in children.items()):
            return node
        return _rebuild(node, grown)

    def _grow_tree(self, tree: Mapping[Any, Any], moment: int) -> Mapping[Any, Any]:
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
        if self.plan.moments != "reset":
            refuse_unordered(node, self.within[0])
        before = self.normalised
        # The keys of a numbered dict may be sorted as text: "10" before "2".
        names = sorted(children, key=int) if is_numbered(node) else list(children)
        for name in names:
            child = children[name]
            rule = self._find_moment(node, name, children, moment)
            resets = self._resets(node, name, children)
            grown[name] = _zero(child) if resets else self.visit(child, rule)
            self.normalised = self.normalised or (chained and normalises(child))
        self.normalised = before
        return {name: grown[name] for name in children}

    def _find_moment(self, node: Any, name: Any, siblings: Mapping[Any, Any], moment: int) -> int:
        """What the trees below a field hold: by the class of an optax state, else by its name."""
        kind = find_kind(node)
        if kind:
            self.within = (kind, str(name))
            return find_rule(kind, name, self.maximum, self.normalised)
        if name not in KEY_MOMENTS:
            return moment
        self._check_moment(name, siblings)
        self._check_squares(siblings)
        rule = KEY_MOMENTS[name]
        return STEPS if rule == MU and self.normalised else rule

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
            parameters = isinstance(child, Mapping) and self.layout.holds(child)
            if other != name and parameters:
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


def grow_parameters(
    tree: Mapping[Any, Any], layout: Layout, plan: Plan, moment: int
) -> Mapping[Any, Any]:
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
    grown_tree: Mapping[Any, Any] = assemble(tree, grown)
    return grown_tree


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

    A leaf without an array is returned as it is, and so is one without dimensions (a mask, a rate)
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
        return leaf
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


def _zero(child: Any) -> Any:
    """A count set to zero, in the kind of number or box that it is."""
    if isinstance(child, int | np.ndarray | np.generic):
        number: Any = child
        return number * 0
    import jax

    return jax.tree.map(lambda count: count * 0, child)


def _children(node: Any) -> dict[Any, Any] | None:
    """The children of a container of a state by field, key or place; None for a leaf."""
    if isinstance(node, Mapping):
        return open_mapping(node)
    if isinstance(node, tuple) and hasattr(node, "_asdict"):
        return dict(node._asdict())
    if isinstance(node, tuple | list):
        return dict(enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        # flax marks the fields that are not part of the tree.
        fields = [
            field for field in dataclasses.fields(node) if field.metadata.get("pytree_node", True)
        ]
        return {field.name: getattr(node, field.name) for field in fields}
    return None


def _rebuild(node: Any, children: dict[Any, Any]) -> Any:
    """A container like `node` of other children."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(**children)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return dataclasses.replace(node, **children)
    return fill_container(node, children)


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
    if isinstance(node, Mapping):
        for path, _ in iterate_leaves(node):
            yield path
        return
    for child in (_children(node) or {}).values():
        yield from _find_paths(child)
