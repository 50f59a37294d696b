"""From intention to axis maps: "18:24" becomes {layer: AxisMap}, with every refusal that intention can earn.

A `Plan` is all that growth needs: the model before and after, the maps, what becomes of the moments, and
whether the function is preserved. Knows the user's notation and what it means; leaves arrays and files
to others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from growkit.axes import AxisMap, listed, replicate
from growkit.errors import UsageError
from growkit.neox import NeoX

MOST_LAYERS = 4096
FORM = "--map takes SOURCE:TARGET, as 18:24, or a list of source layers, as 0,0,1,2,2 or 0-23,8-31"


@dataclass(frozen=True)
class Plan:
    """A growth, resolved: nothing in it is a default any more.

    mu: what becomes of first moments, 'map' (grown by the rule) or 'zero'; nu is always grown by the rule.
    """

    verb: str
    method: str
    model: NeoX
    grown: NeoX
    maps: dict[str, AxisMap]
    preserved: bool
    mu: str

    def resolved(self) -> dict[str, Any]:
        """Every value of the plan, for the lineage."""
        return {
            "operation": self.verb,
            "method": self.method,
            "maps": {
                axis: {"index": axis_map.index.tolist(), "share": axis_map.share.tolist()}
                for axis, axis_map in self.maps.items()
            },
            "sizes": {"before": self.model.sizes, "after": self.grown.sizes},
            "moments": {"mu": self.mu, "nu": "map", "count": "kept"},
            "function": "preserved" if self.preserved else "not preserved",
        }


def plan_depth(model: NeoX, text: str) -> Plan:
    """The plan of `--map text` for a model. Raises UsageError for a map that cannot be meant for it."""
    pair = re.fullmatch(r"\s*(-?[0-9]{1,18})\s*:\s*(-?[0-9]{1,18})\s*", text)
    if pair:
        target = _check_pair(int(pair[1]), int(pair[2]), model.layer)
        layers, method = replicate(model.layer, target), f"replicate: floor(i*{model.layer}/{target})"
    else:
        layers, method = listed(_parse_list(text, model.layer), model.layer), "list"
    if len(layers) < model.layer:
        raise UsageError(
            f"growth adds layers: --map {text} lists {len(layers)}, the source has {model.layer}; "
            f"a list of all of them is 0-{model.layer - 1}"
        )
    preserved = np.array_equal(layers.index, np.arange(model.layer))
    return Plan(
        verb="depth",
        method=method,
        model=model,
        grown=replace(model, layer=len(layers)),
        maps={"layer": layers},
        preserved=bool(preserved),
        mu="map" if preserved else "zero",
    )


def _check_pair(source: int, target: int, layers: int) -> int:
    """The target of --map source:target. Raises UsageError when it cannot be meant for a model of `layers` layers."""
    given = f"--map {source}:{target}"
    if target <= source:
        nearest = f"did you mean {target}:{source}?" if target == layers < source else f"try {layers}:{layers + 1}"
        raise UsageError(f"growth adds layers: {given} would go from {source} to {target}; {nearest}")
    if source != layers:
        same = min(max(layers + 1, layers * target // max(source, 1)), MOST_LAYERS)
        raise UsageError(
            f"{given} is for a model of {source} layers, the source has {layers}; the nearest is --map {layers}:{same}"
        )
    if target > MOST_LAYERS:
        raise UsageError(f"{given} asks for {target} layers; growkit makes at most {MOST_LAYERS}")
    return target


def _parse_list(text: str, layers: int) -> list[int]:
    """Source layers from '0,0,1' and ranges '0-23' (both ends included)."""
    items = [item.strip() for item in text.split(",")]
    found = [re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", item) for item in items]
    if not all(found) or len(items) == 1 and found[0][2] is None:
        raise UsageError(f"{FORM}; got {text!r}")
    index: list[int] = []
    for match in found:
        first, last = int(match[1]), int(match[2] or match[1])
        if max(first, last) >= layers:
            raise UsageError(f"--map names layer {max(first, last)}; the source's layers are 0 to {layers - 1}")
        if last < first:
            raise UsageError(f"a range of --map counts up, got {match[0]!r}; write {last}-{first}")
        index += range(first, last + 1)
    if len(index) > MOST_LAYERS:
        raise UsageError(f"--map asks for {len(index)} layers; growkit makes at most {MOST_LAYERS}")
    return index


def picture(layers: Sequence[int], width: int = 24) -> str:
    """The layer map as two lines a block: each new layer over the source layer it copies, copies marked."""
    blocks = []
    for start in range(0, len(layers), width):
        new = range(start, min(start + width, len(layers)))
        marks = ("+" if n and layers[n] == layers[n - 1] else " " for n in new)
        blocks.append("new   " + " ".join(f"{n:4}" for n in new))
        blocks.append("from  " + " ".join(f"{mark}{layers[n]:3}" for mark, n in zip(marks, new, strict=True)))
    return "\n".join(blocks)
