"""The least memory that a program needs, read from the program before a compiler has seen it.

A loop over layers that keeps something of each layer for the backward pass keeps all of it until
the loop has ended. No compiler can do with less, and the sizes stand in the traced program, which
takes seconds where compiling takes minutes.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import jaxprs_in_params


def count_kept_bytes(jaxpr: Any) -> int:
    """Bytes that the program holds at once, at least: the most that any of its loops collects.

    Of all devices together.
    """
    most = 0
    used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    used |= {id(variable) for variable in jaxpr.outvars}
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            most = max(most, count_kept_bytes(inner))
            if equation.primitive.name == "scan":
                pairs = zip(equation.outvars, inner.outvars, strict=True)
                collected = [outer for outer, each in pairs if _is_collected(outer, each)]
                kept = [variable for variable in collected if id(variable) in used]
                most = max(most, sum(_count_bytes(variable.aval) for variable in kept))
    return most


def _is_collected(outer: Any, each: Any) -> bool:
    """Whether a loop's result has one value for each turn, and is not what the last turn left."""
    return len(outer.aval.shape) > len(each.aval.shape)


def _count_bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
