"""What becomes of a gate's choice where a mixture gets more experts; a lineage records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit import forms
from growkit.growth.axes import AxisMap
from growkit.growth.upcycling import Upcycling


@dataclass(frozen=True)
class Choice:
    """A gate before and after.

    top: how many experts a token goes through, before and after. exact: whether the gate chooses
    all copies of what it chose, with weights of the same sum. alike: else with how many experts a
    token the source would be the same function, 0 for none. fields: the configuration's fields that
    change beside sizes. upcycling: how a dense model became the mixture, where it was one.
    by_layer: for each layer of the source which old expert each new one copies, where some have
    more copies than others; empty where all have as many.
    """

    top: tuple[int, int]
    exact: bool
    alike: int
    fields: Mapping[str, Any]
    upcycling: Upcycling | None = None
    by_layer: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Choice:
        """A choice from its JSON object. Raises KeyError and ValueError for what is none."""
        top = forms.take_object(stored, "top")
        return cls(
            (forms.take_whole(top, "before"), forms.take_whole(top, "after")),
            forms.take_flag(stored, "exact"),
            forms.take_whole(stored, "alike"),
            dict(forms.take_object(stored, "fields")),
            Upcycling.read(stored["upcycling"]) if "upcycling" in stored else None,
            _read_layers(stored["by_layer"]) if "by_layer" in stored else (),
        )

    def to_json(self) -> dict[str, Any]:
        before, after = self.top
        return {
            "top": {"before": before, "after": after},
            "exact": self.exact,
            "alike": self.alike,
            "fields": dict(self.fields),
            **({"upcycling": self.upcycling.to_json()} if self.upcycling else {}),
            **({"by_layer": [list(each) for each in self.by_layer]} if self.by_layer else {}),
        }

    def describe_gap(self) -> str:
        """Why the function is another one, in words."""
        if self.upcycling:
            return self.upcycling.describe_gap()
        if self.by_layer:
            return (
                "not preserved: some experts have more copies than others, which are chosen "
                "together and push others out, so the loss rises until training recovers it"
            )
        before, after = self.top
        if self.alike:
            noun = "expert" if self.alike == 1 else "experts"
            return (
                f"not preserved: copies of an expert are chosen together, so with {after} of them "
                f"a token it is the source with {self.alike} {noun} a token instead of {before}"
            )
        return (
            f"not preserved: {after} experts a token do not hold every copy of the {before} that "
            f"the source chooses, so the loss rises until training recovers it"
        )

    def find_map(self, layer: int, experts: int) -> AxisMap:
        """The map of the experts of one layer of the source, of so many experts."""
        index = np.asarray(self.by_layer[layer], np.int64)
        return AxisMap(index, 1.0 / np.bincount(index, minlength=experts)[index], experts)

    def check(self, layers: int, experts: AxisMap) -> None:
        """Raise ValueError unless there are as many experts in each layer as the map has."""
        if not self.by_layer:
            return
        lengths = {len(index) for index in self.by_layer}
        largest = max(max(index, default=0) for index in self.by_layer)
        if len(self.by_layer) != layers or lengths != {len(experts)} or largest >= experts.source:
            raise ValueError("by_layer does not list the experts of every layer")


def _read_layers(stored: Any) -> tuple[tuple[int, ...], ...]:
    """A list of lists of whole numbers. Raises ValueError for anything else."""
    if not isinstance(stored, list):
        raise ValueError("by_layer must be a list")
    return tuple(tuple(forms.take_wholes({"by_layer": each}, "by_layer")) for each in stored)


def share_out(scores: np.ndarray, size: int) -> list[int]:
    """Which old expert each of `size` new ones copies: all once, then those with most per copy.

    scores: float [expert], what each is worth, 0 or more. Each further copy goes to the expert
    whose score divided by its copies is the largest (D'Hondt's method), so that copies are worth as
    nearly as much as each other. The old experts come first.

    >>> share_out(np.array([1.0, 5.0, 2.0]), 6)
    [0, 1, 2, 1, 1, 2]
    """
    # Where all are worth nothing, all are worth the same.
    worth = scores + (scores.mean() or 1.0) * 1e-9
    copies = np.ones(len(scores), np.int64)
    for _ in range(size - len(scores)):
        copies[int(np.argmax(worth / copies))] += 1
    return [*range(len(scores)), *np.repeat(np.arange(len(scores)), copies - 1).tolist()]
