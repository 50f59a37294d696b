"""Axis maps compose, Gopher's layers are what they are, and the table's notation says what it
cannot read.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit.errors import GrowkitError
from growkit.growth.axes import AxisMap, make_map, replicate, tile
from growkit.growth.rule import MU, NU, VALUE, gather, multiply
from growkit.growth.shares import share_scale
from growkit.models.gpt_neox import GPT_NEOX
from growkit.models.notation import Axis, parse_table
from growkit.models.table import Table

SHARES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])


@st.composite
def maps(draw, source):
    index = draw(st.lists(st.integers(0, source - 1), min_size=1, max_size=6))
    share = draw(st.lists(SHARES, min_size=len(index), max_size=len(index)))
    return make_map(index, source, share)


@st.composite
def chains(draw):
    chain = [draw(maps(draw(st.integers(1, 5))))]
    for _ in range(2):
        chain.append(draw(maps(len(chain[-1]))))
    return chain


def same(one: AxisMap, other: AxisMap) -> bool:
    pairs = ((one.index, other.index), (one.share, other.share))
    return one.source == other.source and all(np.array_equal(*pair) for pair in pairs)


@given(chains())
def test_composition_associates(chain):
    first, second, third = chain
    assert same(first.then(second).then(third), first.then(second.then(third)))


@given(chains(), st.sampled_from([VALUE, MU, NU]), st.sampled_from(["unit", "/unit"]))
def test_composition_is_one_after_the_other(chain, moment, axis):
    first, second, _ = chain
    (row,) = parse_table(f"weight {axis} normal matrix")
    array = np.random.default_rng(0).normal(size=first.source)

    def expand(array, axis_map):
        scale = share_scale(row.parts[0].axes, {"unit": axis_map}, moment)
        return multiply(gather(array, axis_map, 0), scale)

    assert np.array_equal(expand(array, first.then(second)), expand(expand(array, first), second))


def test_composition_the_other_way_round_differs():
    first, second = make_map([0, 0, 1], 2), make_map([2, 1, 0], 3)
    assert not np.array_equal(first.then(second).index, make_map([1, 0], 2).then(first).index)


@given(st.integers(1, 8), st.integers(1, 24))
def test_a_tile_preserves_sums_and_replication_repeats(source, more):
    tiled = tile(source, source + more)
    assert tiled.preserves_sums and tiled.copies.sum() == source + more
    layers = replicate(source, source + more)
    assert (
        (np.diff(layers.index) >= 0).all()
        and (layers.copies >= 1).all()
        and (layers.share == 1).all()
    )
    assert np.ptp(layers.copies) <= 1
    assert not layers.preserves_sums


def test_gophers_layers():
    wanted = "0,0,1,2,3,3,4,5,6,6,7,8,9,9,10,11,12,12,13,14,15,15,16,17"
    assert ",".join(map(str, replicate(18, 24).index)) == wanted
    nearest = np.round(np.arange(24) / 24 * 18).astype(int)
    assert ",".join(map(str, nearest)) != wanted and nearest.max() == 17
    assert replicate(18, 36).index.tolist() == [layer for layer in range(18) for _ in range(2)]


@pytest.mark.parametrize(
    "make,said",
    [
        (lambda: make_map([0, 1], 2, [1.0]), "2 indices but 1 shares"),
        (lambda: make_map([0, 2], 2), "0 to 2, source has 2"),
        (lambda: make_map([-1, 1], 2), "-1 to 1, source has 2"),
        (
            lambda: make_map([0, 1], 2).then(make_map([0, 2], 3)),
            "makes 2 units, the second takes 3",
        ),
    ],
)
def test_maps_that_are_none(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_the_notation():
    row = parse_table(
        "\n# a comment\nnet.{/layer}.dense.weight  embed (/head head_dim)  normal matrix tied\n"
    )[0]
    assert row.name == "net.{layer}.dense.weight" and row.name_at((7,)) == "net.7.dense.weight"
    (part,) = row.parts
    assert part.dimensions == ((Axis("embed"),), (Axis("head", True), Axis("head_dim")))
    assert (row.begins, row.role, row.conditions) == ("normal", "matrix", ("tied",))
    assert row.stacked == (Axis("layer", True),) and row.writes_stream
    sizes = {"embed": 6, "head": 2, "head_dim": 3}
    assert row.shape(sizes) == (6, 6) and part.unfused(sizes) == (6, 2, 3)
    assert row.match("net.12.dense.weight") == (12,)
    assert [row.match(f"net.{layer}.dense.weight") for layer in ("x", "01", "-1", "")] == [None] * 4


@pytest.mark.parametrize(
    "line",
    [
        "weight",
        "weight normal",
        "weight embed",
        "weight embed norml matrix",
        "weight embed normal",
        "weight embed normal no",
        "weight embed normal matrix(embed)",
        "weight embed ones norm(mlp)",
        "weight (a | b) (c | d) normal matrix",
        "weight (a | b) /c normal qkv",
        "weight (a | ) normal matrix",
        "weight two+ones norm",
    ],
)
def test_a_line_that_is_none_is_quoted(line):
    with pytest.raises(ValueError, match=re.escape(f"got {line!r}")):
        parse_table(line)


def shapes():
    return {name: row.shape(SMALL.sizes) for name, row, _ in SMALL.table.names(SMALL.sizes)}


def test_cover_accepts_the_model_itself():
    SMALL.table.check_covered(shapes(), SMALL.sizes, SMALL.fields)


LAYERS = "gpt_neox.layers"


def without(part: str):
    """A change of shapes: those whose names hold `part` are gone."""
    return lambda found: {name: shape for name, shape in found.items() if part not in name}


@pytest.mark.parametrize(
    "change,said",
    [
        (
            lambda found: found | {f"{LAYERS}.0.attention.densee.weight": (32, 32)},
            [
                "layers.0.attention.densee.weight'",
                "nearest row is gpt_neox.layers.{layer}.attention.dense.weight",
            ],
        ),
        (
            lambda found: found | {"zzz": (1,)},
            ["no row of the axis table covers the parameter 'zzz'"],
        ),
        (
            lambda found: found | {f"{LAYERS}.3.mlp.dense_4h_to_h.bias": (32,)},
            [
                f"'{LAYERS}.3.mlp.dense_4h_to_h.bias'",
                "num_hidden_layers = 3",
                "last layer is 2",
            ],
        ),
        (without("embed_in"), ["'gpt_neox.embed_in.weight' is missing"]),
        (without(".2."), [f"'{LAYERS}.2.", "is missing", "num_hidden_layers = 3"]),
        (
            lambda found: found | {f"{LAYERS}.1.mlp.dense_h_to_4h.weight": (65, 32)},
            [
                f"'{LAYERS}.1.mlp.dense_h_to_4h.weight'",
                "[65, 32]",
                "[64, 32]",
                "intermediate_size = 64",
            ],
        ),
    ],
)
def test_cover_names_what_does_not_fit(change, said):
    with pytest.raises(GrowkitError) as refusal:
        SMALL.table.check_covered(change(shapes()), SMALL.sizes, SMALL.fields)
    assert all(words in str(refusal.value) for words in said), refusal.value


@settings(max_examples=20)
@given(st.booleans(), st.integers(1, 3))
def test_every_name_matches_its_row_and_no_other(tied, layer):
    model = SMALL.change(tied=tied, layer=layer)
    for name, row, place in model.table.names(model.sizes):
        found, number = model.table.match(name)
        assert found is row and number == place
        assert sum(other.match(name) is not None for other in model.table.rows) == 1


@pytest.mark.parametrize(
    "layer,tied_millions,untied_millions", [(18, 587, 664), (24, 757, 834), (36, 1097, 1174)]
)
def test_published_sizes(layer, tied_millions, untied_millions):
    for tied, millions in ((True, tied_millions), (False, untied_millions)):
        model = GPT_NEOX.model(layer=layer, embed=1536, head=12, mlp=6144, vocab=50304, tied=tied)
        # By hand: 12 embed^2 + 13 embed a layer, the embedding once or twice, the final norm.
        by_hand = layer * (12 * 1536**2 + 13 * 1536) + 50304 * 1536 * (1 if tied else 2) + 2 * 1536
        assert model.parameters == by_hand and by_hand // 10**6 == millions
        assert by_hand == sum(
            np.prod(row.shape(model.sizes)) for _, row, _ in model.table.names(model.sizes)
        )


def test_rows_of_one_model_differ():
    names = [row.name for row in SMALL.table.rows]
    assert len(names) == len(set(names)) and isinstance(SMALL.table, Table)
