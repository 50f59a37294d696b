"""Search for the map of layers whose model has the lowest loss before any training.

The known maps come first; then maps one step away from the best so far, drawn at random, until the
budget is spent. A map is tried only if growth on disk would take it: layers keep their kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from growkit.checkpoint.tensor import Source, read_model
from growkit.errors import GrowkitError, UsageError
from growkit.growth.depth import MOST_LAYERS, plan_depth
from growkit.surgery.grow import grow_config
from trainer.search.maps import Index, draw_step, list_known, write_map

# Steps drawn in a row that lead to maps already seen, before all neighbours count as tried.
MOST_IN_VAIN = 1000
# Maps that growth would refuse, before a search ends with what it has.
MOST_REFUSED = 1000

Score = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Scored:
    """A map, where it is from, and its loss in nats a token."""

    index: Index
    origin: str
    loss: float

    @property
    def text(self) -> str:
        """The map as `growkit depth --map` takes it."""
        return write_map(self.index)


@dataclass
class Found:
    """What a search found. own: the source's loss. scored: in the order in which they were tried.

    without: the loss without each layer of the source. left_out: maps that growth would refuse, by
    origin, each with the reason.
    """

    own: float
    scored: list[Scored] = field(default_factory=list)
    without: list[float] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def ranked(self) -> list[Scored]:
        """The maps by their loss, the lowest first; a loss that is not a number is the worst."""
        return sorted(self.scored, key=lambda each: (math.isnan(each.loss), each.loss))

    @property
    def best(self) -> Scored:
        """The map of the lowest loss."""
        return self.ranked[0]


def check_target(source: Source, target: int) -> None:
    """Raise UsageError for a number of layers that the source cannot grow to."""
    layers = source.model.layer
    if target <= layers:
        raise UsageError(
            f"--layers {target} is not above the source's {layers}, and growkit only adds layers; "
            f"the least is {layers + 1}"
        )
    if target > MOST_LAYERS:
        raise UsageError(f"--layers {target} is too many; growkit makes at most {MOST_LAYERS}")


def check_map(source: Source, index: Sequence[int]) -> None:
    """Raise UsageError for a map that growth on disk would refuse.

    So it does where config.json could not say that each copy is of its source's kind.
    """
    plan = plan_depth(source.model, write_map(index))
    grown = read_model(grow_config(source, plan), source.path, source.lineage)
    kinds = source.model.kinds
    if kinds and grown.kinds != tuple(kinds[layer] for layer in index):
        raise UsageError("layers must keep their kind, and under this map some would not")


def search_maps(
    source: Source,
    score: Score,
    target: int,
    candidates: int,
    seed: int = 0,
    tell: Callable[[Scored], None] = lambda scored: None,
) -> Found:
    """Try up to so many maps to `target` layers; see the top of this file.

    score: the loss of a map, as `Views.score`. tell: told each map when it is scored. Raises
    UsageError for a target that growth cannot reach, and where growth would refuse all known maps;
    GrowkitError where the source's own loss is no number.
    """
    check_target(source, target)
    layers = source.model.layer
    found = Found(score(range(layers)))
    if not math.isfinite(found.own):
        raise GrowkitError(
            f"the loss of {source.path} itself is {found.own} on this text, so its maps cannot be "
            "compared; are its parameters numbers?"
        )
    search = _Search(source, score, found, tell)
    for name, index in list_known(layers, target).items():
        if len(found.scored) < candidates:
            search.try_map(index, name)
    if not found.scored:
        raise UsageError(next(iter(found.left_out.values())))
    search.climb(candidates, np.random.default_rng(seed))
    if layers > 1:
        found.without = [score(_leave_out(layers, each)) for each in range(layers)]
    return found


class _Search:
    """The maps that were seen, and what was found of them."""

    def __init__(
        self, source: Source, score: Score, found: Found, tell: Callable[[Scored], None]
    ) -> None:
        self.source = source
        self.score = score
        self.found = found
        self.tell = tell
        self.seen: set[Index] = set()

    def try_map(self, index: Index, origin: str) -> None:
        """Score a map; where growth would refuse it, note why."""
        self.seen.add(index)
        try:
            check_map(self.source, index)
        except UsageError as problem:
            self.found.left_out.setdefault(origin, str(problem))
            return
        scored = Scored(index, origin, self.score(index))
        self.found.scored.append(scored)
        self.tell(scored)

    def climb(self, candidates: int, draw: np.random.Generator) -> None:
        """Try maps one step from the best, which changes as soon as there is a better one.

        Where all neighbours of the best were tried, those of the next best follow.
        """
        done: set[Index] = set()
        most_seen = candidates + MOST_REFUSED
        while len(self.found.scored) < candidates and len(self.seen) < most_seen:
            best = next((each for each in self.found.ranked if each.index not in done), None)
            if best is None:
                return
            index = self._draw_unseen(best.index, draw)
            if index is None:
                done.add(best.index)
            else:
                self.try_map(index, _name_step(best.origin))

    def _draw_unseen(self, index: Index, draw: np.random.Generator) -> Index | None:
        """A map one step away that was not seen before; None where there seems to be none."""
        for _ in range(MOST_IN_VAIN):
            drawn = draw_step(index, draw)
            if drawn not in self.seen:
                return drawn
        return None


def _name_step(origin: str) -> str:
    """'overlap' -> 'overlap, 1 step' -> 'overlap, 2 steps'."""
    name, _, steps = origin.partition(", ")
    count = int(steps.split()[0]) + 1 if steps else 1
    return f"{name}, {count} step{'s' if count > 1 else ''}"


def _leave_out(layers: int, left_out: int) -> list[int]:
    return [layer for layer in range(layers) if layer != left_out]
