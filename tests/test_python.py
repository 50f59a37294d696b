"""growkit from Python: the names of the package, models of one's own, trees of every layout, and
the examples of the documentation, which are run as they stand.
"""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SMALL, contents_of, save_checkpoint, save_directory
from flax import nnx

import growkit
from growkit.cli import run
from growkit.entries import Growth
from growkit.errors import GrowkitError, UsageError
from growkit.models.fields import Frozen
from growkit.models.gpt_neox import GPT_NEOX

ROOT = Path(__file__).parents[1]
PACKAGES = ("growkit", "trainer", "convert")
TABLE = """
# name                         axes               begins  role
embed.embedding                vocab embed        normal  embedding
layers.{layer}.norm.scale      embed              ones    norm
layers.{layer}.up.kernel       /embed mlp         normal  matrix
layers.{layer}.up.bias         mlp                zeros   bias
layers.{/layer}.down.kernel    /mlp embed         normal  matrix
layers.{/layer}.down.bias      embed              zeros   bias
norm.scale                     embed              ones    norm
head.kernel                    /embed vocab       normal  head
"""
SIZES = {"layer": 3, "embed": 8, "mlp": 12, "vocab": 10}
MODEL = growkit.describe_model(TABLE, SIZES, norm="rms")
PLANS = {
    "replicate": growkit.plan_depth(MODEL, "3:5"),
    "identity": growkit.plan_depth(MODEL, "3:5", "identity"),
    "other order": growkit.plan_depth(MODEL, "2,1,0,0"),
    "clone": growkit.plan_width(MODEL, embed="2x"),
    "noise": growkit.set_options(growkit.plan_width(MODEL, embed="2x"), noise=0.5, seed=3),
    "pad": growkit.plan_width(MODEL, embed=12, mlp=20),
    "both": growkit.combine_plans(
        "grow",
        [growkit.plan_depth(MODEL, "3:4", "identity"), growkit.plan_width(MODEL, embed="2x")],
        MODEL,
    ),
}


# ---------------------------------------------------------------- the names of the package

LIGHT = """
import sys, growkit
heavy = {"numpy", "jax", "flax", "growkit.growth", "growkit.checkpoint", "click"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
assert {name for name in dir(growkit) if not name.startswith("_")} == set(growkit.__all__)
for name in growkit.__all__:
    assert getattr(growkit, name) is getattr(growkit, name)
    assert name in vars(growkit)
assert "jax" not in sys.modules and "trainer" not in sys.modules
try:
    growkit.plan_dept
except AttributeError as problem:
    print(problem)
"""


def test_import_is_light_and_every_name_is_there():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "has no attribute 'plan_dept'" in done.stdout


def test_the_names_are_those_that_type_checkers_see():
    text = (ROOT / "growkit" / "__init__.py").read_text()
    typed = text.split("if TYPE_CHECKING:")[1].split("__version__")[0]
    imported = set(re.findall(r"\w+", " ".join(re.findall(r"import (.*)", typed))))
    assert imported == set(growkit.__all__)
    assert {name for names in growkit._HOMES.values() for name in names} == imported


WRONG_TYPES = {
    "a path for a plan": (lambda: growkit.grow({}, "18:24"), "plan must be of type Plan"),
    "no text for a map": (lambda: growkit.grow({}, MODEL, map=4), "map must be of type str"),
    "parameters for a model": (lambda: growkit.grow(MODEL, {}), "or a model with map='18:24'"),
    "a model for a plan": (lambda: growkit.set_options(MODEL), "plan must be of type Plan"),
    "a plan for plans": (
        lambda: growkit.combine_plans("grow", PLANS["clone"], MODEL),
        "plans must be of type list or tuple",
    ),
    "a list of noise": (lambda: growkit.set_options(PLANS["clone"], noise=[1]), "noise must be"),
    "a list of scalars": (
        lambda: growkit.describe_model(TABLE, SIZES, scalars=["embed"]),
        "scalars must be of type Mapping",
    ),
    "a number for a map": (lambda: growkit.plan_depth(MODEL, 24), "text must be of type str"),
    "a path for a model": (
        lambda: growkit.plan_depth("models/580m", "18:24"),
        r"as open_source\(path\).model.*got one of type str",
    ),
    "a dict for a model": (lambda: growkit.plan_width({}, embed="2x"), "got one of type dict"),
    "a config for a model": (lambda: growkit.plan_like(MODEL, {}), "like must be of type Arch"),
    "a number for a path": (lambda: growkit.open_source(3), "a run as RUN@STEP"),
    "a path for a source": (
        lambda: growkit.write_grown("source", PLANS["clone"], "out"),
        r"as growkit.open_source\(path\) returns",
    ),
    "lines for a table": (lambda: growkit.describe_model([TABLE], SIZES), "one line for each"),
    "a list of sizes": (lambda: growkit.describe_model(TABLE, [3, 8]), "from axes to sizes"),
    "text for a number": (
        lambda: growkit.plan_width(MODEL, embed="2x", spread="0.5"),
        "spread must be of type float or int, as 0.5; got one of type str",
    ),
}


@pytest.mark.parametrize("what", WRONG_TYPES)
def test_a_wrong_type_is_told_what_was_expected(what):
    call, said = WRONG_TYPES[what]
    with pytest.raises(TypeError, match=said):
        call()


# ---------------------------------------------------------------- models on disk


@pytest.mark.parametrize("save", [save_directory, save_checkpoint])
def test_write_grown_writes_what_the_command_writes(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("source"))
    source = growkit.open_source(Path("source"))
    plan = growkit.plan_depth(source.model, "3:5", "identity")
    growkit.write_grown(source, plan, Path("ours"))
    assert run(["depth", "--map", "3:5", "--method", "identity", "source", "theirs"]) == 0
    ours, theirs = contents_of(Path("ours")), contents_of(Path("theirs"))
    assert ours.keys() == theirs.keys() and len(ours) > 1
    # Orbax's metadata holds the time.
    assert {name for name in ours if ours[name] != theirs[name]} <= {"_CHECKPOINT_METADATA"}
    lineage = growkit.read_lineage("ours")
    (entry,) = lineage
    assert isinstance(entry, Growth)
    assert entry.changes == {"layer": (3, 5)} and entry.preserved


def test_write_grown_replaces_with_force_only(tmp_path):
    source = growkit.open_source(save_directory(tmp_path / "source"))
    plan = growkit.plan_depth(source.model, "3:4")
    growkit.write_grown(source, plan, tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        growkit.write_grown(source, plan, tmp_path / "out")
    growkit.write_grown(source, growkit.plan_depth(source.model, "3:6"), tmp_path / "out", True)
    assert growkit.open_source(tmp_path / "out").model.layer == 6


def test_a_plan_for_another_model_is_refused(tmp_path):
    source = growkit.open_source(save_directory(tmp_path / "source"))
    plan = growkit.plan_depth(SMALL.change(vocab=104), "3:4")
    with pytest.raises(UsageError, match="made for another model"):
        growkit.write_grown(source, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- models of one's own

REFUSED = {
    "an axis without a size": ({"sizes": {"layer": 3, "embed": 8, "mlp": 12}}, "lacks the axis 'v"),
    "a size without an axis": ({"sizes": SIZES | {"mlpp": 3}}, "'mlpp'.*did you mean 'mlp'"),
    "a size that is not a count": (
        {"sizes": SIZES | {"mlp": 1.5}},
        "size of mlp is a whole number",
    ),
    "an unknown norm": ({"norm": "rmsnorm"}, "norm is 'layer' or 'rms'"),
    "an empty table": ({"table": "# nothing\n"}, "no rows"),
    "a condition without an answer": (
        {"table": TABLE.replace("vocab       normal  head", "vocab  normal  head  untied")},
        "depends on 'untied'",
    ),
    "an option of no row": ({"tie": True}, "no row of the table depends on the option 'tie'"),
    "a factor of nothing": ({"scalars": {"embed": "sqrt(embed)"}}, "which is not a row"),
    "a factor that is not a size": ({"scalars": {"embed.embedding": "embed2"}}, "a scalar is axis"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_description_that_contradicts_itself_is_refused(what):
    given, said = REFUSED[what]
    with pytest.raises(GrowkitError, match=said):
        growkit.describe_model(**({"table": TABLE, "sizes": SIZES} | given))


def test_a_line_that_is_no_row_is_quoted():
    with pytest.raises(ValueError, match="kernel normal matrix"):
        growkit.describe_model("kernel normal matrix", {})


def test_a_described_model_says_what_cannot_grow():
    with pytest.raises(UsageError, match="heads cannot grow.*axes are layer, embed, mlp, vocab"):
        growkit.plan_width(MODEL, heads=4)
    flat = growkit.describe_model("up.kernel  /embed mlp  normal  matrix", {"embed": 4, "mlp": 8})
    with pytest.raises(UsageError, match="no layers"):
        growkit.plan_depth(flat, "1:2")
    assert growkit.plan_width(flat, mlp="1.5x").grown.mlp == 12
    heads = "q.kernel  /embed head head_dim  normal  query"
    model = growkit.describe_model(heads, {"embed": 8, "head": 2, "head_dim": 4})
    with pytest.raises(UsageError, match="head_dim of a described model stays 4"):
        growkit.plan_width(model, head_dim=8)


def test_plan_like_asks_for_the_same_table():
    bigger = growkit.describe_model(TABLE, SIZES | {"layer": 4, "embed": 16, "mlp": 24}, "rms")
    assert growkit.plan_like(MODEL, bigger).grown == bigger
    other = growkit.describe_model(
        TABLE + "extra.bias  embed  zeros  bias", SIZES | {"layer": 4}, "rms"
    )
    with pytest.raises(UsageError, match="adds no parameter.*extra.bias"):
        growkit.plan_like(MODEL, other)


def test_a_factor_that_follows_a_size_is_undone():
    scaled = growkit.describe_model(TABLE, SIZES, "rms", scalars={"embed.embedding": "sqrt(embed)"})
    tree = make_tree()
    grown = growkit.grow(tree, growkit.plan_width(scaled, embed="4x"))
    plain = growkit.grow(tree, growkit.plan_width(MODEL, embed="4x"))
    assert np.array_equal(grown["embed"]["embedding"], plain["embed"]["embedding"] / 2)


HEAD = """
embed.embedding  vocab embed   normal  embedding
head.kernel      /embed vocab  normal  head
"""


@pytest.mark.parametrize("final", [True, False])
def test_padding_under_layer_norm_asks_for_a_norm_before_the_head(final):
    """The new entries of the stream hold the mean of the old ones, which only a norm hides."""
    sizes = {"embed": 6, "vocab": 5}
    table = HEAD + "norm.scale  embed  ones  norm\n" * final
    model = growkit.describe_model(table, sizes, norm_eps=1e-2)
    random = np.random.default_rng(0)
    tree = {
        "embed": {"embedding": random.normal(size=(5, 6))},
        "head": {"kernel": random.normal(size=(6, 5))},
    }
    if final:
        tree["norm"] = {"scale": 1.0 + random.normal(size=6)}

    def compute(tree, eps):
        stream = tree["embed"]["embedding"]
        if final:
            centred = stream - stream.mean(-1, keepdims=True)
            root = np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps)
            stream = centred / root * tree["norm"]["scale"]
        return stream @ tree["head"]["kernel"]

    if not final:
        with pytest.raises(UsageError, match="no norm over embed outside the layers hides them"):
            growkit.plan_width(model, embed=9)
        allowed = replace(model, family=replace(model.family, unpadded=""))
        plan = growkit.plan_width(allowed, embed=9)
    else:
        plan = growkit.plan_width(model, embed=9)
    gap = np.abs(compute(growkit.grow(tree, plan), plan.grown.norm_eps) - compute(tree, 1e-2)).max()
    assert gap < 1e-12 if final else gap > 1e-3


def test_conditions_are_options_of_the_description():
    table = TABLE.replace(
        "head.kernel                    /embed vocab       normal  head",
        "head.kernel                    /embed vocab       normal  head   untied",
    )
    assert table != TABLE
    tied = growkit.describe_model(table, SIZES, tied=True)
    assert tied.parameters == MODEL.parameters - 80 and tied.tied
    assert growkit.describe_model(table, SIZES, tied=False).parameters == MODEL.parameters


# ---------------------------------------------------------------- layouts of trees


def make_tree(model=MODEL, dtype="float32", seed=0):
    """A random parameter tree, layers stacked first."""
    generator = np.random.default_rng(seed)
    return model.table.tree(
        lambda row: generator.normal(size=row.stacked_shape(model.sizes)).astype(dtype)
    )


def part(tree, kind=int):
    """A tree whose layers, stacked, come one by one instead, as {0: ...}, {'0': ...} or a list."""
    count = len(jax.tree.leaves(tree["layers"])[0])
    units = [jax.tree.map(lambda leaf, n=n: leaf[n], tree["layers"]) for n in range(count)]
    layers = units if kind is list else {kind(n): unit for n, unit in enumerate(units)}
    return tree | {"layers": layers}


def same(ours, theirs) -> bool:
    """Whether two trees have one structure and the same bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", [int, str, list])
@pytest.mark.parametrize("name", PLANS)
def test_layers_one_by_one_grow_as_stacked_ones_do(name, kind):
    plan = PLANS[name]
    for moment in ("params", "mu", "nu"):
        stacked = growkit.grow({moment: make_tree()}, plan)[moment]
        ours = growkit.grow({moment: part(make_tree(), kind)}, plan)[moment]
        assert same(ours, part(stacked, kind)), moment


def test_one_row_may_be_stacked_and_another_not():
    tree = part(make_tree())
    ups = [layer.pop("up") for layer in tree["layers"].values()]
    tree["layers"]["up"] = jax.tree.map(lambda *leaves: np.stack(leaves), *ups)
    grown = growkit.grow(tree, PLANS["both"])
    expected = growkit.grow(make_tree(), PLANS["both"])
    assert same(grown["layers"]["up"], expected["layers"]["up"])
    assert np.array_equal(
        grown["layers"][3]["norm"]["scale"], expected["layers"]["norm"]["scale"][3]
    )


def test_layers_of_a_kind_have_parameters_of_their_own():
    text = TABLE + "layers.{layer:gated}.gate.kernel  /embed mlp  normal  matrix\n"
    family = replace(MODEL.family, text=text)
    model = growkit.Architecture(family, MODEL.sizes, MODEL.options, Frozen(gated=(1,)))
    tree = part(make_tree())
    tree["layers"][1]["gate"] = {"kernel": np.ones((8, 12), np.float32)}
    grown = growkit.grow(tree, growkit.plan_depth(model, "0,1,1,2"))
    assert [("gate" in layer) for layer in grown["layers"].values()] == [False, True, True, False]
    del tree["layers"][1]["gate"]
    with pytest.raises(GrowkitError, match="lacks the parameter 'layers.gate.kernel'"):
        growkit.grow(tree, growkit.plan_depth(model, "0,1,1,2"))
    with pytest.raises(GrowkitError, match="only in layers of the kind 'gated'"):
        growkit.describe_model(text, SIZES)


def test_copies_of_one_layer_are_not_the_same_memory():
    tree = part(make_tree())
    before = jax.tree.map(np.copy, tree)
    grown = growkit.grow(tree, PLANS["replicate"])
    for leaf in jax.tree.leaves(grown):
        leaf += 1
    assert same(tree, before)
    again = growkit.grow(tree, PLANS["replicate"])
    assert same(jax.tree.map(lambda leaf: leaf + 1, again), grown)


def test_boxes_and_other_containers_are_kept():
    boxed = jax.tree.map(
        lambda leaf: nn.Partitioned(jnp.asarray(leaf), names=(None,) * leaf.ndim), make_tree()
    )
    grown = growkit.grow({"params": boxed, "empty": {}, "step": 3}, PLANS["both"])
    expected = growkit.grow(make_tree(), PLANS["both"])
    assert same(nn.meta.unbox(grown["params"]), expected)
    assert isinstance(grown["params"]["head"]["kernel"], nn.Partitioned)
    assert grown["empty"] == {} and grown["step"] == 3
    frozen = growkit.grow(flax.core.freeze(part(make_tree())), PLANS["both"])
    assert isinstance(frozen, flax.core.FrozenDict)
    assert same(frozen.unfreeze(), part(expected))
    hollow = part(make_tree()) | {"dropout": {}}
    assert growkit.grow(hollow, PLANS["both"])["dropout"] == {}


def test_growth_is_traced():
    tree = jax.tree.map(jnp.asarray, part(make_tree()))
    traced = jax.jit(lambda tree: growkit.grow(tree, PLANS["both"]))(tree)
    assert same(traced, growkit.grow(tree, PLANS["both"]))
    shapes = jax.eval_shape(lambda tree: growkit.grow(tree, PLANS["both"]), tree)
    assert shapes["layers"][3]["up"]["kernel"].shape == (16, 24)


def change_tree(change):
    tree = part(make_tree())
    change(tree)
    return tree


WRONG_TREES = {
    "a layer too few": (lambda tree: tree["layers"].pop(2), "lacks the parameter 'layers.2.norm"),
    "a layer too many": (
        lambda tree: tree["layers"].update({3: tree["layers"][0]}),
        "holds 'layers.3.norm.scale', but the plan is for a model with layer = 3",
    ),
    "a part of a layer missing": (
        lambda tree: tree["layers"][1].pop("up"),
        "lacks the parameter 'layers.1.up",
    ),
    "no layers": (lambda tree: tree.pop("layers"), "lacks the parameter 'layers.norm.scale'"),
    "another shape in one layer": (
        lambda tree: tree["layers"][1]["up"].update(bias=np.zeros(13)),
        r"'layers.1.up.bias' has shape \[13\].*asks for \[12\]",
    ),
    "a misspelt name": (
        lambda tree: tree["layers"][1]["up"].update(biass=np.zeros(12)),
        r"'layers.1.up.biass'; the nearest row is layers.\{layer\}.up.bias",
    ),
    "stacked as well": (
        lambda tree: tree["layers"].update(make_tree()["layers"]),
        "twice: stacked and unit by unit",
    ),
}


@pytest.mark.parametrize("what", WRONG_TREES)
def test_a_tree_that_the_table_does_not_cover_is_refused(what):
    change, said = WRONG_TREES[what]
    with pytest.raises(GrowkitError, match=said):
        growkit.grow(change_tree(change), PLANS["clone"])


def test_a_leaf_that_is_no_array_is_refused():
    torch = pytest.importorskip("torch")
    for leaf in (torch.zeros(10, 8), jax.ShapeDtypeStruct((10, 8), np.float32)):
        tree = make_tree() | {"embed": {"embedding": leaf}}
        with pytest.raises(TypeError, match="'embed.embedding' is of type (Tensor|ShapeDtype)"):
            growkit.grow(tree, PLANS["clone"])


def test_a_module_of_linen_is_no_tree():
    with pytest.raises(GrowkitError, match="of a Flax model take the params dict"):
        growkit.grow(nn.Dense(2), PLANS["clone"])


# ---------------------------------------------------------------- the short form


def test_a_model_with_sizes_stands_for_a_plan():
    tree = part(make_tree())
    both = growkit.grow(tree, MODEL, map="3:4", method="identity", embed="2x")
    assert same(both, growkit.grow(tree, PLANS["both"]))
    assert same(growkit.grow(tree, MODEL, map="3:5"), growkit.grow(tree, PLANS["replicate"]))
    refused = {
        "say what shall grow": lambda: growkit.grow(tree, MODEL),
        "goes with map": lambda: growkit.grow(tree, MODEL, method="stack"),
        "a plan says itself what grows": lambda: growkit.grow(tree, PLANS["both"], embed="2x"),
        "mu is 'gradient', or 'step'": lambda: growkit.grow(tree, PLANS["both"], mu="steps"),
    }
    for said, call in refused.items():
        with pytest.raises(UsageError, match=said):
            call()


LISTED = """
{layer}.0   /embed mlp  normal  matrix
{/layer}.1  /mlp embed  normal  matrix
"""


def test_a_tree_may_itself_be_a_list_of_layers():
    """Parameters as [(in, out), ...], with no name before the layers; and the same stacked."""
    model = growkit.describe_model(LISTED, {"layer": 2, "embed": 3, "mlp": 4}, norm="rms")
    random = np.random.default_rng(0)
    params = [(random.normal(size=(3, 4)), random.normal(size=(4, 3))) for _ in range(2)]
    state = optax.sgd(0.1, momentum=0.9).init(params)
    grown, moments = growkit.grow((params, state), model, map="2:3", mlp=8)
    assert [[leaf.shape for leaf in layer] for layer in grown] == [[(3, 8), (8, 3)]] * 3
    assert np.array_equal(grown[1][0], grown[0][0]) and type(grown[0]) is tuple
    assert np.array_equal(grown[2][1][:4], params[1][1] / 2)
    assert [layer[1].shape for layer in moments[0].trace] == [(8, 3)] * 3
    # Two trees with stacked layers are no list of two layers.
    stacked = {"0": np.stack([a for a, _ in params]), "1": np.stack([b for _, b in params])}
    pair = growkit.grow((stacked, stacked), model, map="2:3")
    assert [tree["0"].shape for tree in pair] == [(3, 3, 4)] * 2


# ---------------------------------------------------------------- Flax


class Block(nnx.Module):
    def __init__(self, embed, mlp, rngs):
        self.norm = nnx.RMSNorm(embed, rngs=rngs)
        self.up = nnx.Linear(embed, mlp, rngs=rngs)
        self.down = nnx.Linear(mlp, embed, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.silu(self.up(self.norm(x))))


class Network(nnx.Module):
    def __init__(self, model, seed=0):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(model.vocab, model.embed, rngs=rngs)
        self.layers = nnx.List([Block(model.embed, model.mlp, rngs) for _ in range(model.layer)])
        self.norm = nnx.RMSNorm(model.embed, epsilon=model.norm_eps, rngs=rngs)
        self.head = nnx.Linear(model.embed, model.vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def make_optimizer(network):
    return nnx.Optimizer(network, optax.adam(1e-3), wrt=nnx.Param)


@nnx.jit
def step(network, optimizer, tokens):
    def loss(network):
        logits = network(tokens[:-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()

    optimizer.update(network, nnx.grad(loss)(network))


def test_an_nnx_model_and_its_optimizer_grow():
    plan = PLANS["both"]
    tokens = jnp.arange(9)
    network = Network(MODEL)
    optimizer = make_optimizer(network)
    for _ in range(3):
        step(network, optimizer, tokens)
    bigger = Network(plan.grown, seed=1)
    assert not np.allclose(bigger(tokens), network(tokens), atol=1e-2)
    nnx.update(bigger, growkit.grow(nnx.state(network, nnx.Param), plan))
    np.testing.assert_allclose(bigger(tokens), network(tokens), atol=1e-5)
    grown = growkit.grow(nnx.state(optimizer), plan)
    continued = make_optimizer(bigger)
    assert jax.tree.structure(grown) == jax.tree.structure(nnx.state(continued))
    nnx.update(continued, grown)
    assert int(continued.step[...]) == 3
    step(bigger, continued, tokens)
    pure = growkit.grow(nnx.to_pure_dict(nnx.state(network, nnx.Param)), plan)
    assert same(pure, nnx.to_pure_dict(growkit.grow(nnx.state(network, nnx.Param), plan)))


def test_an_nnx_module_and_its_optimizer_stand_for_their_states():
    plan, network = PLANS["both"], Network(MODEL)
    chain = optax.rmsprop(1e-3, momentum=0.9)
    optimizer = nnx.Optimizer(network, chain, wrt=nnx.Param)
    params, state = growkit.grow((network, optimizer), plan)
    assert same(params, growkit.grow(nnx.state(network, nnx.Param), plan))
    # nnx.state has dicts for optax's classes, and leaves out what is empty: {0: ..., 2: ...}.
    assert same(state, growkit.grow(nnx.state(optimizer), plan))
    bigger = Network(plan.grown, seed=1)
    continued = nnx.Optimizer(bigger, chain, wrt=nnx.Param)
    nnx.update(bigger, params)
    nnx.update(continued, state)
    step(bigger, continued, jnp.arange(9))
    network.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))
    assert same(growkit.grow(network, plan), params)
    with pytest.raises(GrowkitError, match="'dropout.rngs.count' is of type RngCount and no par"):
        growkit.grow(nnx.state(network), plan)
    # A mask has nothing in the place of a parameter, in each layer.
    part_of_it = optax.masked(
        optax.adam(1e-3),
        lambda tree: jax.tree.map_with_path(lambda path, _: "up" in str(path), tree),
    )
    masked = growkit.grow(nnx.Optimizer(network, part_of_it, wrt=nnx.Param), plan)
    wanted = nnx.state(nnx.Optimizer(bigger, part_of_it, wrt=nnx.Param))
    assert jax.tree.structure(masked) == jax.tree.structure(wanted)
    # What the classes tell, and dicts would not.
    for refused, said in ((optax.lars(0.1), "optax.lars"), (optax.sm3(0.1), "SM3")):
        with pytest.raises(GrowkitError, match=said):
            growkit.grow(nnx.Optimizer(network, refused, wrt=nnx.Param), plan)
    flat = nnx.Optimizer(Network(MODEL), optax.flatten(optax.adam(1e-3)), wrt=nnx.Param)
    for form in (flat, (nnx.state(network, nnx.Param), nnx.state(flat))):
        with pytest.raises(GrowkitError, match="optax.flatten"):
            growkit.grow(form, plan)


def test_reset_moments_reset_the_count_in_a_box():
    network = Network(MODEL)
    optimizer = make_optimizer(network)
    step(network, optimizer, jnp.arange(9))
    plan = replace(PLANS["clone"], moments="reset")
    grown = growkit.grow(nnx.state(optimizer), plan)
    assert int(grown["opt_state"][0]["count"][...]) == 0
    assert int(grown["step"][...]) == 1
    assert not any(leaf.any() for leaf in jax.tree.leaves(grown["opt_state"][0]["mu"]))


# ---------------------------------------------------------------- the documentation


def find_blocks(page: str) -> dict[str, str]:
    """The Python of a page, by section; the blocks of a section are one program."""
    sections = re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE)
    found = {}
    for section in sections:
        blocks = re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
        if blocks:
            found[section.split("\n")[0].strip("# ")] = "\n".join(blocks)
    return found


PAGES = ["README.md", "docs/python.md", "docs/models.md"]
EXAMPLES = [(page, section) for page in PAGES for section in find_blocks(page)]


def save_examples(folder: Path) -> None:
    """The models that examples open: 18 layers, tiny; a directory and a checkpoint."""
    model = GPT_NEOX.model(layer=18, embed=16, head=2, mlp=32, vocab=48, context=16, rotary_pct=0.5)
    save_directory(folder / "SRC", model)
    save_checkpoint(folder / "checkpoint", model)


@pytest.mark.parametrize("page,section", EXAMPLES)
def test_an_example_of_the_documentation_runs(page, section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_examples(tmp_path)
    code = compile(find_blocks(page)[section], f"{page}, {section}", "exec")
    # Dataclasses, as linen's modules are, look for the module that they are defined in.
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    exec(code, vars(module))


def test_the_examples_are_found():
    assert len(find_blocks("docs/python.md")) >= 5 and find_blocks("README.md")


def list_modules_with_examples() -> list[str]:
    """The modules of all packages whose docstrings have examples."""
    files = [file for name in PACKAGES for file in sorted((ROOT / name).rglob("*.py"))]
    return [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in files
        if ">>> " in file.read_text()
    ]


@pytest.mark.parametrize("name", list_modules_with_examples())
def test_the_examples_of_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def test_the_notation_and_the_plans_have_examples():
    names = {name.removeprefix("growkit.") for name in list_modules_with_examples()}
    assert names >= {"models.notation", "models.custom", "growth.axes", "growth.depth"}
