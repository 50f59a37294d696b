"""The notation of depth: "18:24", "0,0,1,2,2", "0-23,8-31" become a map of the layer axis.

Knows the methods that place copies and every refusal a map can earn; leaves what a plan does to others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from growkit.errors import UsageError, did_you_mean
from growkit.growth.axes import AxisMap, insert, make_map, replicate, replicate_nearest, stack
from growkit.growth.plan import Plan, build_plan
from growkit.models.architecture import Architecture

MOST_LAYERS = 4096
FORM = "--map takes SOURCE:TARGET, as 18:24, or a list of source layers, as 0,0,1,2,2 or 0-23,8-31"

# method: (map of source and target counts, its formula)
METHODS: dict[str, tuple[Callable[[int, int], AxisMap], str]] = {
    "replicate": (replicate, "floor(i*{source}/{target})"),
    "nearest": (replicate_nearest, "round(i*{source}/{target}), clipped"),
    "stack": (stack, "i mod {source}"),
    "identity": (insert, "floor(i*{source}/{target}), copies add nothing"),
}


def plan_depth(model: Architecture, text: str, method: str | None = None) -> Plan:
    """The plan of `--map text` for a model; method: one of METHODS; a list takes none, or 'replicate'.

    Raises UsageError for a map that cannot be meant for the model.
    """
    if method is not None and method not in METHODS:
        raise UsageError(
            f"--method is one of {', '.join(METHODS)}, got {method!r}{did_you_mean(method, METHODS)}"
        )
    pair = re.fullmatch(r"\s*(-?[0-9]{1,18})\s*:\s*(-?[0-9]{1,18})\s*", text)
    if pair:
        target = _check_pair(int(pair[1]), int(pair[2]), model.layer)
        name = method or "replicate"
        make, formula = METHODS[name]
        layers, words = (
            make(model.layer, target),
            f"{name}: {formula.format(source=model.layer, target=target)}",
        )
    elif method not in (None, "replicate"):
        raise UsageError(
            f"--method {method} goes with --map SOURCE:TARGET; the list {text!r} says itself what is copied"
        )
    else:
        layers, words = make_map(_parse_list(text, model.layer), model.layer), "list"
    if len(layers) < model.layer:
        raise UsageError(
            f"growth adds layers: --map {text} lists {len(layers)}, the source has {model.layer}; "
            f"a list of all of them is 0-{model.layer - 1}"
        )
    return build_plan("depth", words, model, {"layer": layers})


def _check_pair(source: int, target: int, layers: int) -> int:
    """The target of --map source:target. Raises UsageError when it cannot be meant for a model of `layers` layers."""
    given = f"--map {source}:{target}"
    if target <= source:
        nearest = (
            f"did you mean {target}:{source}?"
            if target == layers < source
            else f"try {layers}:{layers + 1}"
        )
        raise UsageError(
            f"growth adds layers: {given} would go from {source} to {target}; {nearest}"
        )
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
            raise UsageError(
                f"--map names layer {max(first, last)}; the source's layers are 0 to {layers - 1}"
            )
        if last < first:
            raise UsageError(f"a range of --map counts up, got {match[0]!r}; write {last}-{first}")
        index += range(first, last + 1)
    if len(index) > MOST_LAYERS:
        raise UsageError(f"--map asks for {len(index)} layers; growkit makes at most {MOST_LAYERS}")
    return index


def draw_map(layers: Sequence[int], width: int = 24) -> str:
    """The layer map as two lines a block: each new layer over the source layer it copies, copies marked."""
    first = {layer: n for n, layer in reversed(list(enumerate(layers)))}
    marks = [" " if first[layer] == n else "+" for n, layer in enumerate(layers)]
    blocks = []
    for start in range(0, len(layers), width):
        new = range(start, min(start + width, len(layers)))
        blocks.append("new   " + " ".join(f"{n:4}" for n in new))
        blocks.append("from  " + " ".join(f"{marks[n]}{layers[n]:3}" for n in new))
    return "\n".join(blocks)
