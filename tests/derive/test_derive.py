"""Tables derived from transformers' classes: as by hand where there are both, as shipped, and
mistakes are noticed.
"""

from __future__ import annotations

import re
from functools import cache

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from mistakes import plant_mistakes

from growkit.derive import proof
from growkit.derive.derive import derive, pad_gap
from growkit.derive.lists import read_numbers
from growkit.derive.sizes import make_probe
from growkit.derive.tiny import tiny_fields
from growkit.derive.variant import read_variant
from growkit.derive.workings import Workings, maps_of
from growkit.models import FAMILIES
from growkit.models.table_file import write_family
from growkit.models.tables import list_shipped, read_shipped, read_text

torch.set_num_threads(1)
SLOW = pytest.mark.slow
SAMPLE = ["gemma2", *(pytest.param(kind, marks=SLOW) for kind in ("gpt2", "phi3", "mixtral"))]
NOTICED = 1e-6


@cache
def derive_once(kind):
    return derive(kind)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_a_derived_table_is_the_one_by_hand(kind):
    family, by_hand = derive_once(kind).family, FAMILIES[kind]
    derived = {(row.name, row.conditions): row for row in family.rows}
    expected = {(row.name, row.conditions): row for row in by_hand.rows}
    assert derived.keys() == expected.keys()
    for key, row in derived.items():
        for fact in ("blocks", "begins", "role", "offset", "averages", "stacked", "kind"):
            assert getattr(row, fact) == getattr(expected[key], fact), (key, fact)
    assert family.fields == by_hand.fields
    assert {
        name: family.defaults[name] for name in family.fields.values() if name in family.defaults
    } == {
        name: by_hand.defaults[name] for name in by_hand.fields.values() if name in by_hand.defaults
    }


def check_as_shipped(kind):
    derivation = derive_once(kind)
    text = write_family(derivation.family, {}, "")
    shipped = read_text(kind)
    for section in ("fields", "options", "defaults", "scalars", "proved", "table"):
        assert cut_section(text, section) == cut_section(shipped, section), section
    expected = read_shipped(kind)
    assert derivation.family.frozen.keys() == expected.frozen.keys()
    for fact in ("by_layer", "numbers", "other_lists", "leading", "stated", "patterns"):
        assert getattr(derivation.family, fact) == getattr(expected, fact), fact


def cut_section(text: str, section: str) -> str:
    found = re.search(rf"^\[{section}\]\n(.*?)(?=^\[|\Z)", text, re.S | re.M)
    return found[1].strip() if found else ""


@pytest.mark.parametrize("kind", ["bamba", "lfm2", "qwen2_moe", "llama"])
def test_numbers_of_layers_are_found_by_trying(kind):
    """attn_layer_indices, full_attn_idxs, mlp_only_layers, none: no name says so to growkit."""
    family = FAMILIES.get(kind) or read_shipped(kind)
    assert read_numbers(make_probe(kind, tiny_fields(kind))) == family.numbers


@pytest.mark.slow
@pytest.mark.parametrize("kind", list_shipped())
def test_every_table_is_derived_as_shipped(kind):
    check_as_shipped(kind)


def largest_gap(family, variant):
    """The largest gap of growth along the axes that are not frozen, each alone and all together.

    Alone, because axes of one size with one map can be taken for each other.
    """
    alone = []
    for axis in family.fields:
        if axis in ("layer", "embed") or axis in family.frozen:
            continue
        alone.append(maps_of(Workings(variant), axis, axis in family.uniform))
    if not family.coupled:
        alone.append(maps_of(Workings(variant), "embed", True))
    together = {axis: axis_map for maps in alone for axis, axis_map in maps.items()}
    growths = [together, {"layer": proof.identity_map(variant.names.layers)}, *alone]
    try:
        gaps = [proof.measure_gap(family, variant, growth) for growth in growths]
    except Exception:
        return float("inf")
    return max(*gaps, pad_gap(family, variant))


@pytest.mark.parametrize("kind", SAMPLE)
def test_planted_mistakes_are_noticed(kind):
    family = derive_once(kind).family
    variant = read_variant(kind, tiny_fields(kind))
    assert largest_gap(family, variant) < proof.BOUND
    wanted = {row.name for row in proof.read_model(family, proof.source_of(variant)).table.rows}
    missed = []
    for what, wrong in plant_mistakes(family):
        name = re.sub(r"\{/(\w+)", r"{\1", what.split(": ")[1])
        row = re.sub(r":\w+\}", "}", name)
        if row in wanted and largest_gap(wrong, variant) < NOTICED:
            missed.append(what)
    # Rows of a tied head that the untied tiny model does not have are not mistakes in it.
    assert not [what for what in missed if not is_other_variant(what, family, variant)]


def is_other_variant(what, family, variant):
    """Whether two rows have the name, of which the tiny model has the other."""
    name = what.split(": ")[1]
    return family.text.count(f"{name} ") > 1
