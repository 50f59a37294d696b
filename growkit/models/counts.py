"""How many numbers a model holds, how many of them a token passes, and the FLOPs of training it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from growkit.models.notation import Axis, Row

if TYPE_CHECKING:
    from growkit.models.architecture import Architecture

EXPERT = Axis("expert")


def count_numbers(model: Architecture, rows: Sequence[Row]) -> int:
    """How many numbers the parameters of some rows hold, in the layers that have them."""
    return sum(
        math.prod(row.shape(model.sizes))
        for row in rows
        for position in row.positions(model.sizes)
        if not position or model.table.has(row, position[0])
    )


def count_active(model: Architecture, rows: Sequence[Row]) -> int:
    """How many numbers of some rows a token passes: of the experts those that its gate chooses."""
    total = count_numbers(model, rows)
    gate = model.gate
    if gate is None:
        return total
    experts = count_numbers(model, [row for row in rows if EXPERT in row.stacked])
    return total - experts + experts * gate.top // model.sizes["expert"]


def count_flops(model: Architecture, context: int) -> float:
    """Training FLOPs a token: 6 for each weight that it passes, and attention's products.

    Attention takes 12 x layer x heads x head_dim x context. PaLM (arXiv 2204.02311), appendix B.
    The embedding look-up multiplies nothing; the head does.
    """
    weights = count_active(model, [row for row in model.table.rows if row.multiplies])
    head = model.vocab * model.embed if model.tied else 0
    attention = model.layer * model.head_count * model.head_dim * context
    return 6.0 * (weights + head) + 12.0 * attention


def describe_mlp(model: Architecture) -> str:
    """The units of each mlp, in words: '64', '8 experts of 64, 2 per token'."""
    gate = model.gate
    if gate is None:
        return str(model.mlp)
    row = next(row for row in model.table.rows if EXPERT in row.stacked)
    (width,) = row.axes - {"embed"}
    return f"{model.sizes['expert']} experts of {model.sizes[width]}, {gate.top} per token"


def describe_sizes(model: Architecture) -> str:
    """A model's sizes and numbers of parameters, in words."""
    active = model.active_parameters
    part = f" ({active:,} per token)" if active < model.parameters else ""
    return (
        f"{model.layer} layers, embed {model.embed}, {model.head_count} heads, "
        f"mlp {describe_mlp(model)}, {model.parameters:,} parameters{part}"
    )
