"""What becomes of a gate's choice where a mixture gets more experts; a lineage records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from growkit import forms
from growkit.growth.upcycling import Upcycling


@dataclass(frozen=True)
class Choice:
    """A gate before and after.

    top: how many experts a token goes through, before and after. exact: whether the gate chooses
    all copies of what it chose, with weights of the same sum. alike: else with how many experts a
    token the source would be the same function, 0 for none. fields: the configuration's fields that
    change beside sizes. upcycling: how a dense model became the mixture, where it was one.
    """

    top: tuple[int, int]
    exact: bool
    alike: int
    fields: Mapping[str, Any]
    upcycling: Upcycling | None = None

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
        )

    def to_json(self) -> dict[str, Any]:
        before, after = self.top
        return {
            "top": {"before": before, "after": after},
            "exact": self.exact,
            "alike": self.alike,
            "fields": dict(self.fields),
            **({"upcycling": self.upcycling.to_json()} if self.upcycling else {}),
        }

    def describe_gap(self) -> str:
        """Why the function is another one, in words."""
        if self.upcycling:
            return self.upcycling.describe_gap()
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
