"""Plans of growth in width:

"2x" or "2048" for embed, heads, mlp and head_dim become maps and paddings.

A change of one size completes the others: embed is heads x head_dim in most families, and mlp keeps
its ratio to embed. Copies reach whole multiples of embed exactly; padding reaches any size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from growkit.errors import UsageError, did_you_mean, require_type
from growkit.growth.axes import AxisMap, replicate, spread_shares, tile
from growkit.growth.completion import WIDTHS, complete_widths, find_problem, list_widths
from growkit.growth.layer_shares import Scale, scale_layers
from growkit.growth.plan import MODEL_HINT, Plan, build_plan, combine_plans
from growkit.models.architecture import Architecture

METHODS = ("clone", "pad")
LARGEST_SIZE = 1 << 24
# How embed is padded, by the kind of norm that must not see it.
PADDING = {"layer": "mean-pad", "rms": "zero-pad"}
# Axes that no size of their own is asked for, and what grows them.
ELSEWHERE = {
    "layer": "layers grow by `growkit depth`",
    "embed": "its size is --embed",
    "head": "its size is --heads",
    "kv": "its size is --heads, which counts query heads",
    "head_dim": "its size is --head-dim",
    "mlp": "its size is --mlp",
    "vocab": "its size is --vocab",
}
# Options in which a target may differ: padding sets norm_eps, training the others.
LOOSE = ("context", "norm_eps", "initializer_range")

# At most 9 digits before the point and 6 after: what is longer is a slip of the keyboard, and
# converting it would take time.
_SIZE = re.compile(r"\s*([0-9]{1,9})(?:\.([0-9]{1,6}))?\s*(x)?\s*")


def parse_size(option: str, text: str | int | None, current: int) -> int | None:
    """'2x' or '2048' as a size, None for None.

    Raises UsageError for text that is neither, and for a size below the current one.

    >>> parse_size("embed", "1.5x", 1024), parse_size("embed", 2048, 1024)
    (1536, 2048)
    """
    if text is None:
        return None
    found = _SIZE.fullmatch(str(text))
    if not found or (found[2] and not found[3]):
        raise UsageError(
            f"--{option} takes a size, as {2 * current}, or a factor, as 2x; got {text!r}"
        )
    decimals = found[2] or ""
    # '1.5x' of 1024 in whole numbers: 15 * 1024 / 10. In floats 2.3 * 100 is 229.99999999999997.
    size = int(found[1] + decimals)
    if found[3]:
        size, rest = divmod(size * current, 10 ** len(decimals))
        if rest:
            raise UsageError(
                f"--{option} {text} of {current} is not a whole number; the nearest are {size} and "
                f"{size + 1}"
            )
    if size < current:
        raise UsageError(
            f"--{option} {text} is below the source's {current}; growkit only grows models"
        )
    if size > LARGEST_SIZE:
        raise UsageError(f"--{option} {text} asks for {size}; growkit makes at most {LARGEST_SIZE}")
    return size


def plan_width(
    model: Architecture,
    embed: str | int | None = None,
    heads: str | int | None = None,
    mlp: str | int | None = None,
    head_dim: str | int | None = None,
    method: str | None = None,
    spread: float = 0.0,
    axes: Mapping[str, str | int] | None = None,
) -> Plan:
    """The plan of a growth in width; sizes that are not given are completed by rule and noted.

    method: 'clone' (copies, exact for whole multiples of embed), 'pad' (exact for any size of
    embed), or None to choose. spread: how uneven the shares of copied units are but for embed, in
    [0, 1). axes: sizes of further axes of the model's table. Raises UsageError, and TypeError for
    an argument of another type.
    """
    require_type("model", model, Architecture, MODEL_HINT)
    _check_choices(method, spread)
    _check_axes(model, {"embed": embed, "heads": heads, "head_dim": head_dim, "mlp": mlp})
    asked = {
        "embed": parse_size("embed", embed, model.embed),
        "heads": parse_size("heads", heads, model.head_count),
        "head_dim": parse_size("head-dim", head_dim, model.head_dim),
        "mlp": parse_size("mlp", mlp, model.mlp),
    }
    others = read_axes(model, axes or {})
    if not others and all(size is None for size in asked.values()):
        raise UsageError(
            "growth in width needs at least one of --embed, --heads, --mlp, --head-dim, --axis and "
            "--vocab"
        )
    if "group" in others and asked["heads"] is None:
        # More query heads for each key; embed = heads x head_dim goes with them.
        asked["heads"] = model.sizes[model.heads] * others["group"]
    target, notes = complete_widths(model, asked)
    plan = _plan_target(model, target | others, notes, method, spread)
    _check_spread(plan, spread)
    return plan


def _check_spread(plan: Plan, spread: float) -> None:
    """Raise UsageError for uneven shares of copies where there are none but of embed."""
    if spread and not plan.maps.keys() - {"embed"}:
        raise UsageError(
            "--spread makes the shares of copied heads and mlp units uneven, and none are copied "
            "here"
        )


def _check_choices(method: str | None, spread: float) -> None:
    """Raise UsageError for an unknown method or a spread that is too large, TypeError for text."""
    require_type("spread", spread, (float, int), "as 0.5")
    if method is not None and method not in METHODS:
        near = did_you_mean(method, METHODS)
        raise UsageError(f"--method is one of {', '.join(METHODS)}, got {method!r}{near}")
    if not 0 <= spread < 1:
        raise UsageError(
            f"--spread must lie in [0, 1), so that all shares stay positive; got {spread}"
        )


def read_axes(model: Architecture, axes: Mapping[str, str | int]) -> dict[str, int]:
    """The sizes asked for of axes beside embed, heads, head_dim and mlp. Raises UsageError."""
    found = {}
    for axis, text in axes.items():
        if axis in ELSEWHERE:
            raise UsageError(f"--axis {axis} is not needed: {ELSEWHERE[axis]}")
        if axis == "expert" and model.family.experts:
            raise UsageError("--axis expert is not needed: experts grow by `growkit experts`")
        if axis not in model.sizes:
            free = list_others(model)
            known = ", ".join(free) or "none of this model"
            raise UsageError(
                f"{axis} is no axis of the model's table{did_you_mean(axis, free)}; --axis "
                f"grows {known}"
            )
        found[axis] = parse_size(f"axis {axis}", text, model.sizes[axis]) or model.sizes[axis]
    return found


def _check_axes(model: Architecture, asked: Mapping[str, str | int | None]) -> None:
    """Raise UsageError for a size of an axis that the model's table does not have."""
    for name, size in list_widths(model).items():
        if asked[name] is not None and size == 0:
            raise UsageError(
                f"{name} cannot grow: no row of the model's table has that axis; its axes are "
                f"{', '.join(model.sizes)}"
            )


def list_others(model: Architecture) -> list[str]:
    """The axes that grow beside those of WIDTHS."""
    return [
        axis
        for axis in model.fields
        if axis not in ELSEWHERE and axis not in model.family.frozen and axis in model.sizes
    ]


@dataclass
class _Growth:
    """A growth in width while it is put together: maps, new sizes of padded axes, what is done."""

    maps: dict[str, AxisMap] = field(default_factory=dict)
    pads: dict[str, int] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)


def _plan_target(
    model: Architecture,
    target: Mapping[str, int],
    notes: list[str],
    method: str | None,
    spread: float,
) -> Plan:
    """The plan for complete sizes: copies where they are exact, padding elsewhere."""
    growth = _Growth()
    if target["embed"] > model.embed:
        _grow_embed(growth, model, target["embed"], method, notes)
    group = target.get("group", model.sizes.get("group", 1))
    units = {model.heads: _count_head_units(target["heads"], group), "mlp": target["mlp"]}
    units |= {axis: size for axis, size in target.items() if axis not in WIDTHS}
    for axis, size in units.items():
        old = model.sizes.get(axis, 0)
        if size > old:
            problem = "" if axis in model.family.frozen else find_problem(model, axis, size)
            if problem:
                raise UsageError(problem)
            growth.maps[axis] = spread_shares(tile(old, size), spread)
            shares = "uneven" if spread else "equal"
            growth.steps.append(f"{axis} {old} -> {size} by copies, {shares} shares")
    if target["head_dim"] > model.head_dim:
        growth.pads["head_dim"] = target["head_dim"]
        growth.steps.append(
            f"head_dim {model.head_dim} -> {target['head_dim']} by keep-rotary "
            f"({model.rotary} stay rotated)"
        )
    if not growth.steps:
        raise UsageError("nothing grows: every size asked for is the source's own")
    plan = build_plan("width", "; ".join(growth.steps), model, growth.maps, growth.pads)
    return replace(plan, notes=tuple(notes))


def _grow_embed(
    growth: _Growth, model: Architecture, target: int, method: str | None, notes: list[str]
) -> None:
    """Copy or pad embed."""
    step = f"embed {model.embed} -> {target} by"
    if _can_copy_embed(model, target, method, notes):
        growth.maps["embed"] = tile(model.embed, target)
        growth.steps.append(f"{step} copies, equal shares")
    else:
        growth.pads["embed"] = target
        growth.steps.append(f"{step} {PADDING[model.norm]}")


def _can_copy_embed(model: Architecture, target: int, method: str | None, notes: list[str]) -> bool:
    """Whether embed is copied, by choice or because the target is a multiple; a choice is noted."""
    source = model.embed
    if method == "pad":
        return False
    if target % source == 0:
        return True
    if method == "clone":
        low = target - target % source
        raise UsageError(
            f"copies of embed are exact only when every entry has as many, because norms average "
            f"over them: {target} is not a multiple of {source}; the nearest are {low} and "
            f"{low + source}; --method pad takes {target} exactly"
        )
    notes.append(
        f"embed {target} is not a multiple of {source}: padding ({PADDING[model.norm]}) is used "
        f"instead of copies"
    )
    return False


def _count_head_units(heads: int, group: int) -> int:
    """The size of the heads axis for a number of query heads, in groups of so many.

    Raises UsageError where the groups that share keys do not divide it.
    """
    if heads % group:
        low = heads - heads % group
        raise UsageError(
            f"heads come in groups of {group} that share keys: {heads} is not a multiple; use "
            f"{low} or {low + group}"
        )
    return heads // group


def plan_like(model: Architecture, like: Architecture, scale: Scale | None = None) -> Plan:
    """The plan that gives `model` the sizes of `like`: every axis that differs, in one pass.

    Layers are replicated. scale: shares of copied layers, see `growkit.growth.layer_shares`. Raises
    UsageError where growth does not lead there.
    """
    require_type("model", model, Architecture, MODEL_HINT)
    require_type("like", like, Architecture, MODEL_HINT)
    notes = _check_kept(model, like)
    sizes = model.sizes
    # What only files say is not in a configuration; it stays.
    target = {**sizes, **like.sizes}
    for axis in sizes:
        if target[axis] < sizes[axis]:
            raise UsageError(
                f"{axis} of the target is {target[axis]}, below the source's {sizes[axis]}; "
                f"growkit only grows models"
            )
    plans = []
    if target.get("layer", 0) > sizes.get("layer", 0):
        words = f"replicate: floor(i*{sizes['layer']}/{target['layer']})"
        layers = replicate(sizes["layer"], target["layer"])
        deeper = build_plan("depth", words, model, {"layer": layers})
        plans.append(deeper if scale is None else scale_layers(deeper, scale))
    elif scale is not None:
        raise UsageError("--scale gives shares to copied layers, and the target has no more layers")
    others = list_others(model)
    wanted = list_widths(like) | {axis: target[axis] for axis in others}
    if wanted != list_widths(model) | {axis: sizes[axis] for axis in others}:
        plans.append(_plan_target(model, wanted, notes, None, 0.0))
    if not plans:
        raise UsageError("nothing grows: the source has every size of the target already")
    plan = combine_plans("grow", plans, model)
    for axis, size in plan.grown.sizes.items():
        if size != target[axis]:
            raise UsageError(
                f"growth does not reach the target: {axis} would be {size}, the target has "
                f"{target[axis]}"
            )
    return replace(plan, notes=tuple(notes))


def _check_kept(model: Architecture, like: Architecture) -> list[str]:
    """What growth keeps although the target has it otherwise, as notes.

    Raises UsageError where that would be another model.
    """
    if model.kind != like.kind:
        raise UsageError(f"the source is a {model.kind} model, the target a {like.kind} one")
    ours, theirs = _list_kept(model), _list_kept(like)
    # What only files say is not in a configuration.
    ours = {
        name: value
        for name, value in ours.items()
        if name not in model.sizes.keys() - like.sizes.keys()
    }
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            grows = name == "vocab" and like.vocab > model.vocab
            hint = f"; --vocab {like.vocab} grows it" if grows else ""
            raise UsageError(
                f"growth keeps {name}: the source has {ours.get(name)}, the target "
                f"{theirs.get(name)}{hint}"
            )
    different = set(model.table.rows) ^ set(like.table.rows)
    if different:
        name = min(row.name for row in different)
        raise UsageError(
            f"growth adds no parameter and takes none away: {name} is not the same in the source "
            f"and the target"
        )
    return _note_rotary(model, like) + _note_context(model, like)


def _note_rotary(model: Architecture, like: Architecture) -> list[str]:
    """A note where the target rotates another number of dimensions of a longer head.

    Raises UsageError where its heads are as long: nothing that grows would explain it.
    """
    if model.rotary == like.rotary:
        return []
    if model.head_dim == like.head_dim:
        raise UsageError(
            f"growth keeps how many dimensions of a head are rotated: the source has "
            f"{model.rotary}, the target {like.rotary}"
        )
    return [f"{model.rotary} dimensions of a head stay rotated; the target has {like.rotary}"]


def _note_context(model: Architecture, like: Architecture) -> list[str]:
    """A note where the target reads longer or shorter sequences."""
    if model.context == like.context:
        return []
    return [f"context stays {model.context}; the target's {like.context} is a matter of training"]


def _list_kept(model: Architecture) -> dict[str, object]:
    """The sizes, options and rotary parameters that growth cannot change, by name."""
    grown = ("layer", "embed", model.heads, "head_dim", "mlp", *list_others(model))
    sizes = {axis: size for axis, size in model.sizes.items() if axis not in grown}
    options = {name: value for name, value in model.options.items() if name not in LOOSE}
    del options["rope"]
    # head_dim grows with the rotated part kept as a number of dimensions.
    own = ("rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in model.rope.items() if name not in own}
    return {**sizes, **options, "rotary_base": model.rope.get("rope_theta"), "rope": scaling}
