"""What each expert of a mixture is worth, by the checkpoint's own second moments.

The empirical Fisher information of a weight is the mean square of its gradient, which Adam's nu
follows. So the sum of w^2 nu over an expert's weights is about how much the loss would feel if the
expert were gone (optimal brain damage; LeCun et al., 1989).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from growkit.checkpoint.tensor import BLOCK, Source, Tensor
from growkit.errors import UsageError
from growkit.models.notation import Position, Row


def score_experts(source: Source) -> np.ndarray:
    """float64 [layer, expert]: the sum of w^2 nu over each expert's weights, a block in memory.

    Layers without experts have zeros. Raises UsageError for a source without second moments, and
    for a table whose experts lie otherwise than one after another.
    """
    model = source.model
    if "expert" not in model.sizes:
        raise UsageError(f"a {model.family.title} model has no experts; --choose is for mixtures")
    if "nu" not in source.tensors:
        raise UsageError(
            f"--choose fisher reads Adam's second moments, and {source.path} has none; --choose "
            f"use measures on a text"
        )
    scores = np.zeros((model.layer, model.sizes["expert"]))
    for name, row, position in model.table.names(model.sizes):
        weight, nu = (source.tensors[slot][name] for slot in ("params", "nu"))
        for expert, first, last in _find_experts(row, position, weight):
            scores[position[0], expert] += _sum_products(weight, nu, first, last)
    return scores


def _find_experts(row: Row, position: Position, tensor: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, last row) of each expert's part of a tensor; none of routers."""
    if len(position) > 1 and row.stacked[1].name == "expert":
        yield position[1], 0, tensor.row_count
        return
    routes = any(part.routes for part in row.parts)
    if not position or routes or "expert" not in row.axes or row.role == "bias":
        return
    if tuple(axis.name for axis in row.blocks[0][0]) != ("expert",):
        raise UsageError(f"--choose fisher takes experts one after another, and {row.name} mixes")
    for expert in range(tensor.shape[0]):
        yield expert, expert, expert + 1


def _sum_products(weight: Tensor, nu: Tensor, first: int, last: int) -> float:
    """The sum of w^2 nu over some rows, in float64."""
    total = 0.0
    step = max(1, BLOCK * weight.row_count // max(1, weight.size))
    for start in range(first, last, step):
        stop = min(start + step, last)
        rows = weight.rows(start, stop).astype(np.float64)
        total += float((rows**2 * nu.rows(start, stop).astype(np.float64)).sum())
    return total
