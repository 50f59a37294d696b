"""Options of the configuration: which of them matter, what each does to the rows, which the table
is proved for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from growkit.derive import proof
from growkit.derive.network import UnprovableError, load, make_config, run
from growkit.derive.sizes import shapes_of
from growkit.derive.stream import TOKENS
from growkit.derive.variant import Variant

# Options that say how a model is run, trained or saved, and not what it computes.
NO_OPTIONS = re.compile(
    r"use_cache|output_.*|return_dict|is_encoder_decoder|add_cross_attention|is_decoder|torchscript"
    r"|tie_encoder_decoder|use_bfloat16|.*router_logits|use_mambapy|use_mamba_kernels"
    r"|cross_attention.*|problem_type|_.*|gradient_checkpointing|is_training|.*_unpadded|.*flash.*"
)
Entity = tuple[str, str]


@dataclass
class Sample:
    """The rows that a table needs for some values of its options: (name, rest) of each."""

    values: dict[str, bool]
    rows: list[Entity]


def find_options(variant: Variant) -> tuple[list[str], list[str]]:
    """The options that change which parameters there are; those that change the function alone."""
    layout, function = [], []
    for name, value in variant.probe.stated.items():
        if not isinstance(value, bool) or NO_OPTIONS.fullmatch(name):
            continue
        fields = variant.probe.fields | {name: not value}
        shapes = shapes_of(variant.kind, fields)
        if shapes is None:
            continue
        if shapes != variant.probe.base:
            layout.append(name)
        elif computes_otherwise(variant, fields):
            function.append(name)
    return layout, function


def computes_otherwise(variant: Variant, fields: Mapping[str, Any]) -> bool:
    """Whether the same parameters give other logits with other fields."""
    try:
        logits = run(load(make_config(variant.kind, fields), variant.state), TOKENS)
    except Exception:
        return True
    return proof.gap(logits, proof.source_logits(variant)) > 1e-12


def condition(entity: Entity, samples: list[Sample]) -> tuple[str, ...] | None:
    """The fewest options that say when a row is there; None where no conjunction of them does."""
    there = [entity in sample.rows for sample in samples]
    names = list(samples[0].values)
    literals = [(name, value) for name in names for value in (True, False)]
    fit = [
        (name, value)
        for name, value in literals
        if all(
            s.values[name] == value for s, present in zip(samples, there, strict=True) if present
        )
    ]
    for chosen in subsets(fit):
        says = [all(s.values[name] == value for name, value in chosen) for s in samples]
        if says == there:
            return tuple(write_literal(name, value) for name, value in chosen)
    return None


def subsets(literals: list[tuple[str, bool]]) -> Iterator[tuple[tuple[str, bool], ...]]:
    """All subsets of at most three literals, small ones first."""
    for size in range(4):
        yield from combinations(literals, size)


def write_literal(name: str, value: bool) -> str:
    """A condition word: `tied`, `untied`, `!bias`."""
    if name == "tie_word_embeddings":
        return "tied" if value else "untied"
    return name if value else f"!{name}"


def merge(samples: list[Sample]) -> str:
    """One table for all samples.

    Raises UnprovableError where the options do not say when a row is there.
    """
    order: dict[Entity, None] = {}
    for sample in samples:
        place = list(order)
        for row in sample.rows:
            if row not in order:
                place.append(row)
        order = dict.fromkeys(place)
    lines = []
    for entity in sort_like(list(order), samples):
        when = condition(entity, samples)
        if when is None:
            raise UnprovableError(f"no options say when {entity[0]} is there")
        lines.append(" ".join([*entity, *when]))
    return "\n".join(lines)


def sort_like(rows: list[Entity], samples: list[Sample]) -> list[Entity]:
    """Rows in the order of a sample that has most of them; others after the row they follow in
    theirs.
    """
    ordered = list(max(samples, key=lambda sample: len(sample.rows)).rows)
    for sample in samples:
        for place, row in enumerate(sample.rows):
            if row not in ordered:
                before = sample.rows[place - 1] if place else None
                ordered.insert(ordered.index(before) + 1 if before in ordered else 0, row)
    return [row for row in ordered if row in rows]
