"""`train=new`: only layers that growth added are trained; nothing else changes by a bit."""

from __future__ import annotations

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import RECIPE, recipe, rows, send_at, state_of, values

from growkit.checkpoint.location import open_source, write_output
from growkit.cli import run as growkit_run
from growkit.errors import UsageError
from growkit.growth.depth import plan_depth
from growkit.models import FAMILIES
from growkit.models.gpt_neox import GPT_NEOX
from growkit.surgery.grow import prepare_growth
from trainer.config.sections import resolve
from trainer.model.decoder import init_params
from trainer.run.begin import begin, prepare
from trainer.run.checkpoint import find_last_step
from trainer.run.loop import Run
from trainer.run.stages import train
from trainer.step.optimizer import Multipliers
from trainer.step.part import Part
from trainer.step.update import init_state, make_train_step

pytestmark = pytest.mark.usefixtures("compiled_once")

IDENTITY = {"map": "2:4", "depth_method": "identity"}
NEW = (1, 3)


@pytest.fixture(scope="module")
def deep(small, tmp_path_factory):
    """The same with two layers inserted, on disk."""
    source = open_source(str(small))
    out = tmp_path_factory.mktemp("deep") / "grown"
    plan = plan_depth(source.model, "2:4", "identity")
    write_output(out, "checkpoint", prepare_growth(source, plan), [source])
    return out


def read_params(path):
    return {name: each.read() for name, each in open_source(str(path)).tensors["params"].items()}


def is_new(name):
    return any(f"layers.{layer}." in name for layer in NEW)


@pytest.mark.parametrize("where", ["on disk", "at the start"])
def test_only_new_layers_change(data, small, deep, tmp_path, where):
    start, section = (deep, {}) if where == "on disk" else (small, {"grow": IDENTITY})
    train(recipe(data, train="new", **section), tmp_path / "run", str(start))
    before, after = read_params(deep), read_params(tmp_path / "run")
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and all(is_new(name) for name in changed)
    # Writers begin at zero and move in both new layers.
    for layer in NEW:
        assert f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight" in changed
    losses = [float(row["loss"]) for row in rows(tmp_path / "run") if row["loss"]]
    assert len(losses) > 2 and np.isfinite(losses).all()


def read_state(run):
    """The bytes of every file of the state in a run's last checkpoint, by name."""
    state = run / "checkpoints" / str(find_last_step(run)) / "state"
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in state.rglob("*")
        if path.is_file() and path.parent != state
    }


def test_moments_are_of_the_new_layers_alone(data, deep, tmp_path, capsys):
    train(recipe(data, train="new"), tmp_path / "run", str(deep))
    assert f"train=new: {len(NEW)} of 4 layers are trained" in capsys.readouterr().err
    shapes = {
        name.removesuffix("/.zarray"): json.loads(content)["shape"]
        for name, content in read_state(tmp_path / "run").items()
        if name.endswith("/.zarray")
    }
    moments = {name: shape for name, shape in shapes.items() if "mu." in name or "nu." in name}
    assert moments and all(name.startswith(("new_mu.layers", "new_nu.layers")) for name in moments)
    assert all(shape[0] == len(NEW) for shape in moments.values())
    # A model without moments, to whoever reads it: no zeros that look like Adam's.
    source = open_source(str(tmp_path / "run"))
    assert list(source.tensors) == ["params"]
    assert source.lineage[-1]["config"]["train"] == "new"
    words = ["depth", "--map", "4:5", str(tmp_path / "run"), str(tmp_path / "more")]
    assert growkit_run(words) == 0


def test_a_resumed_run_is_the_uninterrupted_one(data, deep, tmp_path):
    settings = recipe(data, train="new")
    train(settings, tmp_path / "whole", str(deep))
    stopped = Run(begin(prepare(settings, tmp_path / "parts", str(deep))))
    assert send_at(stopped, 6, signal.SIGINT).go().signal == signal.SIGINT
    assert 6 <= find_last_step(tmp_path / "parts") < 12
    assert train(settings, tmp_path / "parts", str(deep)).signal is None
    assert read_state(tmp_path / "parts") == read_state(tmp_path / "whole")
    assert read_params(tmp_path / "parts").keys() == read_params(deep).keys()


def test_what_is_new_stays_new_until_all_is_trained(data, deep, tmp_path):
    train(recipe(data, train="new"), tmp_path / "first", str(deep))
    train(recipe(data, train="new"), tmp_path / "second", str(tmp_path / "first"))
    before, after = read_params(tmp_path / "first"), read_params(tmp_path / "second")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and all(is_new(name) for name in changed)
    train(recipe(data), tmp_path / "all", str(tmp_path / "second"))
    assert state_of(tmp_path / "all")["count"] == 12, "moments of all begin at zero"
    with pytest.raises(UsageError, match="all parameters were trained since the model was grown"):
        train(recipe(data, train="new"), tmp_path / "x", str(tmp_path / "all"))


def test_where_nothing_is_new_it_is_refused(data, small, tmp_path):
    said = "train=new trains the layers that growth added, and nothing is new"
    with pytest.raises(UsageError, match=f"{said}: no growth came before"):
        train(recipe(data, train="new"), tmp_path / "run", str(small))
    with pytest.raises(UsageError, match=f"{said}: no growth came before"):
        train(values(data, **RECIPE, train="new"), tmp_path / "run")
    with pytest.raises(UsageError, match=f"{said}: the growths .* added none"):
        train(recipe(data, train="new", grow={"embed": "2x"}), tmp_path / "run", str(small))
    with pytest.raises(UsageError, match="with grow.at=4 a run grows later"):
        grow = IDENTITY | {"at": "4"}
        train(recipe(data, train="new", grow=grow), tmp_path / "run", str(small))
    with pytest.raises(UsageError, match="train must be one of all, new, got 'old'"):
        train(recipe(data, train="old"), tmp_path / "run", str(small))
    assert not (tmp_path / "run").exists()


LLAMA = FAMILIES["llama"].model(
    layer=4, embed=24, kv=2, group=2, head_dim=6, mlp=32, vocab=40, context=16, tied=True
)
NEOX = GPT_NEOX.model(layer=4, embed=16, head=2, mlp=12, vocab=40, context=16, rotary_pct=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["gpt_neox", "llama"])
def test_the_step_is_optax_masked(model):
    """New layers move as they do under the whole step with all other updates set to zero."""
    settings = {
        "precision": {"compute": "float32"},
        "dropout": {"hidden": 0.0, "attention": 0.0},
        "schedule": {"kind": "constant", "warmup": 0, "steps": 9},
        # Decay has no multiplier, and the norm that is clipped is the trained layers' alone.
        # Biases of keys may have no gradient but rounding, which Adam follows at a small eps.
        "optimizer": {"clip": 0.0, "learning_rate": 1e-2, "weight_decay": 0.0, "eps": 1e-4},
    }
    config = resolve(settings, takes_model=True)
    part = Part(NEW)
    trained = np.isin(np.arange(4), NEW).astype(np.float32)

    def mask(row):
        return trained.reshape(-1, *[1] * len(row.shape(model.sizes))) if row.stacked else 0.0

    params = init_params(model, config.precision, 0)
    ours = init_state(config, model, jax.tree.map(jnp.array, params), part)
    theirs = init_state(config, model, jax.tree.map(jnp.array, params))
    step = make_train_step(config, model, part=part)
    masked = make_train_step(config, model, Multipliers(learning_rate=model.table.tree(mask)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 2, 17)))
    for _ in range(3):
        ours, _ = step(ours, tokens)
        theirs, _ = masked(theirs, tokens)
    leaves = (jax.tree.leaves(state) for state in (ours.params, theirs.params, params))
    for one, other, begun in zip(*leaves, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)
        assert np.array_equal(one, begun) == (one.shape[0] != 4)
    moments = optax.tree.get(ours.optimizer, "nu")
    assert set(moments) == {"layers"}
    whole = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(moments)) == whole // 2


def test_factors_by_unit_are_those_of_the_trained_layers():
    factors = {"layers": {"weight": np.arange(4.0)[:, None]}}
    ones = NEOX.table.tree(lambda row: np.arange(4.0) if row.stacked else 1.0)
    found = Part(NEW).select_factors(NEOX.table, ones)
    assert set(found) == {"layers"}
    assert all(leaf.tolist() == [1.0, 3.0] for leaf in jax.tree.leaves(found))
    same = NEOX.table.tree(lambda row: np.ones([1, 1]) if row.stacked else 1.0)
    assert all(
        leaf.shape == (1, 1) for leaf in jax.tree.leaves(Part(NEW).select_factors(NEOX.table, same))
    )
    assert Part().select_factors(NEOX.table, factors) is factors
