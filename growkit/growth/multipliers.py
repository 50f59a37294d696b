"""What an optimizer must multiply so that an exactly widened model goes on as the small one would.

A copy that carries a share of its source's value must move by that share (learning rate: the
value's scale); its gradients are smaller by the shares it writes (Adam's eps: mu's scale); and a
global norm must count every source's gradient once (clip: 1 / (mu's scale squared x copies)). Width
by copies alone is exact, see `Plan.continues`. Which growths of a lineage ask for multipliers,
`growkit.lineage` says.

Where growth is not exact for the training (noise, padding), `--rates mup` takes learning rates by
the rule of muP instead (Yang et al., Tensor Programs V, arXiv 2203.03466, table 3, Adam): those of
matrices and of an untied head times fan-in before over fan-in after; those of embeddings, norms and
biases as they are. For even copies that is the share, so the two rules agree. See
docs/operators.md for what is approximate in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from growkit.growth.axes import AxisMap
from growkit.growth.padding import MU, VALUE
from growkit.growth.plan import MUP, NO_WIDTH, Plan
from growkit.growth.shares import narrow, place_along, share_scale
from growkit.models.architecture import Architecture
from growkit.models.notation import Part, Product, Row


def compose_maps(growths: Sequence[Plan]) -> dict[str, AxisMap]:
    """Every axis that the growths, one after the other, copied, as one map from its origin.

    New units of a padding are nobody's copies.
    """
    composed: dict[str, AxisMap] = {}
    for plan in growths:
        # Experts that were a dense mlp have some of its tokens each: no factor holds for them.
        if plan.upcycling:
            continue
        for axis in plan.model.sizes:
            if axis in plan.maps:
                later = plan.maps[axis]
                composed[axis] = composed[axis].then(later) if axis in composed else later
            elif axis in composed and axis in plan.pads:
                composed[axis] = composed[axis].extend(plan.pads[axis])
    # Copies of layers have no exact rule, so no multipliers either.
    composed.pop("layer", None)
    return composed


def compute_multipliers(model: Architecture, growths: Sequence[Plan]) -> dict[str, dict[str, Any]]:
    """{'learning_rate' | 'eps' | 'clip': a parameter tree of factors} for a model grown so.

    Each factor is a number, or where units differ an array that broadcasts to the parameter,
    stacked axes first.
    """
    maps = compose_maps(growths)
    origin = growths[0].model if growths else model
    mup = _is_mup(growths)
    found = {row: _factors(row, model, maps, origin, mup) for row in model.table.rows}

    def collect(name: str) -> dict[str, Any]:
        return model.table.tree(lambda row: found[row][name])

    return {name: collect(name) for name in ("learning_rate", "eps", "clip")}


def describe_multipliers(plan: Plan) -> dict[str, dict[str, float | str]]:
    """For a lineage: row -> its three factors, 'per element' where units differ.

    Rows with all factors 1 are left out.
    """
    maps = compose_maps([plan])
    rows = {}
    for row in plan.grown.table.rows:
        factors = _factors(row, plan.grown, maps, plan.model)
        if any(not isinstance(factor, float) or factor != 1.0 for factor in factors.values()):
            rows[row.name] = {
                name: factor if isinstance(factor, float) else "per element"
                for name, factor in factors.items()
            }
    return rows


def describe_rates(plan: Plan) -> dict[str, float | str]:
    """Row -> the factor on its learning rate with which training goes on after this growth.

    Rows with a factor of 1 are left out; 'per element' where units differ.
    """
    grown = plan.grown
    trees = {
        row.name: _factors(row, grown, compose_maps([plan]), plan.model, _is_mup([plan]))
        for row in grown.table.rows
    }
    rates = {name: factors["learning_rate"] for name, factors in trees.items()}
    return {
        name: rate if isinstance(rate, float) else "per element"
        for name, rate in rates.items()
        if not isinstance(rate, float) or rate != 1.0
    }


def _is_mup(growths: Sequence[Plan]) -> bool:
    """Whether matrices take muP's rates: where it is asked for and training is not exact.

    Only uneven copies would have other rates by muP where it is.
    """
    asked = any(plan.rates == MUP for plan in growths)
    return asked and not all(plan.continues for plan in growths)


def _mup_rate(row: Row, model: Architecture, origin: Architecture) -> float:
    """The factor on a matrix's learning rate by muP, for a model that grew from `origin`.

    Fan-in before over fan-in after. A factor of the model that follows a size is a multiplier of
    the parameter's: the rate takes its inverse.
    """
    # All terms of a sum read the same activations.
    read = [axis.name for axis in row.parts[0].axes if axis.read and axis.name not in NO_WIDTH]
    before, after = (
        math.prod(sizes[axis] for axis in read) for sizes in (origin.sizes, model.sizes)
    )
    return origin.scalar_growth(row, model) * before / after


def _factors(
    row: Row,
    model: Architecture,
    maps: Mapping[str, AxisMap],
    origin: Architecture,
    mup: bool = False,
) -> dict[str, float | np.ndarray]:
    """The three factors of a row, each a number or an array as `compute_multipliers` has it.

    mup: whether the learning rate of a matrix is muP's. What is no matrix and reads copies, a norm
    before a tied head, carries their share, which is the multiplier that muP has for the output.
    """
    ratio = origin.scalar_growth(row, model)
    rates, epsilons, clips = [], [], []
    for part in row.parts:
        axes = (*row.stacked, *part.axes)
        # A copy that holds `share` of a value must move by `share` of its source's step; Adam's
        # direction does not follow the gradient's size, so the learning rate carries the share.
        rate = share_scale(axes, maps, VALUE) * ratio
        if mup and row.multiplies:
            rate = np.full([1] * len(axes), _mup_rate(row, model, origin))
        eps = share_scale(axes, maps, MU) / ratio
        rates.append(_expand_to_part(rate, row, part, model))
        epsilons.append(_expand_to_part(eps, row, part, model))
        # The norm of all gradients shall be the small model's: every copy has eps times its
        # source's gradient, and there are so many copies of it.
        clips.append(_expand_to_part(1.0 / (eps**2 * _count_copies(axes, maps)), row, part, model))
    return {
        "learning_rate": _join_parts(rates, row, model),
        "eps": _join_parts(epsilons, row, model),
        "clip": _join_parts(clips, row, model),
    }


def _count_copies(axes: Product, maps: Mapping[str, AxisMap]) -> np.ndarray:
    """How many copies each element's source has."""
    copies = np.ones([1] * len(axes))
    for place, axis in enumerate(axes):
        if axis.name in maps:
            axis_map = maps[axis.name]
            count = narrow(axis_map.copies[axis_map.index])
            copies = copies * place_along(count, place, len(axes))
    return copies


def _expand_to_part(
    factor: np.ndarray, row: Row, part: Part, model: Architecture
) -> float | np.ndarray:
    """A factor as one number, or in the stored shape of a part, stacked axes first."""
    if (factor == factor.flat[0]).all():
        return float(factor.flat[0])
    stacked = factor.shape[: len(row.stacked)]
    whole = np.broadcast_to(factor, (*stacked, *part.unfused(model.sizes)))
    return whole.reshape(*stacked, *part.shape(model.sizes))


def _join_parts(
    factors: list[float | np.ndarray], row: Row, model: Architecture
) -> float | np.ndarray:
    """The factors of a row's parts as one number where they are the same, else as one array."""
    first = factors[0]
    if len(factors) == 1:
        return first
    if all(isinstance(factor, float) and factor == first for factor in factors):
        return first
    assert row.summed is not None
    units = [np.shape(factor)[: len(row.stacked)] for factor in factors]
    stacked = np.broadcast_shapes((1,) * len(row.stacked), *units)
    whole = [
        np.broadcast_to(factor, (*stacked, *part.shape(model.sizes)))
        for factor, part in zip(factors, row.parts, strict=True)
    ]
    return np.concatenate(whole, axis=len(stacked) + row.summed)
