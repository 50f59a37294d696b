"""The derivation of one configuration: read, cut, prove; what is not proved is frozen, with the
reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

from growkit.derive import proof
from growkit.derive.assemble import fields_of, make_family, row_lines
from growkit.derive.proof import (
    BOUND,
    GRADIENTS,
    depth_gap,
    even,
    gradient_gap,
    identity_map,
    measure_gap,
    uneven,
)
from growkit.derive.rows import link
from growkit.derive.tiny import tiny_fields
from growkit.derive.variant import Choice, Variant, read_variant
from growkit.errors import UsageError
from growkit.growth.axes import AxisMap, tile
from growkit.models.family import Family
from growkit.models.layer_fields import follow_layers

# How many ways to cut the dimensions along one axis are tried at most.
TRIES = 40
NEVER = {
    "vocab": "the tokenizer states it",
    "position": "positions are learned one by one",
    "expert": "another number of experts is another choice among them",
}
# Axes of units that a reader sums over, which copies with shares may keep exact.
GROWS = re.compile(
    r"embed|kv|head|group|head_dim|mlp|.*intermediate.*|.*lora_rank|.*ffn.*|.*shared_experts"
    r"|attention_hidden_size|time_step_rank|.*dt_rank"
)
SCALARS = ("", "sqrt(embed)", "1/sqrt(embed)", "embed", "1/embed")


@dataclass
class Workings:
    """The state of one derivation: the ways that rows are cut, what is frozen, the scalars."""

    variant: Variant
    choice: Choice = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    scalars: dict[str, str] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)
    maps: dict[str, AxisMap] = field(default_factory=dict)
    copies: list[list[int]] = field(default_factory=list)
    even_only: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)

    def attempt(self, what: str, compute: Any, failed: Any) -> Any:
        """What a computation gives; `failed`, and the reason kept, where it is refused."""
        try:
            return compute()
        except Exception as problem:
            self.problems[what] = (
                f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
            )
            return failed

    def family(self, **facts: Any) -> Family:
        """The family of the variant alone, nothing frozen: what proofs grow."""
        variant = self.variant
        lines = row_lines(variant, self.choice, pooled(variant))
        text = "\n".join(f"{name} {rest}" for name, rest in lines)
        return make_family(variant, text, {}, {}, scalars=self.scalars, whole_heads=False, **facts)


def pooled(variant: Variant) -> bool:
    """Whether the head is the embedding."""
    return not any(draft.role == "head" for draft in variant.drafts)


def work_out(kind: str, fields: Mapping[str, Any] | None = None) -> Workings:
    """Read one configuration of a type and prove what grows.

    Raises UnprovableError where nothing can be read.
    """
    work = Workings(read_variant(kind, fields or tiny_fields(kind)))
    prove_depth(work)
    prove_width(work)
    return work


def prove_depth(work: Workings) -> None:
    """Depth by copies against transformers' own layers, and layers that add nothing."""
    variant, family = work.variant, work.family()
    layers = variant.names.layers
    work.frozen.pop("layer", None)
    found = []
    work.copies = list_copies(work, family)
    for index in work.copies:
        copied, _ = work.attempt(
            "layer", lambda i=index: depth_gap(family, variant, i), (float("inf"), 0.0)
        )
        found.append(copied)
    if not found:
        found.append(float("inf"))
    work.gaps["layer"] = max(found)
    if max(found) > BOUND and scale_by_depth(work):
        return
    if max(found) > BOUND:
        work.gaps["layer"] = max(found)
        work.frozen["layer"] = "copies of layers are not transformers' layers in that order"
    if not any(draft.stream for draft in variant.drafts):
        work.gaps["identity"] = float("inf")
        return
    work.gaps["identity"] = work.attempt(
        "identity",
        lambda: measure_gap(family, variant, {"layer": identity_map(layers)}),
        float("inf"),
    )


def list_copies(work: Workings, family: Family) -> list[list[int]]:
    """Maps of layers under which each layer keeps its kind, two at most."""
    variant = work.variant
    layers = variant.names.layers
    every = range(layers)
    tried = [sorted([*every, 0, layers - 1]), [*every, *every], sorted([*every, *every])]
    tried += [sorted([*every, *every[1:-1]]), sorted([*every, *every[1:]])]
    if variant.leading:
        # Layers that are counted in front stay there.
        tried.remove([*every, *every])
    source = proof.source_of(variant)
    found: list[list[int]] = []
    for index in tried:
        if index in found or len(index) == layers or len(found) == 2:
            continue
        config = source.config | {family.fields["layer"]: len(index)}
        try:
            follow_layers(config, source.config, family, index)
        except UsageError as problem:
            work.problems["kinds"] = str(problem)
            continue
        found.append(index)
    return found


def scale_by_depth(work: Workings) -> bool:
    """Whether what layers add follows their number, and rows that write the stream undo that."""
    if work.scalars or not any(draft.stream for draft in work.variant.drafts):
        return False
    work.scalars = {d.name: "1/sqrt(layer)" for d in work.variant.drafts if d.stream}
    prove_depth(work)
    if work.gaps["layer"] < BOUND:
        return True
    work.scalars = {}
    return False


def prove_width(work: Workings) -> None:
    """Each axis alone, then all that are exact together."""
    variant = work.variant
    axes = [axis for axis in fields_of(variant) if axis not in ("layer", *NEVER)]
    for axis in axes:
        if not GROWS.fullmatch(axis):
            work.frozen[axis] = "growkit has no rule for its units"
    axes = [axis for axis in axes if axis not in work.frozen]
    for axis in axes:
        if axis == "embed" and variant.coupled:
            # It grows with its heads.
            continue
        if axis == "head_dim" and variant.coupled:
            work.frozen[axis] = "it is embed over heads"
            continue
        prove_axis(work, axis)
    for axis in NEVER:
        if axis in fields_of(variant):
            work.frozen[axis] = NEVER[axis]
    while work.maps:
        widen_with_heads(work)
        together = work.attempt(
            "together", lambda: measure_gap(work.family(), variant, work.maps), float("inf")
        )
        work.gaps["together"] = together
        if together < BOUND:
            work.gaps["gradients"] = work.attempt(
                "gradients",
                lambda: gradient_gap(work.family(), variant, work.maps),
                float("inf"),
            )
            return
        axis = list(work.maps)[-1]
        del work.maps[axis]
        work.frozen[axis] = "not exact together with the other axes"


def widen_with_heads(work: Workings) -> None:
    """Where embed is heads x head_dim, make its map as long as all maps of heads together say."""
    variant = work.variant
    if not variant.coupled or "embed" not in work.maps:
        return
    family = work.family()
    sizes = proof.read_model(family, proof.source_of(variant)).sizes
    times = [
        len(work.maps[axis]) // sizes[axis] for axis in (family.heads, "group") if axis in work.maps
    ]
    work.maps["embed"] = even(sizes["embed"], math.prod(times))


def maps_of(work: Workings, axis: str, uniform: bool) -> dict[str, AxisMap]:
    """The maps that grow one axis; embed = heads x head_dim grows with its heads."""
    family, variant = work.family(), work.variant
    model = proof.read_model(family, proof.source_of(variant))
    grow = even if uniform else uneven
    if not variant.coupled or axis not in ("embed", family.heads, "group"):
        return {axis: even(model.sizes[axis]) if axis == "embed" else grow(model.sizes[axis])}
    heads = "group" if axis == "group" else family.heads
    return {"embed": tile(model.embed, 2 * model.embed), heads: grow(model.sizes[heads])}


def prove_axis(work: Workings, axis: str) -> None:
    """Grow one axis by copies, the rows cut in every way until one is exact; else freeze it."""
    gap = try_maps(work, axis, True)
    if gap > BOUND and searchable(work, axis):
        gap = search(work, axis)
    if gap < BOUND:
        uneven_gap = try_maps(work, axis, False)
        # Uneven shares may keep the function and not its training; then they are not offered.
        uniform = uneven_gap > BOUND or not follows_gradients(work, axis)
        work.gaps[axis] = gap if uniform else max(gap, uneven_gap)
        work.maps |= maps_of(work, axis, uniform)
        if uniform and axis != "embed":
            work.even_only.add(axis)
        return
    work.gaps[axis] = gap
    work.frozen[axis] = "copies of its units are another function"


def follows_gradients(work: Workings, axis: str) -> bool:
    """Whether uneven copies of an axis have the gradients that the rule of moments says."""
    maps = maps_of(work, axis, False)
    gap = work.attempt(
        f"gradients of {axis}",
        lambda: gradient_gap(work.family(), work.variant, maps),
        float("inf"),
    )
    return bool(gap < GRADIENTS)


def searchable(work: Workings, axis: str) -> bool:
    """Whether other cuts may help: growth was computed, and was another function."""
    return axis not in work.problems and not re.search(r"_dim$|kernel|state|conv", axis)


def try_maps(work: Workings, axis: str, uniform: bool) -> float:
    gap: float = work.attempt(
        axis,
        lambda: measure_gap(work.family(), work.variant, maps_of(work, axis, uniform)),
        float("inf"),
    )
    return gap


def search(work: Workings, axis: str) -> float:
    """Try other cuts of the rows along an axis, then scalars; keep what is exact: its gap."""
    before, scalars = dict(work.choice), dict(work.scalars)
    for choice in islice(choices(work, axis), TRIES):
        work.choice = before | choice
        gap = try_maps(work, axis, True)
        if gap < BOUND:
            return gap
    work.choice = before
    if axis in ("embed", "head", "kv"):
        for found in scalar_pairs(work):
            work.scalars = found
            gap = try_maps(work, axis, True)
            if gap < BOUND:
                return gap
    work.scalars = scalars
    return float("inf")


def choices(work: Workings, axis: str) -> Iterator[Choice]:
    """Other ways to cut the rows along an axis, fewest changes first."""
    options: dict[tuple[str, int], int] = {}
    for draft in work.variant.drafts:
        for place, cuts in enumerate(draft.cuts):
            if len(cuts) > 1 and any(re.search(rf"\b{axis}\b", cut) for cut in cuts):
                options[link(draft), place] = max(options.get((link(draft), place), 1), len(cuts))
    keys = list(options)
    for key in keys:
        for number in range(1, options[key]):
            yield {key: number}
    for numbers in product(*(range(options[key]) for key in keys)):
        if sum(number > 0 for number in numbers) > 1:
            yield dict(zip(keys, numbers, strict=True))


def scalar_pairs(work: Workings) -> Iterator[dict[str, str]]:
    """Factors that follow embed on the embedding, and on the head or what is before it."""
    variant = work.variant
    embedding = [d.name for d in variant.drafts if d.role == "embedding" and "vocab" in str(d.cuts)]
    final = [d.name for d in variant.drafts if d.final]
    head = [d.name for d in variant.drafts if d.role == "head"]
    for first, last in product(SCALARS, SCALARS):
        if not (first or last) or not embedding:
            continue
        found = {embedding[0]: first} if first else {}
        if head:
            found |= {head[0]: last} if last else {}
        elif last:
            found |= dict.fromkeys(final, last)
        yield work.scalars | found
