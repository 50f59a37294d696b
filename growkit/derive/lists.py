"""Lists of a configuration: which hold one entry for each layer, which hold numbers of layers, and
which say nothing about layers.

Found by trying, not by names: a list holds numbers of layers if another number in it makes another
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from growkit.derive.network import build, file_state, load, make_config, run
from growkit.derive.sizes import Probe, shapes_of
from growkit.derive.stream import TOKENS
from growkit.derive.variant import Variant, fill
from growkit.models.layer_fields import OTHER_LISTS

# Of the logits: far above rounding in float64, far below what another kind of layer changes.
DIFFERENT = 1e-9


def find_by_layer(variant: Variant) -> tuple[str, ...]:
    """Fields with one entry for each layer."""
    layers = variant.names.layers
    others = (*OTHER_LISTS, *find_numbers(variant))
    return tuple(
        name
        for name, value in variant.probe.stated.items()
        if isinstance(value, list) and len(value) == layers and name not in others
    )


def find_others(variant: Variant) -> tuple[str, ...]:
    """Fields that hold a list of another length than the number of layers, and no such numbers."""
    known = (*OTHER_LISTS, *find_by_layer(variant), *find_numbers(variant))
    return tuple(
        name
        for name, value in variant.probe.stated.items()
        if isinstance(value, list) and value and name not in known
    )


def find_numbers(variant: Variant) -> tuple[str, ...]:
    """Fields that list the numbers of layers of a kind."""
    found: tuple[str, ...] = variant.once("numbers", lambda: read_numbers(variant.probe))
    return found


def read_numbers(probe: Probe) -> tuple[str, ...]:
    """Fields that hold a list or nothing, of which [0] and [1] make different models.

    Lists of the tiny configuration itself are left out: kinds of layers that are stated go before
    numbers of layers.
    """
    fields = {name: value for name, value in probe.fields.items() if not isinstance(value, list)}
    return tuple(
        name
        for name, value in probe.stated.items()
        if (value is None or isinstance(value, list))
        and name not in OTHER_LISTS
        and _picks_layers(probe.kind, fields, name)
    )


def _picks_layers(kind: str, fields: Mapping[str, Any], name: str) -> bool:
    """Whether a field takes the number of a layer, and one layer is another model than the next."""
    first, second = ({**fields, name: [layer]} for layer in (0, 1))
    shapes, others = shapes_of(kind, first), shapes_of(kind, second)
    if shapes is None or others is None:
        return False
    if shapes != others:
        return len(shapes) == len(others)
    try:
        state = fill(file_state(build(make_config(kind, first))))
        logits = [run(load(make_config(kind, each), state), TOKENS) for each in (first, second)]
    except Exception:
        # The model computes with no such list: it is of something else.
        return False
    return not torch.allclose(*logits, rtol=DIFFERENT, atol=DIFFERENT)
