"""The notation of the axis table: one line a parameter, parsed into axes, what is read, and how to begin.

A line is `name  axes  initialisation  [condition]`:

    gpt_neox.layers.{/layer}.attention.dense.weight    embed (/head /head_dim)    normal

Parentheses hold axes fused in one stored dimension. A slash marks an axis that the parameter *reads*,
that is, sums over; every other axis it *writes*. `{layer}` in the name is the axis the trainer stacks;
`{/layer}` says that the parameter writes into the residual stream, which is a sum over layers.
`normal`, `ones`, `zeros` say how the parameter begins; a condition (`tied`, `untied`) says for which
models the line holds.

Knows the notation and how names and lines meet. Leaves growth, files and models to others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from growkit.errors import GrowkitError, find_nearest

INITIALISATIONS = ("normal", "ones", "zeros")
CONDITIONS = ("tied", "untied")


@dataclass(frozen=True)
class Axis:
    """One logical axis of a parameter, and whether the parameter sums over it."""

    name: str
    read: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table: a parameter (or one parameter a layer) and its axes."""

    name: str
    dimensions: tuple[tuple[Axis, ...], ...]
    initialisation: str
    condition: str | None = None
    stacked: Axis | None = None

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of one layer's parameter in order, unfused; the stacked axis is not among them."""
        return tuple(axis for dimension in self.dimensions for axis in dimension)

    @cached_property
    def path(self) -> tuple[str, ...]:
        """Where the parameter lies in the trainer's tree: ('layers', 'attention', 'dense', 'weight')."""
        parts = re.sub(r"\.\{\w+\}", "", self.name).split(".")
        return tuple(parts[1:] if len(parts) > 2 else parts)

    @property
    def part(self) -> str | None:
        """Whether the row makes queries, keys or values alone, by its name; None for any other row."""
        parts = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
        return next((part for name, part in parts.items() if f".{name}." in self.name), None)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(
            r"(0|[1-9][0-9]{0,8})".join(re.escape(part) for part in re.split(r"\{\w+\}", self.name))
        )

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The stored shape of one layer's parameter, fused dimensions multiplied out."""
        return tuple(math.prod(sizes[a.name] for a in dimension) for dimension in self.dimensions)

    def stacked_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in the trainer's tree, layers stacked first."""
        return ((sizes[self.stacked.name],) if self.stacked else ()) + self.shape(sizes)

    def unfused(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with one dimension an axis."""
        return tuple(sizes[axis.name] for axis in self.axes)

    def named(self, layer: int | None = None) -> str:
        """The name in files, of layer `layer` where the row is stacked."""
        return self.name if self.stacked is None else re.sub(r"\{\w+\}", str(layer), self.name)

    def match(self, name: str) -> int | None:
        """The layer that `name` belongs to (0 for a row without layers), or None when it is not this row's."""
        found = self._pattern.fullmatch(name)
        if found is None:
            return None
        return int(found[1]) if self.stacked else 0


@dataclass(frozen=True)
class Table:
    """All parameters of an architecture, for one condition (tied or untied head)."""

    rows: tuple[Row, ...]

    def match(self, name: str) -> tuple[Row, int]:
        """The row and layer of a parameter's name in files.

        Raises GrowkitError, naming the nearest row, when no row covers the name.
        """
        for row in self.rows:
            layer = row.match(name)
            if layer is not None:
                return row, layer
        best = find_nearest(name, [row.named(0) for row in self.rows], likeness=0.4)
        hint = f"; the nearest row is {self.match(best)[0].name}" if best else ""
        raise GrowkitError(f"no row of the axis table covers the parameter {name!r}{hint}")

    def tree(self, make: Callable[[Row], Any]) -> dict[str, Any]:
        """What `make` makes of every row, as the trainer's tree of parameters lies: nested by path."""
        tree: dict[str, Any] = {}
        for row in self.rows:
            node = tree
            for key in row.path[:-1]:
                node = node.setdefault(key, {})
            node[row.path[-1]] = make(row)
        return tree

    def names(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, Row, int | None]]:
        """Every (name, row, layer) a model of these sizes has, layer by layer as files have them."""
        for row in self.rows:
            if row.stacked is None:
                yield row.named(), row, None
        for layer in range(sizes["layer"]):
            for row in self.rows:
                if row.stacked is not None:
                    yield row.named(layer), row, layer

    def cover(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        sizes: Mapping[str, int],
        fields: Mapping[str, str],
    ) -> None:
        """Check that `shapes` holds exactly the parameters the sizes ask for, each of the right shape.

        `fields` names the configuration field of each axis, for the sentences. Raises GrowkitError.
        """
        wanted = {name: row for name, row, _ in self.names(sizes)}
        for name in shapes:
            if name not in wanted:
                self._refuse_extra(name, sizes, fields)
        for name, row in wanted.items():
            if name not in shapes:
                stated = f" ({fields['layer']} = {sizes['layer']})" if row.stacked else ""
                raise GrowkitError(
                    f"the parameter {name!r} is missing, which the configuration asks for{stated}"
                )
            if tuple(shapes[name]) != row.shape(sizes):
                raise GrowkitError(_contradiction(name, tuple(shapes[name]), row, sizes, fields))

    def _refuse_extra(self, name: str, sizes: Mapping[str, int], fields: Mapping[str, str]) -> None:
        row, layer = self.match(name)
        raise GrowkitError(
            f"the parameter {name!r} belongs to layer {layer}, but the configuration says "
            f"{fields['layer']} = {sizes['layer']}, whose last layer is {sizes['layer'] - 1}"
        )


def _contradiction(
    name: str, shape: tuple[int, ...], row: Row, sizes: Mapping[str, int], fields: Mapping[str, str]
) -> str:
    axes = [axis.name for axis in row.axes if axis.name in fields]
    stated = ", ".join(f"{fields[axis]} = {sizes[axis]}" for axis in dict.fromkeys(axes))
    return (
        f"the configuration contradicts the parameter {name!r}: it has shape {list(shape)}, "
        f"but {stated} asks for {list(row.shape(sizes))}"
    )


def parse_table(text: str) -> tuple[Row, ...]:
    """Parse the lines of a table; blank lines and lines that start with # are passed over.

    Raises ValueError that quotes the line.
    """
    lines = (line.strip() for line in text.splitlines())
    return tuple(_parse_row(line) for line in lines if line and not line.startswith("#"))


def _parse_row(line: str) -> Row:
    name, *words = re.findall(r"\([^)]*\)|\S+", line)
    condition = words.pop() if words and words[-1] in CONDITIONS else None
    initialisation = words.pop() if words else ""
    if initialisation not in INITIALISATIONS or not words:
        raise ValueError(
            f"a table line is `name axes {'|'.join(INITIALISATIONS)} [condition]`, got {line!r}"
        )
    stacked = re.search(r"\{(/?)(\w+)\}", name)
    return Row(
        name=name.replace("{/", "{"),
        dimensions=tuple(_parse_axes(word.strip("()").split()) for word in words),
        initialisation=initialisation,
        condition=condition,
        stacked=Axis(stacked[2], bool(stacked[1])) if stacked else None,
    )


def _parse_axes(words: Iterable[str]) -> tuple[Axis, ...]:
    return tuple(Axis(word.lstrip("/"), word.startswith("/")) for word in words)
