"""Every operator of growth in float64: which keep the function, what its gradient becomes, and that
order is nothing.

Each theorem has a sibling that breaks one thing and must fail. The figures in comments were
measured here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from conftest import random_tensors, save_directory, transformers_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory import break_table, held, loss_and_gradient

from convert.directory import convert_to_directory
from growkit.checkpoint.location import open_source, write_output
from growkit.entries import Growth
from growkit.growth import rule as engine
from growkit.growth.axes import make_map, tile
from growkit.growth.depth import plan_depth
from growkit.growth.padding import VALUE
from growkit.growth.plan import build_plan, combine_plans
from growkit.growth.tree import grow
from growkit.growth.width import plan_width
from growkit.models import gpt_neox as neox
from growkit.models.gpt_neox import GPT_NEOX
from growkit.surgery import grow as surgery
from trainer.config.sections import Precision
from trainer.model.decoder import Decoder

# The eps is large so that one that is not rescaled is seen.
BASE = GPT_NEOX.model(
    layer=2, embed=16, head=2, mlp=12, vocab=40, context=16, rotary_pct=0.5, tied=True, norm_eps=0.1
)  # fmt: skip
TOKENS = np.random.default_rng(1).integers(0, BASE.vocab, (2, 9))
# The arguments of `growkit.growth.padding.rule_along`.
ARGUMENTS = ("axis", "row", "role", "moment", "growth", "norm")
RESIDUAL_AND_TYING = [(True, True), (True, False), (False, True), (False, False)]
ROTARY = (0.25, 0.5, 1.0)


def everything(model):
    plans = [
        plan_depth(model, "2:4", "identity"),
        plan_width(model, heads="5", head_dim="10", mlp="17", spread=0.3),
    ]
    return replace(combine_plans("grow", plans, model), noise=0.5)


def cloned_deeper(model):
    return combine_plans(
        "grow", [plan_width(model, embed="2x"), plan_depth(model, "2:3", "identity")], model
    )


EXACT = {
    "clone 2x": lambda model: plan_width(model, embed="2x"),
    "clone 3x": lambda model: plan_width(model, embed="3x"),
    "uneven heads": lambda model: plan_width(model, heads=3),
    "uneven mlp": lambda model: plan_width(model, mlp=19),
    "spread shares": lambda model: plan_width(model, embed="2x", mlp=31, spread=0.6),
    "mean-pad 24": lambda model: plan_width(model, embed=24, method="pad"),
    "mean-pad 40": lambda model: plan_width(model, embed=40, mlp="1x"),
    "mean-pad 32": lambda model: plan_width(model, embed="2x", method="pad"),
    "head_dim 10": lambda model: plan_width(model, head_dim=10),
    "head_dim 20": lambda model: plan_width(model, head_dim=20),
    "identity": lambda model: plan_depth(model, "2:5", "identity"),
    "clone and identity": cloned_deeper,
    "everything": everything,
    "noise": lambda model: replace(plan_width(model, embed="3x", mlp=31, spread=0.5), noise=0.9),
}
INEXACT = {
    "replicate": lambda model: plan_depth(model, "2:3"),
    "nearest": lambda model: plan_depth(model, "2:3", "nearest"),
    "stack": lambda model: plan_depth(model, "2:4", "stack"),
    "list": lambda model: plan_depth(model, "0-1,1"),
}


@cache
def logits_function(model):
    network = Decoder(model, Precision("float64", "float64"))
    # Models this small compile longer than they run.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(
        lambda params: network.apply({"params": params}, TOKENS), compiler_options=options
    )


def logits(model, params):
    with jax.enable_x64(True):
        return np.asarray(logits_function(model)(params))


@cache
def small(parallel=True, tied=True, rotary_pct=0.5):
    """A model, its parameter tree and its logits."""
    model = BASE.change(parallel_residual=parallel, tied=tied, rotary_pct=rotary_pct)
    params = held(model, params=random_tensors(model, "float64")).stack()
    return model, params, logits(model, params)


def change(plan, params, expected):
    """How far the grown model's logits are from the source's."""
    assert np.abs(expected).max() > 1
    return np.abs(logits(plan.grown, grow(params, plan)) - expected).max()


def assert_exact(name, parallel, tied, rotary_pct):
    model, params, expected = small(parallel, tied, rotary_pct)
    plan = EXACT[name](model)
    assert plan.preserved and plan.grown.rotary == model.rotary
    assert change(plan, params, expected) < 1e-12


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", EXACT)
def test_exact_growth_keeps_the_function(name, tied):
    # Residual and rotary share alternate; every operator on every model is the slow test.
    place = list(EXACT).index(name)
    assert_exact(name, tied == bool(place % 2), tied, ROTARY[(place + tied) % 3])


@pytest.mark.slow
@pytest.mark.parametrize("rotary_pct", ROTARY)
@pytest.mark.parametrize("parallel,tied", RESIDUAL_AND_TYING)
@pytest.mark.parametrize("name", EXACT)
def test_exact_growth_keeps_the_function_of_every_model(name, parallel, tied, rotary_pct):
    assert_exact(name, parallel, tied, rotary_pct)


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_growth_says_so(name):
    model, params, expected = small()
    plan = INEXACT[name](model)
    assert not plan.preserved and Growth.of(plan).function == "not preserved"
    assert change(plan, params, expected) > 1e-2


def wrong_share(patch, plan):
    share = plan.maps["mlp"].share * np.linspace(1.0, 1.01, len(plan.maps["mlp"]))
    return replace(
        plan, maps=plan.maps | {"mlp": make_map(plan.maps["mlp"].index, BASE.mlp, share)}
    )


def rule_changed(when, **what):
    """A mutation: the rule of padding is changed where `when` holds of its arguments, by name."""

    def mutate(patch, plan):
        right = engine.rule_along

        def wrong(*args):
            rule = right(*args)
            return (
                replace(rule, **what) if when(**dict(zip(ARGUMENTS, args, strict=True))) else rule
            )

        patch.setattr(engine, "rule_along", wrong)
        return plan

    return mutate


def along(axis, condition):
    """Whether a rule is one along the axis and the condition holds of its arguments."""
    return lambda **given: given["axis"].name == axis and condition(given)


def is_norm(given):
    """Whether a rule is of a norm's weight."""
    return given["row"].role == "norm"


def reads(given):
    """Whether a rule is of a parameter that reads the axis."""
    return given["axis"].read


def grown_otherwise(option):
    """A mutation: the grown model's configuration keeps an option of the source."""
    return lambda patch, plan: replace(
        plan, grown=plan.grown.change(**{option: getattr(plan.model, option)})
    )


def table_without(right, left):
    """A mutation: a line of the table says something else."""

    def mutate(patch, plan):
        assert right in neox.TABLE
        break_table(patch, neox.TABLE.replace(right, left))
        return plan

    return mutate


MUTATIONS = {
    "wrong share": ("uneven mlp", wrong_share),
    "norm weight not rescaled": ("mean-pad 24", rule_changed(along("embed", is_norm), scale=1.0)),
    "eps not rescaled": ("mean-pad 24", grown_otherwise("norm_eps")),
    "zeros under LayerNorm": (
        "mean-pad 24",
        rule_changed(along("embed", lambda given: not is_norm(given)), fill="zero"),
    ),
    "keys not zero": (
        "head_dim 10",
        rule_changed(along("head_dim", lambda given: given["role"] == "key"), fill="free"),
    ),
    "queries not scaled": (
        "head_dim 10",
        rule_changed(along("head_dim", lambda given: given["role"] == "query"), scale=1.0),
    ),
    "dense columns not zero": ("head_dim 10", rule_changed(along("head_dim", reads), fill="free")),
    "attention bias of the identity": (
        "identity",
        table_without("{/layer}.attention.dense.bias ", "{layer}.attention.dense.bias  "),
    ),
    "mlp bias of the identity": (
        "identity",
        table_without("{/layer}.mlp.dense_4h_to_h.bias ", "{layer}.mlp.dense_4h_to_h.bias  "),
    ),
    "rotary_pct not rewritten": ("head_dim 20", grown_otherwise("rotary_pct")),
    "tied norm not scaled": (
        "clone 2x",
        table_without("/embed                       ones ", "embed                        ones "),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_growth_with_one_thing_wrong_does_not(name, monkeypatch):
    operator, mutate = MUTATIONS[name]
    model, params, expected = small()
    plan = EXACT[operator](model)
    assert change(plan, params, expected) < 1e-12
    assert change(mutate(monkeypatch, plan), params, expected) > 1e-6


def test_noise_that_does_not_sum_to_zero_is_another_function(monkeypatch):
    model, params, expected = small()
    monkeypatch.setattr(
        "growkit.growth.axes.AxisMap.next_copy",
        property(lambda self: np.roll(np.arange(len(self)), 1)),
    )
    assert change(EXACT["noise"](model), params, expected) > 1e-6


def gradient(model, params):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, loss_and_gradient(model)(params)[1])


def moments(tree):
    return {"mu": tree, "nu": jax.tree.map(np.square, tree)}


def by_row(model, ours, theirs):
    """(row, our leaf, their leaf), unfused, layers first where the row has them."""
    for row in model.table.rows:
        pair = []
        for tree in (ours, theirs):
            for key in row.path:
                tree = tree[key]
            shape = row.stacked_sizes(model.sizes) + row.parts[0].unfused(model.sizes)
            pair.append(tree.reshape(shape))
        yield row, *pair


def relative(ours, theirs):
    return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-3)


@pytest.mark.parametrize(
    "name,parallel,tied",
    [("clone 2x", True, True), ("uneven mlp", True, False), ("spread shares", False, False)],
)
def test_the_gradient_of_a_clone_is_the_grown_gradient(name, parallel, tied):
    model, params, _ = small(parallel, tied)
    plan = EXACT[name](model)
    found = moments(gradient(plan.grown, grow(params, plan)))
    expected = grow(moments(gradient(model, params)), plan)
    for slot in ("mu", "nu"):
        for row, ours, theirs in by_row(plan.grown, found[slot], expected[slot]):
            assert relative(ours, theirs) < 1e-11, (slot, row.name)
    # Were both moments grown by one rule, nu would not be the square.
    wrong = grow({"mu": moments(gradient(model, params))["nu"]}, plan)["mu"]
    assert (
        max(relative(ours, theirs) for _, ours, theirs in by_row(plan.grown, found["nu"], wrong))
        > 1e-2
    )


def old_block(row, model, leaf):
    """The part of a padded leaf, unfused, that was there before."""
    layers = (slice(None),) if row.stacked else ()
    return leaf[layers + tuple(slice(model.sizes[name]) for name in row.parts[0].names)]


def padding_errors(plan, model, params):
    """(kind, mu's error, nu's, mu's but for a constant over embed) of the old part of every row."""
    found = moments(gradient(plan.grown, grow(params, plan)))
    expected = grow(moments(gradient(model, params)), plan)
    rows = zip(
        *(by_row(plan.grown, found[slot], expected[slot]) for slot in ("mu", "nu")), strict=True
    )
    for (row, *mu), (_, *nu) in rows:
        ours, theirs = (old_block(row, model, leaf) for leaf in mu)
        axes = row.parts[0].axes
        place = -len(axes) + next((i for i, axis in enumerate(axes) if axis.name == "embed"), 0)
        written = any(axis.name == "embed" and not axis.read for axis in axes)
        writes = written and "norm" not in row.name
        constant = (ours - theirs).mean(place, keepdims=True)
        squares = relative(*(old_block(row, model, leaf) for leaf in nu))
        yield row, writes, relative(ours, theirs), squares, relative(ours - constant, theirs)


@pytest.mark.parametrize("tied,target", [(True, {"embed": 24}), (False, {"head_dim": 12})])
def test_the_gradient_after_padding(tied, target):
    """What reads the residual stream, norms and queries: the rule's gradient [2e-15].

    What writes into it: off by a constant over embed [1.5 to 6.3 % of mu, 3 to 9 % of nu] and by
    nothing else [2e-15].
    """
    model, params, _ = small(True, tied)
    plan = plan_width(model, **target, mlp="1x")
    assert set(plan.pads) == {"embed", *target}
    for row, writes, mu, nu, rest in padding_errors(plan, model, params):
        if writes:
            assert 1e-2 < mu < 0.1 and 1e-2 < nu < 0.2 and rest < 1e-13, row.name
        else:
            assert mu < 1e-13 and nu < 1e-13, row.name


@pytest.mark.parametrize("axis,seen", [("embed", "layernorm"), ("head_dim", "query_key")])
def test_the_gradient_after_padding_by_the_rule_of_values_is_not(axis, seen, monkeypatch):
    model, params, _ = small()
    plan = plan_width(model, head_dim=12, mlp="1x")
    right, place = engine.rule_along, ARGUMENTS.index("moment")

    def wrong(*args):
        if args[0].name != axis:
            return right(*args)
        return right(*args[:place], VALUE, *args[place + 1 :])

    monkeypatch.setattr(engine, "rule_along", wrong)
    wrong = [
        row.name
        for row, writes, mu, *_ in padding_errors(plan, model, params)
        if not writes and mu > 1e-2
    ]
    assert any(seen in name for name in wrong)


def test_the_first_gradient_of_old_parameters_stays_in_identity_growth():
    model, params, _ = small(False, True)
    plan = plan_depth(model, "2:5", "identity")
    old = plan.maps["layer"].share == 1.0
    found, expected = gradient(plan.grown, grow(params, plan)), gradient(model, params)
    found["layers"] = jax.tree.map(lambda leaf: leaf[old], found["layers"])
    for row, ours, theirs in by_row(model, found, expected):
        assert relative(ours, theirs) < 1e-12, row.name


def random_moments(model):
    """Parameters and moments, all different."""
    slots = {
        slot: random_tensors(model, "float64", seed)
        for seed, slot in enumerate(("params", "mu", "nu"))
    }
    source = held(model, **slots)
    return {slot: source.stack(slot) for slot in slots}


def identical(ours, theirs):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs)))


WIDER = {
    "clone": lambda model: plan_width(model, embed="3x", mlp=31, spread=0.4),
    "mean-pad": lambda model: plan_width(model, embed=40, mlp=19),
    "head_dim": lambda model: plan_width(model, head_dim=12),
}


@pytest.mark.parametrize("wider", WIDER)
@pytest.mark.parametrize("method", ["identity", "replicate"])
def test_the_order_of_axes_does_not_matter(wider, method):
    tree = random_moments(BASE)
    depth, width = plan_depth(BASE, "2:5", method), WIDER[wider](BASE)
    once = grow(tree, combine_plans("grow", [depth, width], BASE))
    deep_first = grow(grow(tree, depth), WIDER[wider](depth.grown))
    wide_first = grow(grow(tree, width), plan_depth(width.grown, "2:5", method))
    assert identical(once, deep_first)
    if wider == "clone":
        assert identical(once, wide_first)
    else:
        # Random fills bear their own layer's name, so copies of layers already widened share them.
        assert identical(unfilled(once), unfilled(wide_first)) and not identical(once, wide_first)
    other = grow(wide_first, plan_depth(WIDER[wider](depth.grown).grown, "4,0-3"))
    assert not identical(unfilled(once), unfilled(other))


def unfilled(state):
    """The parts of a grown state that no random fill is in: moments, and values that write into the
    residual stream.
    """
    layers = state["params"]["layers"]
    norms = {name: layers[name] for name in ("input_layernorm", "post_attention_layernorm")}
    writers = (
        layers["attention"]["dense"],
        layers["mlp"]["dense_4h_to_h"],
        state["params"]["embed_in"],
    )
    return {"mu": state["mu"], "nu": state["nu"], "writers": writers, "norms": norms}


@st.composite
def two_growths(draw):
    """Maps of heads (and embed with them), mlp and layers for BASE, and others for what they make
    of it.
    """

    def growth(heads, mlp, layers):
        index = {"head": (heads, 2 * heads), "mlp": (mlp, mlp + 3), "layer": (layers, layers + 1)}
        maps = {"embed": tile(heads * 8, heads * 16)}
        for axis, (source, size) in index.items():
            units = draw(st.lists(st.integers(0, source - 1), min_size=size, max_size=size))
            # Shares that are powers of two: composed or one after the other, products are the same
            # numbers.
            shares = draw(
                st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=size, max_size=size)
            )
            maps[axis] = make_map(units, source, shares)
        return maps

    return growth(2, 12, 2), growth(4, 15, 3)


@settings(max_examples=15, deadline=None)
@given(two_growths())
def test_maps_compose(growths):
    first, second = growths
    tree = random_moments(BASE)
    one = build_plan("test", "test", BASE, first)
    both = grow(grow(tree, one), build_plan("test", "test", one.grown, second))
    composed = {axis: axis_map.then(second[axis]) for axis, axis_map in first.items()}
    once = grow(tree, build_plan("test", "test", BASE, composed))
    assert identical(both, once)
    reversed_map = make_map(composed["mlp"].index[::-1], 12, composed["mlp"].share[::-1] * 2)
    assert not identical(
        grow(tree, build_plan("test", "test", BASE, composed | {"mlp": reversed_map})), once
    )


def test_every_head_dim_keeps_its_rotated_dimensions():
    missed = 0
    for size in range(4, 64, 2):
        for rotated in range(2, size + 1, 2):
            part = (rotated + 0.5) / size if rotated < size else 1.0
            model = BASE.change(embed=2 * size, rotary_pct=part)
            for target in range(size + 1, size + 20):
                plan = plan_width(model, head_dim=target)
                assert plan.grown.rotary == int(target * plan.grown.rotary_pct) == rotated
                missed += int(target * (rotated / target)) != rotated
    # The plain quotient misses some, for which half a dimension is added.
    assert missed > 0


ON_DISK = ["clone 2x", "mean-pad 24", "head_dim 10", "identity"]


def through_files(tmp_path, name, dtype, tied, mutate=None):
    """transformers' logits of a model that was exported, and of what growth on disk made of the
    export.
    """
    model = BASE.change(tied=tied, rotary_pct=0.25)
    tensors = random_tensors(model, "float64")
    write_output(
        tmp_path / "small", "huggingface", convert_to_directory(held(model, params=tensors), dtype)
    )
    source = open_source(str(tmp_path / "small"))
    plan = EXACT[name](source.model)
    contents = surgery.prepare_growth(source, mutate(plan) if mutate else plan)
    write_output(tmp_path / "grown", "huggingface", contents, [source])
    return [transformers_logits(tmp_path / which, TOKENS, dtype)[0] for which in ("small", "grown")]


@pytest.mark.parametrize("dtype,limit", [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("name", ON_DISK)
def test_transformers_finds_the_same_function_in_files(tmp_path, name, dtype, limit):
    small_logits, grown_logits = through_files(
        tmp_path, name, dtype, tied=ON_DISK.index(name) % 2 == 0
    )
    size = np.abs(small_logits).max()
    assert size > 1 and np.abs(grown_logits - small_logits).max() / size < limit


# What growth keeps although the trainer does not compute it.
HALF = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LINEAR = HALF | {"rope_type": "linear", "factor": 2.0}
YARN = HALF | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
KEPT = {
    "another activation": ("clone and identity", {"activation": "relu"}),
    "no attention bias": ("clone and identity", {"attention_bias": False}),
    "no attention bias, padded": ("mean-pad 24", {"attention_bias": False}),
    "no attention bias, head_dim": ("head_dim 10", {"attention_bias": False}),
    "linear rotary": ("head_dim 10", {"rope": LINEAR}),
    "yarn rotary": ("mean-pad 24", {"rope": YARN}),
}


@pytest.mark.parametrize("name", KEPT)
def test_transformers_finds_the_same_function_where_the_trainer_computes_none(tmp_path, name):
    operator, options = KEPT[name]
    save_directory(tmp_path / "plain", BASE, "float64")
    save_directory(tmp_path / "small", BASE.change(**options), "float64")
    source = open_source(str(tmp_path / "small"))
    plan = EXACT[operator](source.model)
    write_output(tmp_path / "grown", "huggingface", surgery.prepare_growth(source, plan), [source])
    found = {
        which: transformers_logits(tmp_path / which, TOKENS, "float64")[0]
        for which in ("plain", "small", "grown")
    }
    assert np.abs(found["small"]).max() > 1
    assert np.abs(found["grown"] - found["small"]).max() < 1e-10
    assert np.abs(found["small"] - found["plain"]).max() > 1e-3, "the option must be seen"


BROKEN_FILES = {
    "clone 2x": lambda plan: replace(
        plan, maps=plan.maps | {"mlp": make_map(plan.maps["mlp"].index, 12, [0.501] * 24)}
    ),
    "mean-pad 24": lambda plan: replace(plan, grown=plan.grown.change(norm_eps=BASE.norm_eps)),
    "head_dim 10": lambda plan: replace(plan, grown=plan.grown.change(rotary_pct=0.4)),
    "identity": lambda plan: replace(plan, maps={"layer": make_map(plan.maps["layer"].index, 2)}),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_transformers_finds_another_function_in_files_with_one_thing_wrong(tmp_path, name):
    small_logits, grown_logits = through_files(tmp_path, name, "float64", True, BROKEN_FILES[name])
    assert np.abs(grown_logits - small_logits).max() > 1e-5
