"""The map of one axis as a lineage records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from growkit import forms
from growkit.growth.axes import AxisMap


@dataclass(frozen=True)
class Copies:
    """The map of one axis: which old unit each new one copies, and which share of it it carries."""

    index: list[int]
    share: list[float]

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Copies:
        """A map from its JSON object."""
        return cls(forms.take_wholes(stored, "index"), forms.take_numbers(stored, "share"))

    def axis_map(self, size: int) -> AxisMap:
        """The map as growth uses it, for an axis of `size` old units.

        Raises ValueError where it does not fit.
        """
        index = np.asarray(self.index, np.int64)
        return AxisMap(index, np.asarray(self.share, np.float64), size)
