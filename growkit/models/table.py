"""The table of a model: all its rows, the names they give, and what a set of shapes must be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

from growkit.errors import GrowkitError, find_nearest
from growkit.models.notation import Position, Row


@dataclass(frozen=True)
class Table:
    """All parameters of a model, for its options.

    layers: the layers of each kind of layers. uniform: axes that are copied evenly for other
    reasons than norms.
    """

    rows: tuple[Row, ...]
    layers: Mapping[str, Collection[int]] = field(default_factory=dict)
    uniform: tuple[str, ...] = ()

    @cached_property
    def uniform_axes(self) -> frozenset[str]:
        """The axes whose copies must be uniform to be exact: norms average over most of them."""
        averaged = frozenset(name for row in self.rows for name in row.averages)
        return averaged.union(self.uniform)

    @cached_property
    def normalises_queries(self) -> bool:
        """Whether queries and keys have norms of their own, over axes that they write."""
        return any(self._is_of_queries(row) for row in self.rows)

    @cached_property
    def other_norms(self) -> tuple[Row, ...]:
        """The norms that average neither over embed nor over axes of queries and keys."""
        return tuple(
            row
            for row in self.rows
            if row.role == "norm" and "embed" not in row.averages and not self._is_of_queries(row)
        )

    def _is_of_queries(self, row: Row) -> bool:
        """Whether a row is a norm of queries or keys."""
        # A norm of queries or keys averages over axes that these write, as head_dim in Qwen3;
        # another norm off the stream (of the mlp's units, say) would see other statistics after
        # padding.
        written = {
            axis.name
            for other in self.rows
            for part in other.parts
            if part.role in ("query", "key", "qkv")
            for axis in part.axes
            if not axis.read
        }
        return row.role == "norm" and "embed" not in row.averages and set(row.averages) <= written

    def match(self, name: str) -> tuple[Row, Position]:
        """The row and unit of a parameter's name in files.

        Raises GrowkitError, naming the nearest row, when no row covers the name.
        """
        for row in self.rows:
            position = row.match(name)
            if position is not None:
                return row, position
        raise GrowkitError(
            f"no row of the axis table covers the parameter {name!r}{self._hint(name)}"
        )

    def _hint(self, name: str) -> str:
        """A clause that names the row whose names are nearest, if one is near."""
        # Names of the first layer: a likeness to them is a likeness to any other layer's.
        examples = {row.name_at((0,) * len(row.stacked)): row for row in self.rows}
        best = find_nearest(name, examples, likeness=0.4)
        return f"; the nearest row is {examples[best].name}" if best else ""

    def tree(
        self, make: Callable[[Row], Any], holds: Callable[[Row], bool] | None = None
    ) -> dict[str, Any]:
        """What `make` makes of every row, nested as a parameter tree is.

        holds: which rows are in the tree; None for all.
        """
        tree: dict[str, Any] = {}
        for row in self.rows:
            if holds is not None and not holds(row):
                continue
            node = tree
            for key in row.path[:-1]:
                node = node.setdefault(key, {})
            node[row.path[-1]] = make(row)
        return tree

    def names(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, Row, Position]]:
        """Every (name, row, position) of a model, layer by layer as files have them."""
        for row in self.rows:
            if not row.stacked:
                yield row.name, row, ()
        stacked = [row for row in self.rows if row.stacked]
        for unit in range(max((sizes[row.stacked[0].name] for row in stacked), default=0)):
            for row in stacked:
                inner = product(*(range(sizes[axis.name]) for axis in row.stacked[1:]))
                # Experts lie within their layer, as files have them.
                if unit < sizes[row.stacked[0].name] and self.has(row, unit):
                    for rest in inner:
                        yield row.name_at((unit, *rest)), row, (unit, *rest)

    def has(self, row: Row, unit: int) -> bool:
        """Whether a layer has the row's parameter: all have it unless the row is of a kind."""
        return not row.kind or unit in self._units.get(row.kind, ())

    @cached_property
    def _units(self) -> dict[str, frozenset[int]]:
        """The layers of each kind, as sets: they are asked for once for every parameter."""
        return {kind: frozenset(layers) for kind, layers in self.layers.items()}

    def check_covered(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        sizes: Mapping[str, int],
        fields: Mapping[str, str],
    ) -> None:
        """Check that `shapes` holds exactly the parameters of these sizes, each of the right shape.

        fields: the configuration field of each axis, for the messages. Raises GrowkitError.
        """
        wanted = self._list_wanted(sizes)
        extra = [name for name in shapes if name not in wanted]
        if extra:
            self._refuse_extra(extra, len(shapes), sizes, fields)
        for name, row in wanted.items():
            if name not in shapes:
                raise GrowkitError(
                    f"the parameter {name!r} is missing, which the configuration asks for"
                    f"{_state_stacked(row, sizes, fields)}"
                )
            if tuple(shapes[name]) != row.shape(sizes):
                raise GrowkitError(
                    _describe_contradiction(name, tuple(shapes[name]), row, sizes, fields)
                )

    def _list_wanted(self, sizes: Mapping[str, int]) -> dict[str, Row]:
        """The row of every name of a model. Raises GrowkitError where two rows give one name."""
        wanted: dict[str, Row] = {}
        for name, row, _ in self.names(sizes):
            if name in wanted:
                raise GrowkitError(
                    f"two rows of the table match the parameter {name!r}: {wanted[name].name} and "
                    f"{row.name}; leave one out, or give them conditions that exclude each other"
                )
            wanted[name] = row
        return wanted

    def _refuse_extra(
        self, names: Sequence[str], count: int, sizes: Mapping[str, int], fields: Mapping[str, str]
    ) -> None:
        """Raise GrowkitError for names that no parameter of these sizes has; count: of all."""
        unknown = [
            name for name in names if not any(row.match(name) is not None for row in self.rows)
        ]
        if len(unknown) > 1:
            raise GrowkitError(
                f"the table covers only a part: {len(unknown)} of {count} tensors have no row, the "
                f"first is {unknown[0]!r}{self._hint(unknown[0])}"
            )
        name = names[0]
        row, position = self.match(name)
        for axis, unit in zip(row.stacked, position, strict=True):
            size = sizes[axis.name]
            if unit >= size:
                raise GrowkitError(
                    f"the parameter {name!r} belongs to {axis.name} {unit}, but the configuration "
                    f"says {fields[axis.name]} = {size}, whose last {axis.name} is {size - 1}"
                )
        raise GrowkitError(f"the parameter {name!r} is not of its layer's kind")


def settle_kinds(
    rows: Sequence[Row], layers: Mapping[str, Collection[int]], count: int
) -> tuple[Row, ...]:
    """The rows of a model of `count` layers: those of a kind that all layers are of have no kind,
    and those of a kind that none is of are left out.
    """
    settled = []
    for row in rows:
        of_kind = layers[row.kind] if row.kind else range(count)
        if of_kind:
            settled.append(replace(row, kind="") if len(of_kind) == count else row)
    return tuple(settled)


def _state_stacked(row: Row, sizes: Mapping[str, int], fields: Mapping[str, str]) -> str:
    """' (num_hidden_layers = 3)' for a row that is stacked by layer, else nothing."""
    stated = [f"{fields[axis.name]} = {sizes[axis.name]}" for axis in row.stacked]
    return f" ({', '.join(stated)})" if stated else ""


def _describe_contradiction(
    name: str,
    shape: tuple[int, ...],
    row: Row,
    sizes: Mapping[str, int],
    fields: Mapping[str, str],
) -> str:
    axes = [axis for part in row.parts for axis in part.names if axis in fields]
    stated = ", ".join(f"{fields[axis]} = {sizes[axis]}" for axis in dict.fromkeys(axes))
    return (
        f"the configuration contradicts the parameter {name!r}: it has shape {list(shape)}, "
        f"but {stated} asks for {list(row.shape(sizes))}"
    )
