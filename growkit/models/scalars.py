"""Factors that a model applies to a parameter and that follow a size: sqrt(embed), 1/embed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from growkit.errors import GrowkitError

# What a factor of the model follows: axis, sqrt(axis), 1/axis or 1/sqrt(axis).
POWER = re.compile(r"(1/)?(?:sqrt\((\w+)\)|(\w+))")


def compare_factors(
    text: str, row: str, before: Mapping[str, int], after: Mapping[str, int]
) -> float:
    """f(old) / f(new) of a factor at two sets of sizes. row: the parameter's, for the message."""
    found = POWER.fullmatch(text)
    if found is None:
        raise GrowkitError(
            f"the factor of {row} is axis, sqrt(axis), 1/axis or 1/sqrt(axis), got {text!r}"
        )
    axis = found[2] or found[3]
    # f(old) / f(new) for f(x) = x; a root of it for sqrt(x), the inverse for 1 / f.
    ratio = before[axis] / after[axis]
    if found[2]:
        ratio = math.sqrt(ratio)
    return 1.0 / ratio if found[1] else ratio
