"""The notation of width: "2x" or "2048" for embed, heads, mlp and head_dim become maps and paddings.

Knows how a change of one axis completes the others (embed = heads x head_dim; mlp keeps its ratio to embed),
which widths copies reach exactly and which need padding, and the target that another model's sizes make.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from growkit.errors import UsageError, did_you_mean
from growkit.growth.axes import replicate, spread_shares, tile
from growkit.growth.plan import Plan, build_plan, combine_plans
from growkit.models.architecture import Architecture

METHODS = ("clone", "pad")
MOST = 1 << 24
# How embed is padded, by the norm that must not see it.
PADDING = {"layer": "mean-pad", "rms": "zero-pad"}
WIDE = ("embed", "heads", "head_dim", "mlp")
# Options in which a target may differ: padding sets norm_eps, training the others.
LOOSE = ("context", "norm_eps", "initializer_range")


def parse_size(option: str, text: str | int | None, current: int) -> int | None:
    """'2x' or '2048' as a size, None for None. Raises UsageError for what is neither, and for shrinking."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9]{1,9})(?:\.([0-9]{1,6}))?\s*(x)?\s*", str(text))
    if not found or found[2] and not found[3]:
        raise UsageError(
            f"--{option} takes a size, as {2 * current}, or a factor, as 2x; got {text!r}"
        )
    decimals = found[2] or ""
    size, rest = int(found[1] + decimals), 0
    if found[3]:
        size, rest = divmod(size * current, 10 ** len(decimals))
    if rest:
        raise UsageError(
            f"--{option} {text} of {current} is no whole number; the nearest is {size} or {size + 1}"
        )
    if size < current:
        raise UsageError(
            f"growth makes nothing smaller: --{option} {text} would take {current} to {size}"
        )
    if size > MOST:
        raise UsageError(f"--{option} {text} asks for {size}; growkit makes at most {MOST}")
    return size


def plan_width(
    model: Architecture,
    embed: str | int | None = None,
    heads: str | int | None = None,
    mlp: str | int | None = None,
    head_dim: str | int | None = None,
    method: str | None = None,
    spread: float = 0.0,
) -> Plan:
    """The plan of a growth in width; what is not given is completed by rule and noted.

    method: 'clone' (copies, exact for whole multiples of embed), 'pad' (mean-pad embed, exact for any size), or
    None to choose. spread: how uneven the shares of copied heads and mlp units are, in [0, 1). Raises UsageError.
    """
    if method is not None and method not in METHODS:
        raise UsageError(
            f"--method is one of {', '.join(METHODS)}, got {method!r}{did_you_mean(method, METHODS)}"
        )
    if not 0 <= spread < 1:
        raise UsageError(
            f"--spread must lie in [0, 1), so that all shares stay positive; got {spread}"
        )
    sizes = model.sizes
    asked = {
        "embed": parse_size("embed", embed, sizes["embed"]),
        "heads": parse_size("heads", heads, model.head_count),
        "head_dim": parse_size("head-dim", head_dim, sizes["head_dim"]),
        "mlp": parse_size("mlp", mlp, sizes["mlp"]),
    }
    if all(size is None for size in asked.values()):
        raise UsageError(
            "growth in width needs at least one of --embed, --heads, --mlp and --head-dim"
        )
    target, notes = complete(model, asked)
    plan = _planned(model, target, notes, method, spread)
    if spread and not plan.maps.keys() & {model.heads, "mlp"}:
        raise UsageError(
            "--spread makes the shares of copied heads and mlp units uneven, and none are copied here"
        )
    return plan


def _wide(model: Architecture) -> tuple[int, ...]:
    """The model's sizes of the axes of WIDE."""
    return model.embed, model.head_count, model.sizes["head_dim"], model.mlp


def complete(model: Architecture, asked: dict[str, int | None]) -> tuple[dict[str, int], list[str]]:
    """All four sizes from those asked for, and a note for each that was completed. Raises UsageError."""
    old = dict(zip(WIDE, _wide(model), strict=True))
    target = {axis: size if size is not None else old[axis] for axis, size in asked.items()}
    notes = []
    if model.coupled:
        notes += _complete_embed(target, asked, old)
    elif asked["heads"] is None and old["embed"] == old["heads"] * old["head_dim"]:
        notes += _complete_heads(model, target, old)
    if asked["mlp"] is None and target["embed"] != old["embed"]:
        target["mlp"] = max(old["mlp"], round(old["mlp"] * target["embed"] / old["embed"]))
        notes.append(f"mlp {old['mlp']} -> {target['mlp']}, to keep its ratio to embed")
    return target, notes


def _complete_embed(
    target: dict[str, int], asked: dict[str, int | None], old: dict[str, int]
) -> list[str]:
    """Make embed = heads x head_dim, changing what was not asked for: embed, else heads, else head_dim."""
    given = {axis for axis in ("embed", "heads", "head_dim") if asked[axis] is not None}
    if "embed" not in given:
        if not given:
            return []
        target["embed"] = target["heads"] * target["head_dim"]
        return [f"embed {old['embed']} -> {target['embed']}, being heads x head_dim"]
    free = "heads" if "heads" not in given else "head_dim" if "head_dim" not in given else None
    other = "head_dim" if free == "heads" else "heads"
    embed = target["embed"]
    if free is None:
        if embed != target["heads"] * target["head_dim"]:
            product = target["heads"] * target["head_dim"]
            raise UsageError(
                f"embed must be heads x head_dim: {target['heads']} x {target['head_dim']} is {product}, not {embed}"
            )
        return []
    if embed % target[other] or embed // target[other] < old[free]:
        low = max(embed - embed % target[other], old[free] * target[other])
        raise UsageError(
            f"embed must be heads x head_dim: {embed} is not {old[free]} or more {free.replace('_dim', ' dimensions')} "
            f"times {other.replace('_', ' ')} {target[other]}; the nearest are {low} and {low + target[other]}"
        )
    target[free] = embed // target[other]
    return (
        []
        if target[free] == old[free]
        else [f"{free} {old[free]} -> {target[free]}, so that embed is heads x head_dim"]
    )


def _complete_heads(model: Architecture, target: dict[str, int], old: dict[str, int]) -> list[str]:
    """Keep embed = heads x head_dim where a model has it so without having to, and whole groups of heads can."""
    heads, rest = divmod(target["embed"], target["head_dim"])
    if rest or heads % model.sizes.get("group", 1) or heads <= old["heads"]:
        return []
    target["heads"] = heads
    return [f"heads {old['heads']} -> {heads}, so that embed stays heads x head_dim"]


def _planned(
    model: Architecture, target: dict[str, int], notes: list[str], method: str | None, spread: float
) -> Plan:
    """The plan for complete sizes: copies where they are exact, padding elsewhere."""
    sizes: dict[str, Any] = model.sizes
    maps, pads, words = {}, {}, []
    if target["embed"] > sizes["embed"]:
        if _clones_embed(model, target["embed"], method, notes):
            maps["embed"] = tile(sizes["embed"], target["embed"])
            words.append(f"embed {sizes['embed']} -> {target['embed']} by copies, equal shares")
        else:
            pads["embed"] = target["embed"]
            words.append(f"embed {sizes['embed']} -> {target['embed']} by {PADDING[model.norm]}")
    heads = _head_units(model, target["heads"])
    for axis, size in ((model.heads, heads), ("mlp", target["mlp"])):
        if size > sizes[axis]:
            maps[axis] = spread_shares(tile(sizes[axis], size), spread)
            words.append(
                f"{axis} {sizes[axis]} -> {size} by copies, {'uneven' if spread else 'equal'} shares"
            )
    if target["head_dim"] > sizes["head_dim"]:
        pads["head_dim"] = target["head_dim"]
        words.append(
            f"head_dim {sizes['head_dim']} -> {target['head_dim']} by keep-rotary ({model.rotary} stay rotated)"
        )
    if not words:
        raise UsageError("nothing grows: every size asked for is the source's own")
    return replace(build_plan("width", "; ".join(words), model, maps, pads), notes=tuple(notes))


def _clones_embed(model: Architecture, target: int, method: str | None, notes: list[str]) -> bool:
    """Whether embed is copied, by choice or because the target is a multiple; a choice made is noted."""
    source = model.embed
    if method == "pad":
        return False
    if target % source == 0:
        return True
    low = target - target % source
    if method == "clone":
        raise UsageError(
            f"copies of embed are exact only when every entry has as many, because norms average over them: {target} "
            f"is no multiple of {source}; the nearest are {low} and {low + source}; --method pad takes {target} exactly"
        )
    notes.append(
        f"embed {target} is no multiple of {source}, so it is padded ({PADDING[model.norm]}) and not copied"
    )
    return False


def _head_units(model: Architecture, heads: int) -> int:
    """The size of the heads axis for a number of query heads. Raises UsageError where groups do not divide it."""
    group = model.sizes.get("group", 1)
    if heads % group:
        low = heads - heads % group
        raise UsageError(
            f"heads come in groups of {group} that share keys: {heads} is no multiple; use {low} or {low + group}"
        )
    return heads // group


def plan_like(model: Architecture, like: Architecture) -> Plan:
    """The plan that gives `model` the sizes of `like`: every axis that differs, in one pass. Raises UsageError."""
    notes = _kept(model, like)
    sizes, target = model.sizes, like.sizes
    smaller = [axis for axis in sizes if target[axis] < sizes[axis]]
    if smaller:
        axis = smaller[0]
        raise UsageError(
            f"growth makes nothing smaller: {axis} is {sizes[axis]} in the source and {target[axis]} in the target"
        )
    plans = []
    if target["layer"] > sizes["layer"]:
        words = f"replicate: floor(i*{sizes['layer']}/{target['layer']})"
        plans.append(
            build_plan("depth", words, model, {"layer": replicate(sizes["layer"], target["layer"])})
        )
    if _wide(model) != _wide(like):
        plans.append(_planned(model, dict(zip(WIDE, _wide(like), strict=True)), notes, None, 0.0))
    if not plans:
        raise UsageError("nothing grows: the source has every size of the target already")
    plan = combine_plans("grow", plans, model)
    for axis, size in plan.grown.sizes.items():
        if size != target[axis]:
            raise UsageError(
                f"growth does not reach the target: {axis} would be {size}, the target has {target[axis]}"
            )
    return replace(plan, notes=tuple(notes))


def _kept(model: Architecture, like: Architecture) -> list[str]:
    """What growth keeps although the target has it otherwise, in words. Raises UsageError where that is no detail."""
    if model.kind != like.kind:
        raise UsageError(f"the source is a {model.kind} model, the target a {like.kind} one")
    target = _fixed(like)
    for name, ours in _fixed(model).items():
        if ours != target[name]:
            raise UsageError(
                f"growth keeps {name}: the source has {ours}, the target {target[name]}"
            )
    notes = []
    if model.rotary != like.rotary:
        if model.sizes["head_dim"] == like.sizes["head_dim"]:
            raise UsageError(
                f"growth keeps how many dimensions of a head are rotated: the source has {model.rotary}, "
                f"the target {like.rotary}"
            )
        notes.append(
            f"{model.rotary} dimensions of a head stay rotated; the target has {like.rotary}"
        )
    if model.context != like.context:
        notes.append(
            f"context stays {model.context}; the target's {like.context} is a matter of training"
        )
    return notes


def _fixed(model: Architecture) -> dict[str, Any]:
    """The sizes, options and rotary parameters that growth cannot change, by name."""
    grown = ("layer", "embed", model.heads, "head_dim", "mlp")
    sizes = {axis: size for axis, size in model.sizes.items() if axis not in grown}
    options = {name: value for name, value in model.options.items() if name not in LOOSE}
    # head_dim grows with the rotated part kept as a number of dimensions.
    own = ("rope_theta", "partial_rotary_factor")
    rope = {name: value for name, value in model.rope.items() if name not in own}
    return {**sizes, **options, "rotary_base": model.rotary_base, "rope": rope}
