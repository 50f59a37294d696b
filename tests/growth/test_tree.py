"""Growth in memory is growth on disk, bit for bit, in whatever state the parameters stand and on
whatever device.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import namedtuple
from functools import cache
from pathlib import Path
from typing import Any

import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_tensors
from in_memory import held, made

import growkit
from growkit.checkpoint.tensor import Source, wrap_array
from growkit.errors import GrowkitError, UsageError
from growkit.growth.depth import plan_depth
from growkit.growth.plan import combine_plans, set_options
from growkit.growth.tree import grow_leaf
from growkit.growth.width import plan_width
from growkit.models.gpt_neox import GPT_NEOX
from growkit.models.llama import LLAMA
from growkit.surgery import grow as surgery

TINY = GPT_NEOX.model(
    layer=2, embed=16, head=2, mlp=12, vocab=24, context=16, rotary_pct=0.5, tied=False
)
EXACT = {
    "gopher": plan_depth(TINY, "2:3"),
    "stack": plan_depth(TINY, "2:5", "stack"),
    "identity": plan_depth(TINY, "2:4", "identity"),
    "clone": plan_width(TINY, embed="2x"),
    "uneven": plan_width(TINY, embed="3x", mlp=40, spread=0.5),
    "both": combine_plans(
        "grow", [plan_depth(TINY, "2:3", "identity"), plan_width(TINY, embed="2x")], TINY
    ),
    "noise": dataclasses.replace(plan_width(TINY, embed="3x"), noise=0.3, seed=7),
    "noise of its size": set_options(plan_width(TINY, embed="3x"), noise="0.3rms", seed=7),
    "copied moments": dataclasses.replace(plan_width(TINY, embed="2x"), moments="copy"),
    "nu only": dataclasses.replace(plan_width(TINY, embed="2x"), moments="nu-only"),
    "reset": dataclasses.replace(plan_width(TINY, embed="2x"), moments="reset"),
    "first": dataclasses.replace(
        combine_plans("grow", [plan_depth(TINY, "2:3"), plan_width(TINY, embed="2x")], TINY),
        moments="first",
    ),
}
PADDED = {"mean-pad": plan_width(TINY, embed=24, mlp=16), "head_dim": plan_width(TINY, head_dim=12)}
PLANS = EXACT | PADDED
SLOTS = ("params", "mu", "nu")


@cache
def source(dtype="float32"):
    slots = {slot: random_tensors(TINY, dtype, seed) for seed, slot in enumerate(SLOTS)}
    slots["nu"] = {name: np.square(array) for name, array in slots["nu"].items()}
    return held(TINY, **slots)


def small(slot="params", dtype="float32"):
    return source(dtype).stack(slot)


@cache
def on_disk(plan_name, slot, dtype="float32"):
    """The tree of a slot as surgery grows it."""
    plan = PLANS[plan_name]
    recipes = surgery.prepare_growth(source(dtype), plan).recipes
    tensors = {
        slot: {name: made(recipe) for name, recipe in recipes[slot].items()}
        for slot in ("params", slot)
    }
    return held(plan.grown, **tensors).stack(slot)


def same(ours, theirs) -> bool:
    """Whether two trees are of one structure and bit for bit the same."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(
        np.asarray(a).dtype == np.asarray(b).dtype and np.array_equal(a, b) for a, b in pairs
    )


def near(ours, theirs) -> float:
    """The largest difference relative to each leaf's largest number."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(
        float(np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs
    )


def to_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("name", PLANS)
def test_numpy_grows_in_memory_as_on_disk(name):
    for slot in SLOTS:
        ours = growkit.grow({slot: small(slot)}, PLANS[name])[slot]
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(ours))
        assert same(ours, on_disk(name, slot)), slot


@pytest.mark.parametrize(
    "name",
    [
        "gopher",
        "uneven",
        "both",
        "noise",
        "noise of its size",
        "reset",
        "first",
        "mean-pad",
        "head_dim",
    ],
)
def test_jax_grows_under_jit_as_on_disk(name):
    state = {slot: to_jax(small(slot)) for slot in SLOTS}
    ours = jax.jit(lambda state: growkit.grow(state, PLANS[name]))(state)
    for slot in SLOTS:
        theirs = on_disk(name, slot)
        assert same(ours[slot], theirs) if name in EXACT else near(ours[slot], theirs) < 1e-6, slot


def test_jax_grows_eagerly_as_on_disk():
    ours = growkit.grow(to_jax(small(dtype="bfloat16")), PLANS["both"])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(ours))
    assert same(ours, on_disk("both", "params", "bfloat16"))
    for dtype in ("float32", "bfloat16"):
        row, leaf = TINY.table.rows[-1], small(dtype=dtype)["embed_out"]["weight"]
        ours = grow_leaf(jnp.asarray(leaf), row, PLANS["noise"])
        assert same(ours, on_disk("noise", "params", dtype)["embed_out"]["weight"])


def test_another_architectures_tree_grows_as_on_disk():
    model = LLAMA.model(layer=2, embed=24, kv=2, group=3, head_dim=4, mlp=20, vocab=24)
    arrays = random_tensors(model)
    tensors = {name: wrap_array(array) for name, array in arrays.items()}
    source = Source(
        Path("memory"), "huggingface", model.config(), {"params": tensors}, [], [], {}, dict
    )
    plans = [plan_width(model, embed="2x", heads=12, mlp=31), plan_depth(model, "2:3", "identity")]
    plan = dataclasses.replace(combine_plans("grow", plans, model), noise=0.2)
    grown = growkit.grow(source.stack(), plan)
    for name, recipe in surgery.prepare_growth(source, plan).recipes["params"].items():
        row, position = plan.grown.table.match(name)
        leaf = grown
        for key in row.path:
            leaf = leaf[key]
        assert np.array_equal(leaf[position], made(recipe)), name


def test_one_wrong_bit_is_seen():
    ours = growkit.grow(small(), PLANS["clone"])
    ours["embed_in"]["weight"] = np.nextafter(ours["embed_in"]["weight"], np.float32(9))
    assert not same(ours, on_disk("clone", "params"))


def test_growth_leaves_the_tree_as_it_was():
    tree, before = small(), small()
    growkit.grow(tree, PLANS["noise"])
    assert same(tree, before)


def adam(slot_of_values="params", count=70):
    """An optax state of adamw with a schedule, its moments those of `source`."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3))
    )
    state = optimizer.init(to_jax(small(slot_of_values)))
    return optax.tree.set(
        state, mu=to_jax(small("mu")), nu=to_jax(small("nu")), count=jnp.int32(count)
    )


@pytest.mark.parametrize("name", ["clone", "reset"])
def test_an_optax_state_grows_structurally(name):
    state = adam()
    grown = growkit.grow(state, PLANS[name])
    like = optax.adamw(optax.constant_schedule(1e-3)).init(to_jax(on_disk(name, "params")))
    assert jax.tree.structure(grown[1]) == jax.tree.structure(like)
    assert same(grown[1][0].mu, on_disk(name, "mu")) and same(grown[1][0].nu, on_disk(name, "nu"))
    # The count beside the moments is Adam's; the schedule's own goes on.
    assert (int(grown[1][0].count), int(grown[1][2].count)) == (
        (0, 70) if name == "reset" else (70, 70)
    )


@flax.struct.dataclass
class Trained:
    params: Any
    optimizer: Any
    name: str = flax.struct.field(pytree_node=False, default="run")
    count: int = 3


Pair = namedtuple("Pair", ["params", "rest"])
STATES = {
    "dict": lambda params, nu: {"a": {"params": params}, "nu": nu},
    "list": lambda params, nu: [params, {"nu": [None, nu]}],
    "tuple": lambda params, nu: (params, (), ({"nu": (nu,)}, None)),
    "named tuple": lambda params, nu: Pair(params, [Pair(np.zeros(3), {"nu": {"inner": nu}})]),
    "flax": lambda params, nu: Trained(
        params, optax.ScaleByAdamState(np.int32(3), params, nu)._replace(mu=None)
    ),
    "frozen": lambda params, nu: {"params": flax.core.freeze(params), "nu": nu},
    "within mu": lambda params, nu: {"params": params, "mu": Pair(1, {"nu": nu})},
}


@pytest.mark.parametrize("kind", STATES)
def test_trees_are_found_in_any_container(kind):
    state = STATES[kind](small(), small("nu"))
    expected = STATES[kind](on_disk("clone", "params"), on_disk("clone", "nu"))
    assert same(growkit.grow(state, PLANS["clone"]), expected)
    # The wrong moment would be seen.
    assert not same(
        growkit.grow(state, PLANS["clone"]), STATES[kind](on_disk("clone", "params"), small("nu"))
    )


def test_masked_parameters_pass_through():
    mask = jax.tree.map(lambda leaf: leaf.ndim > 2, small())
    masked = optax.masked(optax.scale_by_adam(), mask).init(to_jax(small()))
    grown = growkit.grow(masked, PLANS["both"])
    like = optax.masked(optax.scale_by_adam(), mask).init(to_jax(on_disk("both", "params")))
    assert same(grown, like)
    assert growkit.grow({"mask": mask, "params": small()}, PLANS["clone"])["mask"] == mask


def changed(change):
    tree = small()
    change(tree)
    return tree


REFUSED = {
    "a misspelt parameter": (
        lambda tree: tree["layers"]["mlp"].update(
            dense_h_to_4hh=tree["layers"]["mlp"].pop("dense_h_to_4h")
        ),
        [
            "'layers.mlp.dense_h_to_4hh.bias'",
            "nearest row is gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias",
        ],
    ),
    "a missing one": (lambda tree: tree.pop("embed_out"), ["lacks", "embed_out.weight"]),
    "another shape": (
        lambda tree: tree.update(embed_out={"weight": np.zeros((24, 17))}),
        ["'embed_out.weight' has shape [24, 17]", "[24, 16]"],
    ),
    "too few layers": (
        lambda tree: tree.update(layers=jax.tree.map(lambda leaf: leaf[:1], tree["layers"])),
        ["has shape [1,", "asks for [2,"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_tree_that_the_table_does_not_cover_is_refused(what):
    change, said = REFUSED[what]
    with pytest.raises(GrowkitError) as refusal:
        growkit.grow({"params": small(), "mu": changed(change)}, PLANS["clone"])
    assert all(words in str(refusal.value) for words in said), refusal.value


def test_a_state_without_parameters_is_refused():
    for state, said in (
        (
            {"encoder": {"embed_inn": np.zeros(3)}},
            "covers the parameter 'encoder.embed_inn'.*nearest row is",
        ),
        ([{"zzz": np.zeros(3)}], "covers the parameter 'zzz'"),
        ((np.zeros(3), None), "holds no parameters"),
    ):
        with pytest.raises(GrowkitError, match=said):
            growkit.grow(state, PLANS["clone"])


LIGHT = """
import sys, growkit
assert not {"numpy", "jax", "growkit.growth.tree"} & sys.modules.keys()
assert callable(growkit.grow) and "jax" not in sys.modules
try:
    growkit.grwo
except AttributeError as problem:
    print(problem)
"""
SHARDED = """
import sys
sys.path[:0] = ["tests", "tests/growth"]
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import growkit
from test_tree import PLANS, SLOTS, near, on_disk, same, small
assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))

def place(leaf):
    spec = ["data" if leaf.shape[0] % 2 == 0 else None, *[None] * (leaf.ndim - 2)]
    spec += ["model" if leaf.shape[-1] % 4 == 0 else None] if leaf.ndim > 1 else []
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

state = {slot: jax.tree.map(place, small(slot)) for slot in SLOTS}
assert len(state["params"]["embed_in"]["weight"].sharding.device_set) == 8
for name in ("noise", "mean-pad"):
    grown = jax.jit(lambda state: growkit.grow(state, PLANS[name]))(state)
    for slot in SLOTS:
        theirs = on_disk(name, slot)
        if name == "mean-pad":
            assert near(grown[slot], theirs) < 1e-6, slot
        else:
            assert same(grown[slot], theirs), slot
eager = growkit.grow(state["params"], PLANS["both"])
assert same(eager, on_disk("both", "params"))
print("sharded growth is the same")
"""


def python(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light_and_grow_is_both_module_and_function():
    assert "has no attribute 'grwo'" in python(LIGHT)


def test_arrays_sharded_over_devices_grow_the_same():
    found = python(
        SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu"
    )
    assert "sharded growth is the same" in found


TABLES = {
    "a norm of the mlp": "layers.{layer}.norm.scale  mlp  ones  norm",
    "a norm that writes the stream": "layers.{/layer}.norm.scale  embed  ones  norm",
}


@pytest.mark.parametrize("name", TABLES)
def test_padding_that_would_change_the_function_is_refused(name):
    model = growkit.describe_model(
        f"layers.{{/layer}}.down.kernel  /mlp embed  normal  matrix\n{TABLES[name]}\n"
        "norm.scale  embed  ones  norm",
        {"layer": 2, "embed": 8, "mlp": 12},
    )
    with pytest.raises(UsageError, match="embed cannot be padded: layers"):
        growkit.plan_width(model, embed=12, mlp=12)
    assert growkit.plan_width(model, embed=16, mlp=12).grown.embed == 16


def test_layers_are_silent_only_where_a_row_writes_the_stream():
    model = growkit.describe_model(
        "layers.{layer}.up.kernel  /embed mlp  normal  matrix", {"layer": 2, "embed": 8, "mlp": 12}
    )
    assert not growkit.plan_depth(model, "2:3", "identity").preserved


@pytest.mark.parametrize("stacked", [True, False])
def test_a_parameter_without_dimensions_is_silenced(stacked):
    model = growkit.describe_model("layers.{/layer}.gate  ()  normal  matrix", {"layer": 2})
    leaf = np.full(2, 0.7)
    tree = {"layers": {"gate": leaf}}
    if not stacked:
        tree = {"layers": {str(n): {"gate": np.asarray(leaf[n])} for n in range(2)}}
    grown = growkit.grow(tree, growkit.plan_depth(model, "2:3", "identity"))
    layers = grown["layers"]
    gates = layers["gate"] if stacked else [layers[str(n)]["gate"] for n in range(3)]
    assert np.array_equal(np.asarray(gates), [0.7, 0.0, 0.7])
