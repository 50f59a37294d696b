"""Growth in memory: parameters and optimizer states as trees, grown as surgery grows what lies on disk.

A parameter tree is nested dicts with exactly the axis table's paths, layers stacked first. It is found by
that wherever it stands in a state: in dicts, tuples, named tuples, lists and dataclasses. The nearest name on the
way says which moment it holds. All else (counts, schedules, masks) passes through. Arrays keep their kind:
numpy stays numpy; jax arrays, traced or sharded, are grown by jax operations. Knows trees; leaves the rule of
growth to `growkit.growth.rule`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit.errors import GrowkitError, find_nearest
from growkit.growth.padding import MU, NU, VALUE
from growkit.growth.plan import Plan
from growkit.growth.rule import find_source, grow_array
from growkit.models.notation import Row

# What a field or key says of the trees below it; optax's momentum (`trace`) and AMSGrad's `nu_max` grow likewise.
MOMENTS = {"mu": MU, "nu": NU, "trace": MU, "nu_max": NU}


def grow(tree: Any, plan: Plan) -> Any:
    """`tree`, parameters or a state that holds them, grown by `plan`; the tree given is left as it was.

    Copies are bit for bit what growth on disk writes; means (mean-pad) are so to the last digits. Raises GrowkitError
    where no parameter tree is found, where one lacks a parameter or has one too many, and for a wrong shape.
    """
    walk = _Walk(plan)
    grown = walk.node(tree, VALUE)
    if not walk.found:
        path = next(_paths(tree), None)
        raise GrowkitError(
            "the tree holds no parameters: it has no arrays in dicts"
            if path is None
            else _unknown(path, walk.rows)
        )
    return grown


@dataclass
class _Walk:
    """One passage through a tree; `found` counts the parameter trees met on it."""

    plan: Plan
    found: int = 0

    def __post_init__(self):
        self.rows = {row.path: row for row in self.plan.model.table.rows}

    def node(self, node: Any, moment: int) -> Any:
        """A node of the tree, grown if it is a parameter tree, else with its children grown."""
        if isinstance(node, Mapping):
            paths = set(_paths(node))
            if paths & self.rows.keys():
                self._check(paths)
                self.found += 1
                return self.parameters(node, moment)
        children = _children(node)
        if children is None:
            return node
        grown = {
            name: self._child(name, child, children, moment) for name, child in children.items()
        }
        same = all(grown[name] is child for name, child in children.items())
        return node if same else _rebuilt(node, grown)

    def _child(self, name: Any, child: Any, siblings: Mapping[Any, Any], moment: int) -> Any:
        if self.plan.moments == "reset" and name == "count" and siblings.keys() & MOMENTS.keys():
            return child * 0
        return self.node(child, MOMENTS.get(name, moment))

    def _check(self, paths: set[tuple[Any, ...]]) -> None:
        """Raise GrowkitError unless the paths are exactly the table's."""
        for path in sorted(paths - self.rows.keys(), key=str):
            raise GrowkitError(_unknown(path, self.rows))
        for path in self.rows.keys() - paths:
            raise GrowkitError(
                f"the tree lacks the parameter {'.'.join(path)!r}, which {self.rows[path].name} is"
            )

    def parameters(
        self, node: Mapping[str, Any], moment: int, path: tuple[str, ...] = ()
    ) -> Mapping[str, Any]:
        """A parameter tree, or the part of it below `path`, grown."""
        grown = {}
        for key, child in node.items():
            here = (*path, key)
            if here in self.rows:
                grown[key] = grow_leaf(child, self.rows[here], self.plan, moment)
            else:
                grown[key] = self.parameters(child, moment, here)
        return _rebuilt(node, grown)


def grow_leaf(leaf: Any, row: Row, plan: Plan, moment: int = VALUE) -> Any:
    """One parameter of the tree, layers stacked first; what has no dimensions (a mask, a rate) passes through.

    Raises GrowkitError for a shape that is not the row's.
    """
    if not getattr(leaf, "shape", ()):
        return leaf
    model = plan.model
    wanted = row.stacked_shape(model.sizes)
    if tuple(leaf.shape) != wanted:
        raise GrowkitError(
            f"the parameter {'.'.join(row.path)!r} has shape {list(leaf.shape)}, but the plan's model asks for "
            f"{list(wanted)}"
        )
    xp = _array_module(leaf)
    if not row.stacked:
        return grow_array(leaf, row, plan, moment, (), xp)
    units = [
        grow_array(leaf[find_source(plan, row, position)], row, plan, moment, position, xp)
        for position in row.positions(plan.grown.sizes)
    ]
    return xp.stack(units).reshape(row.stacked_shape(plan.grown.sizes))


def _array_module(array: Any) -> Any:
    """numpy for its arrays, jax.numpy for every other."""
    if isinstance(array, np.ndarray):
        return np
    import jax.numpy as jnp

    return jnp


def _paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all that is not a mapping below a mapping; what other containers hold is looked at by itself."""
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from _paths(child, (*path, key))
    elif path:
        yield path
    else:
        for child in (_children(node) or {}).values():
            yield from _paths(child)


def _children(node: Any) -> dict[Any, Any] | None:
    """The children of a container by field, key or place; None for a leaf."""
    if isinstance(node, Mapping):
        return dict(node)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return node._asdict()
    if isinstance(node, tuple | list):
        return dict(enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        # flax marks the fields that are no part of the tree.
        fields = (
            field for field in dataclasses.fields(node) if field.metadata.get("pytree_node", True)
        )
        return {field.name: getattr(node, field.name) for field in fields}
    return None


def _rebuilt(node: Any, children: dict[Any, Any]) -> Any:
    """A container like `node` of other children."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(**children)
    if isinstance(node, tuple | list):
        return type(node)(children.values())
    if dataclasses.is_dataclass(node):
        return dataclasses.replace(node, **children)
    make: Callable[[dict[Any, Any]], Any] = type(node)
    return make(children)


def _unknown(path: tuple[Any, ...], rows: Mapping[tuple[str, ...], Row]) -> str:
    name = ".".join(map(str, path))
    best = find_nearest(name, [".".join(known) for known in rows], likeness=0.4)
    hint = f"; the nearest row is {rows[tuple(best.split('.'))].name}" if best else ""
    return f"no row of the axis table covers the parameter {name!r}{hint}"
