"""Which leaf of a parameter tree is which parameter of the table.

A tree may hold the units of a stacked axis in one of two ways, row by row:

    stacked    layers.mlp.kernel, of shape [layer, ...]    as nn.scan and the trainer have it
    by unit    layers.0.mlp.kernel, layers.1.mlp.kernel    keys of dicts, or places in a list

Containers are mappings (dict, FrozenDict, nnx.State), lists and tuples. This file takes a tree
apart, finds the row of each leaf, and puts a tree together again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from growkit.errors import GrowkitError, find_nearest
from growkit.models.notation import STACKED, UNIT, Position, Row
from growkit.models.table import Table

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Leaf:
    """A leaf of a parameter tree.

    position: its unit of the row's stacked axes; None for a leaf that holds all units. origin: the
    path of the leaf that it was made from.
    """

    path: Path
    value: Any
    row: Row
    position: Position | None
    origin: Path = ()

    @property
    def name(self) -> str:
        """The path as one word."""
        return join(self.path)


class Layout:
    """Finds the rows of a table by paths, in either way of holding stacked axes."""

    def __init__(self, table: Table):
        self.table = table
        self.rows = table.rows
        # A row of one kind of layers has no place in an array over all layers.
        self._stacked = {row.path: row for row in table.rows if not row.kind}
        self._by_unit = [(row, _compile(row)) for row in table.rows if row.stacked]
        # Whether the tree itself may be a list of layers: `{layer}.up.kernel`.
        self._rooted = any(STACKED.match(row.inner_name) for row in table.rows)

    def find(self, path: Path) -> tuple[Row, Position | None] | None:
        """The row at a path and the unit of its stacked axes (None: all); None for no row."""
        keys = tuple(str(key) for key in path)
        # Whole arrays first: their paths have no numbers, so the two cannot be confused.
        if keys in self._stacked:
            return self._stacked[keys], None
        name = "/".join(keys)
        for row, pattern in self._by_unit:
            found = pattern.fullmatch(name)
            if found:
                return row, tuple(int(unit) for unit in found.groups())
        return None

    def read(self, tree: Any, sizes: Mapping[str, int]) -> list[Leaf]:
        """All leaves of a parameter tree, in its order.

        Raises GrowkitError unless they are exactly the table's parameters at `sizes`, each once.
        """
        leaves = []
        unknown = []
        for path, value in iterate_leaves(tree, empty=True):
            found = self.find(path)
            if found is None and list_children(value) != {}:
                unknown.append((path, value))
            elif found is not None:
                leaves.append(Leaf(path, value, *found))
        if unknown:
            path, value = min(unknown, key=lambda leaf: join(leaf[0]))
            raise GrowkitError(self.describe_unknown(path, value))
        for row in self.rows:
            found_units = [leaf for leaf in leaves if leaf.row is row]
            _check_units(row, found_units, list_units(row, self.table, sizes), sizes)
        return leaves

    def holds(self, tree: Mapping[Any, Any]) -> bool:
        """Whether any leaf is a parameter of the table."""
        return any(self.find(path) for path, _ in iterate_leaves(tree))

    def holds_units(self, tree: Any) -> bool:
        """Whether a list or tuple is a list of layers, by the paths and dimensions of its leaves.

        By dimensions, because a tuple of two trees with stacked layers has the same paths.
        """
        if not self._rooted or type(tree) not in (list, tuple):
            return False
        leaves = list(iterate_leaves(tree))
        return bool(leaves) and all(self._is_unit(path, value) for path, value in leaves)

    def _is_unit(self, path: Path, value: Any) -> bool:
        """Whether a leaf is one unit of a row's stacked axes."""
        found = self.find(path)
        if found is None or found[1] is None:
            return False
        shape = getattr(value, "shape", None)
        return shape is None or len(shape) == len(found[0].blocks)

    def describe_unknown(self, path: Path, value: Any = None) -> str:
        """A sentence about a path that no row covers, with the nearest row.

        value: what lies there, which may be a variable of an nnx module that is no parameter.
        """
        name = join(path)
        kinds = {base.__name__ for base in type(value).__mro__}
        if "Variable" in kinds and not kinds & {"Param", "OptVariable", "OptState"}:
            return (
                f"{name!r} is of type {type(value).__name__} and no parameter; give the module "
                f"itself, or nnx.state(model, nnx.Param)"
            )
        known = {".".join(row.path): row for row in self.rows}
        # Numbers of layers are taken out, because rows' paths have none.
        best = find_nearest(re.sub(r"\.\d+(?=\.)", "", name), known, likeness=0.4)
        hint = f"; the nearest row is {known[best].name}" if best else ""
        return f"no row of the axis table covers the parameter {name!r}{hint}"


def list_units(row: Row, table: Table, sizes: Mapping[str, int]) -> list[Position]:
    """The units of the row's stacked axes that have the parameter, in order."""
    return [
        position for position in row.positions(sizes) if not position or table.has(row, position[0])
    ]


def path_at(row: Row, position: Position, like: Path) -> Path:
    """The path of one unit of a row in a tree that holds another unit at the path `like`."""
    words = row.inner_name
    for unit in position:
        words = STACKED.sub(str(unit), words, count=1)
    return tuple(_make_key(word, key) for word, key in zip(words.split("."), like, strict=True))


def iterate_leaves(node: Any, path: Path = (), empty: bool = False) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of all that is not a container, in order.

    empty: whether empty containers are leaves. In the place of a parameter, one is what is left of
    optax.MaskedNode in a state that was restored as plain dicts.
    """
    children = list_children(node)
    if children is None or (empty and not children):
        yield path, node
        return
    for key, child in children.items():
        yield from iterate_leaves(child, (*path, key), empty)


def list_children(node: Any) -> dict[Any, Any] | None:
    """The children of a container of a parameter tree by key or place; None for a leaf."""
    if isinstance(node, Mapping):
        return open_mapping(node)
    if type(node) in (list, tuple):
        return dict(enumerate(node))
    return None


def open_mapping(node: Mapping[Any, Any]) -> dict[Any, Any]:
    """The children of a mapping by key.

    nnx.State holds dicts and shows them as states; its `raw_mapping` has them as they are.
    """
    return dict(getattr(node, "raw_mapping", node))


def assemble(node: Any, leaves: Sequence[Leaf], depth: int = 0) -> Any:
    """A tree of other leaves, in containers like those of `node`.

    Each leaf goes to its path. What is around it is made like what is around its origin in `node`;
    empty containers stay.
    """
    children = list_children(node)
    if not children:
        return leaves[0].value
    groups: dict[Any, list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.path[depth], []).append(leaf)
    filled = {key: child for key, child in children.items() if list_children(child) == {}}
    for key, group in groups.items():
        filled[key] = assemble(children[group[0].origin[depth]], group, depth + 1)
    return fill_container(node, filled)


def fill_container(node: Any, children: Mapping[Any, Any]) -> Any:
    """A container of the type of `node` that holds `children`."""
    if isinstance(node, Mapping):
        make: Any = type(node)
        return make(dict(children))
    return type(node)(children[place] for place in sorted(children))


def join(path: Path) -> str:
    """A path as one word: 'layers.0.mlp.kernel'."""
    return ".".join(str(key) for key in path)


def _compile(row: Row) -> re.Pattern[str]:
    """What the keys of one unit look like, joined by slashes: a key may itself hold a dot."""
    literals = STACKED.split(row.inner_name.replace(".", "/"))
    return re.compile(UNIT.join(re.escape(literal) for literal in literals))


def _make_key(word: str, key: Any) -> Any:
    """A word of a name as a key of the kind that `key` is."""
    if str(key) == word:
        return key
    return int(word) if isinstance(key, int) else word


def _check_units(
    row: Row, leaves: Sequence[Leaf], wanted: Sequence[Position], sizes: Mapping[str, int]
) -> None:
    """Raise GrowkitError unless one leaf holds all units of the row, or each unit has one."""
    found = [leaf.position for leaf in leaves]
    if found == [None]:
        return
    if None in found:
        raise GrowkitError(f"the tree holds {row.name} twice: stacked and unit by unit")
    if not found and not wanted:
        return
    if not found:
        raise GrowkitError(f"the tree lacks the parameter {join(row.path)!r}, which {row.name} is")
    stated = ", ".join(f"{axis.name} = {sizes[axis.name]}" for axis in row.stacked)
    for leaf in leaves:
        if leaf.position not in wanted:
            raise GrowkitError(
                f"the tree holds {leaf.name!r}, but the plan is for a model with {stated}, counted "
                f"from 0"
            )
    for position in wanted:
        if position not in found:
            name = join(path_at(row, position, leaves[0].path))
            raise GrowkitError(
                f"the tree lacks the parameter {name!r}; the plan is for a model with {stated}"
            )
