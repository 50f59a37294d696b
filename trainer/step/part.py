"""The part of the parameters that a run trains: all of them, or some layers.

Layers are stacked, so that a part is some entries of the first dimension of every stacked
parameter. Only the part has gradients and moments; the rest stays as it is, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from growkit.models.notation import Position, Row
from growkit.models.table import Table


@dataclass(frozen=True)
class Part:
    """Some layers of a model. layers: their numbers, in order; None for all parameters."""

    layers: tuple[int, ...] | None = None

    def holds(self, row: Row) -> bool:
        """Whether the row has parameters in this part."""
        if self.layers is None:
            return True
        return bool(row.stacked) and row.stacked[0].name == "layer"

    def shape(self, row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a row's stacked parameter, layers first, within this part."""
        return shape if self.layers is None else (len(self.layers), *shape[1:])

    def find_unit(self, position: Position) -> Position:
        """The place in the model of a place in this part."""
        if self.layers is None or not position:
            return position
        return (self.layers[position[0]], *position[1:])

    def tree(self, table: Table, make: Callable[[Row], Any]) -> dict[str, Any]:
        """What `make` makes of every row of this part, nested as a parameter tree is."""
        return table.tree(make, self.holds)

    def select(self, table: Table, tree: Any) -> Any:
        """The part of a parameter tree."""
        if self.layers is None:
            return tree
        index = np.array(self.layers)
        return self.tree(table, lambda row: _find(tree, row)[index])

    def select_factors(self, table: Table, tree: Any) -> Any:
        """The part of a tree of numbers, or of arrays that broadcast to the parameters.

        A parameter may have a tuple of them.
        """
        if self.layers is None or tree is None:
            return tree
        index = np.array(self.layers)

        def take(factor: Any) -> Any:
            if isinstance(factor, tuple):
                return tuple(take(each) for each in factor)
            # One entry for all layers stays one.
            return factor[index] if np.ndim(factor) and len(factor) > 1 else factor

        return self.tree(table, lambda row: take(_find(tree, row)))

    def merge(self, table: Table, tree: Any, part: Any) -> Any:
        """The tree with this part of it replaced."""
        if self.layers is None:
            return part
        index = np.array(self.layers)

        def put(row: Row) -> jax.Array:
            whole = _find(tree, row)
            return whole.at[index].set(_find(part, row)) if self.holds(row) else whole

        return table.tree(put)


ALL = Part()


def _find(tree: Any, row: Row) -> Any:
    for key in row.path:
        tree = tree[key]
    return tree
