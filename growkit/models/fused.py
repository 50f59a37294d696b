"""Parameters that transformers holds as one in memory and files hold one for each expert.

`mlp.experts.gate_up_proj` is [expert, gate's units and up's, embed]: expert after expert, of each
its blocks one after the other. A table's aliases say which rows are blocks of which parameter. An
optimizer numbers the parameters of memory, so its moments are of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from growkit.models.architecture import Architecture
from growkit.models.notation import Axis, Position, Row


@dataclass(frozen=True)
class Fused:
    """A parameter of memory. row: its own, stacked by layer alone. parts: the rows of files."""

    row: Row
    parts: tuple[Row, ...]

    def list_names(self, position: Position, experts: int) -> Iterator[str]:
        """The names in files of all that it holds in one layer, in the order of memory."""
        for expert in range(experts):
            for part in self.parts:
                yield part.name_at((*position, expert))


def find_fused(model: Architecture) -> dict[str, Fused]:
    """The fused parameters of a model: name of the row -> what it is."""
    return {each.row.name: each for each in _fuse(model.table.rows, _read_blocks(model))}


def _read_blocks(model: Architecture) -> tuple[tuple[str, str, int], ...]:
    """(row, name in memory, number of the block) of each row that is a block."""
    found = []
    for row, alias in model.family.aliases.items():
        name, _, block = alias.partition(" ")
        if block:
            found.append((row, name, int(block.split("/")[0])))
    return tuple(found)


@lru_cache
def _fuse(rows: tuple[Row, ...], blocks: tuple[tuple[str, str, int], ...]) -> tuple[Fused, ...]:
    known = {row.name: row for row in rows if len(row.stacked) > 1}
    parts: dict[str, dict[int, Row]] = {}
    for row, name, number in blocks:
        if row in known:
            parts.setdefault(name, {})[number] = known[row]
    return tuple(
        _join(name, tuple(each[number] for number in sorted(each))) for name, each in parts.items()
    )


def _join(name: str, parts: tuple[Row, ...]) -> Fused:
    """The row of a parameter: experts, then the blocks' first dimensions as a sum."""
    first = parts[0]
    expert = first.stacked[-1].name
    summed = tuple(term for part in parts for term in part.blocks[0])
    blocks = (((Axis(expert),),), summed, *first.blocks[1:])
    # A matrix of one expert: what is in the name after its number is gone.
    return Fused(replace(first, name=name, blocks=blocks, stacked=first.stacked[:-1]), parts)


def list_parameters(model: Architecture) -> dict[str, Row]:
    """Name -> row of every parameter of memory: the table's, fused where memory has them so."""
    fused = find_fused(model)
    inner = {part.name for each in fused.values() for part in each.parts}
    found = {name: row for name, row, _ in model.table.names(model.sizes) if row.name not in inner}
    for each in fused.values():
        for (layer,) in each.row.positions(model.sizes):
            if model.table.has(each.row, layer):
                found[each.row.name_at((layer,))] = each.row
    return found


def match_fused(name: str, fused: Mapping[str, Fused]) -> tuple[Fused, Position] | None:
    """The fused parameter of a name, and its layer; None for another name."""
    for each in fused.values():
        position = each.row.match(name)
        if position is not None:
            return each, position
    return None
