"""Sizes that follow from those asked for: embed is heads x head_dim in most families, and mlp keeps
its ratio to embed.

A size that follows changes only where copies of its units are exact; else it stays, with a note.
"""

from __future__ import annotations

from collections.abc import Mapping

from growkit.errors import UsageError
from growkit.models.architecture import Architecture

# The sizes that a user asks for. `heads` counts query heads.
WIDTHS = ("embed", "heads", "head_dim", "mlp")


def list_widths(model: Architecture) -> dict[str, int]:
    """The model's sizes, by the names of WIDTHS."""
    sizes = (model.embed, model.head_count, model.head_dim, model.mlp)
    return dict(zip(WIDTHS, sizes, strict=True))


def complete_widths(
    model: Architecture, asked: Mapping[str, int | None]
) -> tuple[dict[str, int], list[str]]:
    """All four sizes from those asked for, and a note for each that was completed.

    Raises UsageError for sizes that contradict each other.
    """
    old = list_widths(model)
    target = {axis: old[axis] if size is None else size for axis, size in asked.items()}
    notes = []
    if model.coupled:
        notes += _complete_embed(target, asked, old)
    elif asked["heads"] is None and 0 < old["embed"] == old["heads"] * old["head_dim"]:
        notes += _complete_heads(model, target, old)
    if asked["mlp"] is None and old["mlp"] and target["embed"] != old["embed"]:
        notes += _complete_mlp(model, target, old)
    return target, notes


def _complete_embed(
    target: dict[str, int], asked: Mapping[str, int | None], old: Mapping[str, int]
) -> list[str]:
    """Make embed = heads x head_dim by changing a size that was not asked for.

    That is embed, else heads, else head_dim.
    """
    given = {axis for axis in ("embed", "heads", "head_dim") if asked[axis] is not None}
    if not given:
        return []
    if "embed" not in given:
        target["embed"] = target["heads"] * target["head_dim"]
        return [f"embed {old['embed']} -> {target['embed']}, being heads x head_dim"]
    if "heads" not in given:
        return _divide_embed(target, old, "heads", "head_dim")
    if "head_dim" not in given:
        return _divide_embed(target, old, "head_dim", "heads")
    product = target["heads"] * target["head_dim"]
    if target["embed"] != product:
        raise UsageError(
            f"embed must be heads x head_dim: {target['heads']} x {target['head_dim']} is "
            f"{product}, not {target['embed']}"
        )
    return []


def _divide_embed(
    target: dict[str, int], old: Mapping[str, int], free: str, other: str
) -> list[str]:
    """Set the free one of heads and head_dim to embed / the other."""
    embed = target["embed"]
    if embed % target[other] or embed // target[other] < old[free]:
        low = max(embed - embed % target[other], old[free] * target[other])
        what = free.replace("_dim", " dimensions")
        raise UsageError(
            f"embed must be heads x head_dim: {embed} is not {old[free]} or more {what} times "
            f"{other.replace('_', ' ')} {target[other]}; the nearest are {low} and "
            f"{low + target[other]}"
        )
    target[free] = embed // target[other]
    if target[free] == old[free]:
        return []
    return [f"{free} {old[free]} -> {target[free]}, so that embed is heads x head_dim"]


def _complete_heads(
    model: Architecture, target: dict[str, int], old: Mapping[str, int]
) -> list[str]:
    """Keep embed = heads x head_dim where a model has it by choice, and whole groups can."""
    heads, rest = divmod(target["embed"], target["head_dim"])
    group = model.sizes.get("group", 1)
    if rest or heads % group or heads <= old["heads"]:
        return []
    problem = find_problem(model, model.heads, heads // group)
    if problem:
        return [f"heads stay {old['heads']}: {problem}"]
    target["heads"] = heads
    return [f"heads {old['heads']} -> {heads}, so that embed stays heads x head_dim"]


def _complete_mlp(model: Architecture, target: dict[str, int], old: Mapping[str, int]) -> list[str]:
    """Keep the ratio of mlp to embed, where mlp can grow to that size."""
    # Never below the old one, which is there to be copied.
    size = max(old["mlp"], round(old["mlp"] * target["embed"] / old["embed"]))
    problem = find_problem(model, "mlp", size)
    if problem:
        return [f"mlp stays {old['mlp']}: {problem}"]
    target["mlp"] = size
    return [f"mlp {old['mlp']} -> {size}, to keep its ratio to embed"]


def find_problem(model: Architecture, axis: str, size: int) -> str:
    """Why copies do not bring an axis to a size exactly; empty where they do."""
    if axis in model.family.frozen:
        return model.family.frozen[axis]
    old = model.sizes[axis]
    if axis in model.table.uniform_axes and size % old:
        low = size - size % old
        return (
            f"copies of {axis} are exact only when every unit has as many: {size} is no multiple "
            f"of {old}; the nearest are {low} and {low + old}"
        )
    return ""
