"""The theorems of growth, in float64 on the trainer's own model: what preserves the function, and
what its gradient is.

Every theorem has its mutations: a table or a map that is wrong in one place must be found out.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import random_tensors
from in_memory import break_table, held, loss_and_gradient, made

from growkit.checkpoint.tensor import Source
from growkit.errors import UsageError
from growkit.growth.axes import make_map, replicate, tile
from growkit.growth.depth import plan_depth
from growkit.growth.plan import build_plan
from growkit.growth.rule import MU, NU, VALUE, grow_array
from growkit.models import gpt_neox as neox
from growkit.models.architecture import Architecture
from growkit.models.gpt_neox import GPT_NEOX
from growkit.models.notation import parse_table
from growkit.models.table import Table
from growkit.surgery import grow as surgery

SMALL = GPT_NEOX.model(
    layer=2, embed=16, head=2, mlp=12, vocab=40, context=16, rotary_pct=0.5, tied=True
)
VARIANTS = [(parallel, tied) for parallel in (True, False) for tied in (True, False)]
WIDTH = {
    "embed": tile(16, 32),
    "head": make_map([0, 0, 1, 0], 2, [0.5, 0.3, 1.0, 0.2]),
    "mlp": make_map(
        [*range(12), 3, 3, 7, 0],
        12,
        [0.5, 1, 1, 0.25, 1, 1, 1, 0.9, 1, 1, 1, 1, 0.25, 0.5, 0.1, 0.5],
    ),
}
IDENTITY = {"layer": make_map([0, 0, 1], 2, [1.0, 0.0, 1.0])}


def grow(source: Source, maps, moments: str = "map") -> Source:
    """What surgery makes of a source, in memory again."""
    plan = build_plan("test", "test", source.model, maps, moments=moments)
    contents = surgery.prepare_growth(source, plan)
    slots = {
        slot: {name: made(recipe) for name, recipe in recipes.items()}
        for slot, recipes in contents.recipes.items()
    }
    return held(plan.grown, **slots)


def measured(source: Source) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and the gradient by name in files."""
    with jax.enable_x64(True):
        (_, logits), gradient = loss_and_gradient(source.model)(source.stack())
    found = {}
    for name, row, position in source.model.table.names(source.model.sizes):
        leaf = gradient
        for key in row.path:
            leaf = leaf[key]
        found[name] = np.asarray(leaf[position])
        assert found[name].dtype == np.float64
    return np.asarray(logits), found


def small(parallel: bool = True, tied: bool = True, **change) -> Source:
    model = SMALL.change(parallel_residual=parallel, tied=tied, **change)
    return held(model, params=random_tensors(model, "float64"))


def with_gradient(source: Source) -> tuple[np.ndarray, Source]:
    """Its logits, and the source with its gradient as mu and the gradient's square as nu."""
    logits, gradient = measured(source)
    params = {name: tensor.read() for name, tensor in source.tensors["params"].items()}
    squares = {name: np.square(array) for name, array in gradient.items()}
    return logits, held(source.model, params=params, mu=gradient, nu=squares)


def gap(ours: dict[str, np.ndarray], theirs: Source, slot: str, layers=None) -> float:
    """The largest relative difference to a slot, over all parameters or those of some layers and of
    none.
    """
    gaps = []
    for name, row, position in theirs.model.table.names(theirs.model.sizes):
        if layers is None or not row.stacked or position[0] in layers:
            wanted = theirs.tensors[slot][name].read()
            gaps.append(np.abs(ours[name] - wanted).max() / max(np.abs(wanted).max(), 1e-3))
    return max(gaps)


@pytest.mark.parametrize("parallel,tied", VARIANTS)
def test_a_clone_is_the_same_function_with_the_grown_gradient(parallel, tied):
    logits, source = with_gradient(small(parallel, tied))
    grown = grow(source, WIDTH | IDENTITY)
    assert grown.model.sizes | {"vocab": 0} == {
        "layer": 3, "embed": 32, "head": 4, "mlp": 16, "head_dim": 8, "qkv": 3, "vocab": 0
    }  # fmt: skip
    ours, gradient = measured(grown)
    assert np.abs(logits).max() > 1
    assert np.abs(ours - logits).max() < 1e-12
    old = (0, 2)
    assert gap(gradient, grown, "mu", old) < 1e-11
    assert (
        gap({name: np.square(array) for name, array in gradient.items()}, grown, "nu", old) < 1e-11
    )
    # The identity block has no old gradient to take over: the rule is not meant for it.
    assert gap(gradient, grown, "mu") > 1e-3


@pytest.mark.parametrize(
    "maps", [{"mlp": WIDTH["mlp"]}, IDENTITY, {axis: WIDTH[axis] for axis in ("embed", "head")}]
)
def test_each_map_alone_preserves_the_function(maps):
    logits, source = with_gradient(small())
    grown = grow(source, maps)
    ours, gradient = measured(grown)
    assert np.abs(ours - logits).max() < 1e-12
    assert gap(gradient, grown, "mu", (0, 2) if maps is IDENTITY else None) < 1e-11


# A place of the table, what it wrongly says, and for which models that can be seen.
WRONG_ROWS = {
    "heads outermost": ("(head qkv head_dim)", "(qkv head head_dim)", True),
    "qkv does not read embed": ("(head qkv head_dim) /embed", "(head qkv head_dim) embed", True),
    "dense does not read head": ("(/head /head_dim)", "(head /head_dim)", True),
    "dense reads head_dim's place": ("(/head /head_dim)", "(/head_dim /head)", True),
    "mlp does not read embed": ("mlp /embed", "mlp embed", True),
    "mlp is not read": ("embed /mlp", "embed mlp", True),
    "dense bias reads no layer": (
        "{/layer}.attention.dense.bias ",
        "{layer}.attention.dense.bias ",
        True,
    ),
    "mlp bias reads no layer": (
        "{/layer}.mlp.dense_4h_to_h.bias ",
        "{layer}.mlp.dense_4h_to_h.bias ",
        True,
    ),
    "dense reads no layer": (
        "{/layer}.attention.dense.weight ",
        "{layer}.attention.dense.weight ",
        True,
    ),
    "mlp reads no layer": (
        "{/layer}.mlp.dense_4h_to_h.weight ",
        "{layer}.mlp.dense_4h_to_h.weight ",
        True,
    ),
    "tied norm does not read embed": (
        "/embed                       ones ",
        "embed                        ones ",
        True,
    ),
    "tied norm bias does not read embed": (
        "/embed                       zeros ",
        "embed                        zeros ",
        True,
    ),
    "untied head does not read embed": ("vocab /embed", "vocab embed", False),
    "embedding read": ("vocab embed ", "vocab /embed ", True),
}


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_a_wrong_row_is_another_function(wrong, monkeypatch):
    right, left, tied = WRONG_ROWS[wrong]
    assert right in neox.TABLE
    logits, source = with_gradient(small(tied=tied))
    break_table(monkeypatch, neox.TABLE.replace(right, left))
    ours, _ = measured(grow(source, WIDTH | IDENTITY))
    assert np.abs(ours - logits).max() > 1e-3


def exchanged(row):
    """A row that reads where it should write."""

    def exchange(axes):
        return tuple(replace(axis, read=not axis.read) for axis in axes)

    blocks = tuple(tuple(exchange(term) for term in terms) for terms in row.blocks)
    return replace(row, blocks=blocks)


def test_reads_and_writes_exchanged_is_another_function_and_gradient(monkeypatch):
    logits, source = with_gradient(small())
    rows = tuple(exchanged(row) for row in source.model.table.rows)
    monkeypatch.setattr(Architecture, "table", property(lambda self: Table(rows)))
    grown = grow(source, WIDTH | IDENTITY)
    ours, gradient = measured(grown)
    assert np.abs(ours - logits).max() > 1e-3
    assert gap(gradient, grown, "mu", (0, 2)) > 1e-2


@pytest.mark.parametrize("slot,moment", [("mu", VALUE), ("mu", NU), ("nu", VALUE), ("nu", MU)])
def test_a_moment_by_another_rule_is_not_the_gradients(slot, moment, monkeypatch):
    _, source = with_gradient(small())
    monkeypatch.setitem(surgery.SLOT_MOMENTS, slot, moment)
    grown = grow(source, WIDTH | IDENTITY)
    _, gradient = measured(grown)
    measure = {
        name: np.square(array) if slot == "nu" else array for name, array in gradient.items()
    }
    assert gap(measure, grown, slot, (0, 2)) > 1e-2


def test_uneven_shares_of_embed_keep_the_function_but_not_the_gradient():
    logits, source = with_gradient(small())
    uneven = make_map(tile(16, 32).index, 16, [0.3] * 16 + [0.7] * 16)
    grown = grow(source, WIDTH | IDENTITY | {"embed": uneven})
    ours, gradient = measured(grown)
    assert np.abs(ours - logits).max() < 1e-12
    assert gap(gradient, grown, "mu", (0, 2)) > 1e-2


UNEQUAL = np.where(np.arange(32) == 31, 0, WIDTH["embed"].index)
WRONG_MAPS = {
    "embed unequal": {"embed": make_map(UNEQUAL, 16, 1 / np.bincount(UNEQUAL)[UNEQUAL])},
    "a head over one": {"head": make_map([0, 0, 1, 0], 2, [0.5, 0.5, 1.0, 0.5])},
    "mlp copied": {"mlp": make_map(WIDTH["mlp"].index, 12)},
    "layers halved": {"layer": make_map([0, 0, 1], 2, [0.5, 0.5, 1.0])},
    "layers out of order": {"layer": make_map([1, 0, 1], 2, [1.0, 1.0, 0.0])},
    "layers copied": {"layer": replicate(2, 3)},
    "head_dim": {"head": make_map([0, 1], 2), "head_dim": tile(8, 16)},
}


@pytest.mark.parametrize("wrong", WRONG_MAPS)
def test_maps_that_do_not_preserve(wrong):
    logits, source = with_gradient(small())
    maps = WIDTH | IDENTITY | WRONG_MAPS[wrong]
    assert not build_plan("test", "test", source.model, maps).preserved
    ours, _ = measured(grow(source, maps))
    assert np.abs(ours - logits).max() > 1e-3


def test_copies_of_the_vocabulary_are_not_exact():
    """Each probability is shared between the copies."""
    plan = build_plan("test", "test", SMALL, {"vocab": tile(40, 80)})
    assert plan.maps["vocab"].preserves_sums and not plan.preserved


def test_width_then_depth_is_depth_then_width_is_both_at_once():
    model = SMALL.change(tied=False)
    slots = {
        slot: random_tensors(model, "float64", seed)
        for seed, slot in enumerate(("params", "mu", "nu"))
    }
    source = held(model, **slots)
    both = grow(source, WIDTH | IDENTITY)
    for other in (grow(grow(source, WIDTH), IDENTITY), grow(grow(source, IDENTITY), WIDTH)):
        for slot in slots:
            for name, tensor in both.tensors[slot].items():
                assert np.array_equal(tensor.read(), other.tensors[slot][name].read()), (slot, name)


def test_composed_maps_are_one_growth_after_the_other():
    source = held(SMALL, params=random_tensors(SMALL, "float64"))
    again = {"mlp": make_map([0, 15, 15, 3, 3, 7, *range(16)], 16), "layer": replicate(3, 4)}
    first = WIDTH | IDENTITY
    composed = {
        axis: first[axis].then(again[axis]) if axis in again else first[axis] for axis in first
    }
    one, two = grow(source, composed), grow(grow(source, first), again)
    assert one.model == two.model
    for name, tensor in one.tensors["params"].items():
        assert np.array_equal(tensor.read(), two.tensors["params"][name].read()), name


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_jax_arrays_grow_as_numpy_arrays_do(dtype):
    arrays = random_tensors(SMALL, dtype)
    plan = build_plan("test", "test", SMALL, WIDTH | IDENTITY)
    with jax.enable_x64(True):
        for name, row, position in SMALL.table.names(SMALL.sizes):
            for moment in (VALUE, MU, NU):
                array = arrays[name]
                ours = grow_array(array, row, plan, moment, position)
                theirs = grow_array(jnp.asarray(array), row, plan, moment, position, jnp)
                assert isinstance(theirs, jax.Array)
                assert ours.dtype == theirs.dtype == array.dtype
                assert np.array_equal(ours, np.asarray(theirs)), (name, moment)


def test_bfloat16_is_multiplied_wide_and_rounded_once():
    (row,) = parse_table("weight /mlp normal matrix")

    def grown(number: float, *share: float) -> np.ndarray:
        axis_map = make_map([0] * len(share), 1, share)
        plan = build_plan("test", "test", SMALL.change(mlp=1), {"mlp": axis_map})
        return grow_array(np.array([number], ml_dtypes.bfloat16), row, plan)

    thirds = grown(1.5, *[1 / 3] * 3)
    assert thirds.dtype == ml_dtypes.bfloat16 and (thirds == 0.5).all()
    narrow = 1.0078125
    assert grown(narrow, 0.7) == np.float32(narrow * 0.7).astype(ml_dtypes.bfloat16)
    both_narrow = np.array(narrow, ml_dtypes.bfloat16) * np.array(0.7, ml_dtypes.bfloat16)
    assert grown(narrow, 0.7) != both_narrow


def test_a_row_that_is_stacked_must_know_its_layer():
    row = next(row for row in SMALL.table.rows if row.name.endswith("dense.bias"))
    plan = build_plan("test", "test", SMALL, IDENTITY)
    with pytest.raises(ValueError, match="dense.bias is stacked by layer: which new unit"):
        grow_array(np.zeros(16), row, plan)


def test_gopher_growth_copies_layers_and_second_moments():
    model = SMALL.change(layer=4)
    slots = {
        slot: random_tensors(model, "float32", seed)
        for seed, slot in enumerate(("params", "mu", "nu"))
    }
    plan = plan_depth(model, "4:6")
    assert (plan.maps["layer"].index.tolist(), plan.preserved, plan.moments) == (
        [0, 0, 1, 2, 2, 3],
        False,
        "map",
    )
    contents = surgery.prepare_growth(held(model, **slots), plan)
    assert (
        contents.lineage[-1]["function"] == "not preserved"
        and contents.config["num_hidden_layers"] == 6
    )
    for name, row, position in plan.grown.table.names(plan.grown.sizes):
        origin = row.name_at(tuple([0, 0, 1, 2, 2, 3][layer] for layer in position))
        for slot in ("params", "nu"):
            assert np.array_equal(made(contents.recipes[slot][name]), slots[slot][origin])
        assert not made(contents.recipes["mu"][name]).any()


GOOD = {
    "12:16": [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11],
    " 12 : 13 ": [0, 0, *range(1, 12)],
    "12:24": [layer for layer in range(12) for _ in range(2)],
    "0-7,4-11": [*range(8), *range(4, 12)],
    "0,0,1-11": [0, *range(12)],
    "0-11, 11": [*range(12), 11],
    "0-11": [*range(12)],
    "12:4096": [layer * 12 // 4096 for layer in range(4096)],
}


@pytest.mark.parametrize("text", GOOD)
def test_depth_maps_that_are_good(text):
    plan = plan_depth(GPT_NEOX.model(layer=12, embed=16, head=2, mlp=8), text)
    assert plan.maps["layer"].index.tolist() == GOOD[text]
    assert plan.grown.layer == len(GOOD[text]) and (plan.maps["layer"].share == 1).all()
    assert plan.preserved == (text == "0-11")


BAD = {
    "18:24": ["18:24", "a model of 18 layers", "the source has 12", "nearest is --map 12:16"],
    "6:12": ["6:12", "the source has 12", "--map 12:24"],
    "18:19": ["the source has 12", "--map 12:13"],
    "18:99999999": ["the source has 12", "--map 12:4096"],
    "16:12": ["goes from 16 layers to 12", "only adds layers", "did you mean 12:16?"],
    "24:18": ["goes from 24 layers to 18", "only adds layers", "try 12:13"],
    "12:12": ["goes from 12 layers to 12", "only adds layers", "try 12:13"],
    "12:-3": ["goes from 12 layers to -3", "only adds layers"],
    "-3:5": ["-3:5", "the source has 12"],
    "0:5": ["0:5", "the source has 12"],
    "12:4097": ["12:4097", "at most 4096"],
    "12:1000000000000": ["12:1000000000000", "at most 4096"],
    "12:" + "9" * 5000: ["SOURCE:TARGET"],
    "18": ["SOURCE:TARGET", "got '18'"],
    "a:b": ["SOURCE:TARGET", "got 'a:b'"],
    "12:": ["SOURCE:TARGET", "got '12:'"],
    ":16": ["SOURCE:TARGET", "got ':16'"],
    "": ["SOURCE:TARGET", "got ''"],
    "1.5:3": ["SOURCE:TARGET"],
    "12:16:24": ["SOURCE:TARGET"],
    "0,,1": ["SOURCE:TARGET", "got '0,,1'"],
    "0,-1,2": ["SOURCE:TARGET"],
    "0-": ["SOURCE:TARGET"],
    "0-12": ["names layer 12", "0 to 11"],
    "0-11,40": ["names layer 40", "0 to 11"],
    "11-0": ["counts up", "'11-0'", "write 0-11"],
    "0,1,2": ["lists 3", "the source has 12", "0-11"],
    ",".join(["0-11"] * 342): ["4104 layers", "at most 4096"],
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:20])
def test_depth_maps_that_are_refused(text):
    with pytest.raises(UsageError) as refusal:
        plan_depth(GPT_NEOX.model(layer=12, embed=16, head=2, mlp=8), text)
    assert all(words in str(refusal.value) for words in BAD[text]), refusal.value
    assert "\n" not in str(refusal.value)
