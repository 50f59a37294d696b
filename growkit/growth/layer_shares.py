"""Shares of one's own for layers: `--scale layer=0.5` damps copied layers.

A layer's share multiplies what it adds to the residual stream: in the files, the parameters that
write into it (o_proj and down_proj of a Llama). Users of mergekit write the same by hand when they
repeat layers. The function is the source's only where the shares are 0 and 1 as identity growth
has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from growkit.errors import UsageError, require_type
from growkit.growth.axes import AxisMap
from growkit.growth.plan import Plan, build_plan
from growkit.models.architecture import Architecture

FORM = "--scale takes layer=SHARE for copied layers, as layer=0.5, or one share for each new layer"
AXIS = "layer"
# A plan's words name the shares where there are no more than so many different ones.
MOST_NAMED = 3

Scale = str | float | Sequence[float]


def scale_layers(plan: Plan, scale: Scale) -> Plan:
    """The plan with shares of one's own for layers.

    scale: a share for all copies after the first of each source layer; or a list of one share for
    each new layer; or either as the text of --scale, as 'layer=0.5' or 'layer=1,0.5,1'. Shares are
    finite and at least 0. Raises UsageError for shares that do not fit the plan, TypeError for a
    scale of another type.
    """
    layers = plan.maps.get(AXIS)
    if layers is None:
        raise UsageError("--scale gives shares to copied layers, and this growth copies none")
    if (layers.share != 1.0).any():
        raise UsageError(
            "--method identity gives copies a share of 0, and --scale another; leave one of them "
            "out"
        )
    _check_family(plan.model)
    share = _find_shares(scale, layers)
    maps = plan.maps | {AXIS: AxisMap(layers.index, share, layers.source)}
    method = f"{plan.method}, {_name_shares(share)}"
    return replace(build_plan(plan.verb, method, plan.model, maps, plan.pads), notes=plan.notes)


def list_copies(layers: AxisMap) -> np.ndarray:
    """bool [new]: whether a new layer is a copy after the first of its source layer."""
    first = np.unique(layers.index, return_index=True)[1]
    copied = np.ones(len(layers), bool)
    copied[first] = False
    return copied


def has_own_shares(layers: AxisMap) -> bool:
    """Whether a layer carries a share other than 0 and 1."""
    return not bool(np.isin(layers.share, (0.0, 1.0)).all())


def _check_family(model: Architecture) -> None:
    """Raise UsageError for a family in which no parameters scale what a layer adds."""
    reason = model.family.no_identity
    if not reason and not any(row.writes_stream for row in model.table.rows):
        reason = "no row of its table writes into the sum over layers"
    if reason:
        raise UsageError(
            f"layers of a {model.family.title} model take no shares: {reason}; leave --scale out"
        )


def _find_shares(scale: Scale, layers: AxisMap) -> np.ndarray:
    """float64 [new]: the share of each new layer. Raises UsageError and TypeError."""
    numbers = _read_scale(scale)
    wrong = [number for number in numbers if not (math.isfinite(number) and number >= 0)]
    if wrong:
        raise UsageError(f"--scale takes shares that are finite and at least 0, got {wrong[0]:g}")
    if len(numbers) > 1 or not isinstance(scale, (str, float, int)):
        if len(numbers) != len(layers):
            raise UsageError(
                f"--scale lists {len(numbers)} shares, and the map makes {len(layers)} layers; "
                f"give one share for all copies, or {len(layers)}"
            )
        return np.array(numbers, np.float64)
    copied = list_copies(layers)
    if not copied.any():
        raise UsageError(
            "--scale gives a share to copied layers, and the map lists each layer once; give one "
            "share for each new layer instead"
        )
    return np.where(copied, numbers[0], 1.0)


def _read_scale(scale: Scale) -> list[float]:
    """The numbers of a scale. Raises UsageError for text that is none, TypeError for no scale."""
    if isinstance(scale, str):
        return _parse_text(scale)
    hint = "a share, or one for each new layer"
    require_type("scale", scale, (float, int, list, tuple, np.ndarray), hint)
    if isinstance(scale, (float, int)):
        return [float(scale)]
    for number in scale:
        require_type("scale", number, (float, int, np.number), "in a list of shares")
    return [float(number) for number in scale]


def _parse_text(text: str) -> list[float]:
    """The numbers of 'layer=0.5' or 'layer=1,0.5,1'. Raises UsageError."""
    axis, equals, listed = text.partition("=")
    if not equals:
        raise UsageError(f"{FORM}; got {text!r}")
    if axis.strip() != AXIS:
        raise UsageError(
            f"--scale is for layers alone, as layer=0.5; got {axis.strip()!r}. Copies in width "
            f"take --spread"
        )
    try:
        return [float(item) for item in listed.split(",")]
    except ValueError:
        raise UsageError(f"{FORM}; got {text!r}") from None


def _name_shares(share: np.ndarray) -> str:
    """The shares in words, as they stand in a plan's method."""
    different = sorted(set(share.tolist()))
    if len(different) > MOST_NAMED:
        return f"layers with shares of {different[0]:g} to {different[-1]:g}"
    listed = ", ".join(f"{each:g}" for each in different)
    return f"layers with {'a share' if len(different) == 1 else 'shares'} of {listed}"
