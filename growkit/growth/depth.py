"""Plans of growth in depth: "18:24", "0,0,1,2,2" and "0-23,8-31" become maps of the layer axis."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from growkit.errors import UsageError, did_you_mean, require_type
from growkit.growth.axes import AxisMap, insert, make_map, replicate, replicate_nearest, stack
from growkit.growth.layer_shares import Scale, scale_layers
from growkit.growth.plan import MODEL_HINT, Plan, build_plan
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

_PAIR = re.compile(r"\s*(-?[0-9]{1,18})\s*:\s*(-?[0-9]{1,18})\s*")
_ITEM = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def plan_depth(
    model: Architecture, text: str, method: str | None = None, scale: Scale | None = None
) -> Plan:
    """The plan of `--map text` for a model.

    method: one of METHODS, for SOURCE:TARGET; a list of layers takes none. scale: shares of copied
    layers, see `growkit.growth.layer_shares`. Raises UsageError for a map or shares that do not fit
    the model.

    >>> from growkit.models.llama import LLAMA
    >>> model = LLAMA.model(layer=3, embed=16, kv=2, group=2, head_dim=4, mlp=32)
    >>> plan_depth(model, "3:5").maps["layer"].index.tolist()
    [0, 0, 1, 1, 2]
    >>> plan_depth(model, "0-2,1-2").grown.layer
    5
    """
    _check_arguments(model, text, method)
    pair = _PAIR.fullmatch(text)
    if pair:
        target = _check_pair(int(pair[1]), int(pair[2]), model.layer)
        name = method or "replicate"
        make, formula = METHODS[name]
        layers = make(model.layer, target)
        words = f"{name}: {formula.format(source=model.layer, target=target)}"
    elif method in (None, "replicate"):
        layers = make_map(_parse_list(text, model.layer), model.layer)
        words = "list"
    else:
        raise UsageError(
            f"--method {method} goes with --map SOURCE:TARGET; the list {text!r} says itself what "
            f"is copied"
        )
    if len(layers) < model.layer:
        raise UsageError(
            f"--map {text} lists {len(layers)} layers, the source has {model.layer}, and growkit "
            f"only adds layers; a list of all of them is 0-{model.layer - 1}"
        )
    plan = build_plan("depth", words, model, {"layer": layers})
    return plan if scale is None else scale_layers(plan, scale)


def _check_arguments(model: Architecture, text: str, method: str | None) -> None:
    """Raise TypeError or UsageError for arguments that are wrong whatever the others are."""
    require_type("model", model, Architecture, MODEL_HINT)
    require_type("text", text, str, "as '18:24'")
    if not model.layer:
        raise UsageError("the model has no layers: no row of its table has the axis 'layer'")
    if method is not None and method not in METHODS:
        near = did_you_mean(method, METHODS)
        raise UsageError(f"--method is one of {', '.join(METHODS)}, got {method!r}{near}")


def _check_pair(source: int, target: int, layers: int) -> int:
    """The target of --map source:target, for a model of `layers` layers. Raises UsageError."""
    given = f"--map {source}:{target}"
    if target <= source:
        swapped = target == layers < source
        near = f"did you mean {target}:{source}?" if swapped else f"try {layers}:{layers + 1}"
        raise UsageError(
            f"{given} goes from {source} layers to {target}, and growkit only adds layers; {near}"
        )
    if source != layers:
        same_ratio = layers * target // max(source, 1)
        best = min(max(layers + 1, same_ratio), MOST_LAYERS)
        raise UsageError(
            f"{given} is for a model of {source} layers, the source has {layers}; the nearest is "
            f"--map {layers}:{best}"
        )
    if target > MOST_LAYERS:
        raise UsageError(f"{given} asks for {target} layers; growkit makes at most {MOST_LAYERS}")
    return target


def _parse_list(text: str, layers: int) -> list[int]:
    """Source layers from '0,0,1' and ranges '0-23' (both ends included)."""
    items = [item.strip() for item in text.split(",")]
    index: list[int] = []
    for item in items:
        found = _ITEM.fullmatch(item)
        if found is None or (len(items) == 1 and found[2] is None):
            raise UsageError(f"{FORM}; got {text!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if max(first, last) >= layers:
            raise UsageError(
                f"--map names layer {max(first, last)}; the source's layers are 0 to {layers - 1}"
            )
        if last < first:
            raise UsageError(f"a range of --map counts up, got {item!r}; write {last}-{first}")
        index += range(first, last + 1)
    if len(index) > MOST_LAYERS:
        raise UsageError(f"--map asks for {len(index)} layers; growkit makes at most {MOST_LAYERS}")
    return index


def draw_map(layers: Sequence[int], shares: Sequence[float] = (), width: int = 24) -> str:
    """The layer map in blocks of two lines: each new layer over the source layer it copies.

    A plus marks every copy after the first. shares: a third line, where they are given.
    """
    carried = [f"{share:.4g}" for share in shares]
    cell = max([4, *map(len, carried)])
    # Where each source layer stands first among the new ones.
    first: dict[int, int] = {}
    for place, layer in enumerate(layers):
        first.setdefault(layer, place)
    marks = [" " if first[layer] == place else "+" for place, layer in enumerate(layers)]
    blocks = []
    for start in range(0, len(layers), width):
        new = range(start, min(start + width, len(layers)))
        blocks.append("new   " + " ".join(f"{n:{cell}}" for n in new))
        copied = (f"{marks[n]}{layers[n]:3}" for n in new)
        blocks.append("from  " + " ".join(f"{words:>{cell}}" for words in copied))
        if carried:
            blocks.append("share " + " ".join(f"{carried[n]:>{cell}}" for n in new))
    return "\n".join(blocks)
