"""Rows of a new mixture's router: random ones, the same for all parts of one copy of the mlp.

Parts that belong together then have equal scores, and a gate that chooses as many experts as whole
copies have parts chooses all parts of a copy, or none ("virtual groups", arXiv 2410.07524).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from growkit.growth.noise import uniform
from growkit.models.notation import Part

if TYPE_CHECKING:
    from growkit.growth.plan import Plan


def draws_rows(part: Part, plan: Plan) -> bool:
    """Whether a part is the router of a new mixture whose rows are drawn."""
    return part.routes and plan.upcycling is not None and plan.upcycling.router == "random"


def draw_rows(array: Any, name: str, plan: Plan, units: np.ndarray | None, xp: Any = np) -> Any:
    """Random rows in the shape and dtype of `array`: [unit, embed], or [1, expert, embed].

    name: the router's. units: which experts the rows are of, None for all of them. The standard
    deviation is the model's initializer_range.
    """
    assert plan.upcycling is not None
    drawn = (plan.upcycling.copies, array.shape[-1])
    spread = plan.model.initializer_range
    rows = uniform(plan.seed, f"{name} router", drawn, xp, spread)
    experts = np.arange(plan.grown.sizes["expert"]) if units is None else units
    # Copies of the mlp's parts are tiles: a copy's parts are neighbours.
    chosen = rows.take(experts // plan.upcycling.granularity, axis=0)
    return chosen.astype(array.dtype).reshape(array.shape)
