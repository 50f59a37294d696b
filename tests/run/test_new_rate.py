"""`optimizer.new`: a warm-up and a factor for what growth made new, and for nothing else."""

from __future__ import annotations

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import NO_DROPOUT, RECIPE, STEPS, recipe, same_state, send_at, state_of, values

import growkit
from growkit.checkpoint.location import open_source, write_output
from growkit.errors import UsageError
from growkit.growth.depth import plan_depth
from growkit.growth.new import find_new_units, mark_new
from growkit.growth.plan import combine_plans
from growkit.growth.width import plan_width
from growkit.models.gpt_neox import GPT_NEOX
from growkit.surgery.grow import prepare_growth
from trainer.config.sections import NewRate, resolve
from trainer.model.decoder import init_params
from trainer.run.anneal import plan_annealing
from trainer.run.begin import begin, prepare
from trainer.run.checkpoint import find_last_step
from trainer.run.growth import describe_new
from trainer.run.loop import Run
from trainer.run.stages import train
from trainer.step.optimizer import Multipliers
from trainer.step.part import ALL, Part
from trainer.step.schedule import encode_new_rate, evaluate_new_rate
from trainer.step.update import init_state, make_train_step

pytestmark = pytest.mark.usefixtures("compiled_once")

DEPTH = {"map": "2:3"}
NEW = {"rewarmup": 3, "rate": 2.0}
NEOX = GPT_NEOX.model(layer=2, embed=16, head=2, mlp=12, vocab=40, context=16, rotary_pct=0.5)
# Layers 1 and 3 are new, and in all others the second half of every axis.
PLAN = combine_plans(
    "grow", [plan_depth(NEOX, "2:4", "identity"), plan_width(NEOX, embed="2x")], NEOX
)


def take_step(params, rate=None, all_new=False):
    """The parameters after one step. rate: of what is new; None without optimizer.new."""
    settings = {
        "precision": {"compute": "float32"},
        "dropout": NO_DROPOUT,
        "schedule": {"kind": "constant", "warmup": 0, "steps": 9},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
    }
    if rate is not None:
        settings["optimizer"]["new"] = {"rate": rate}
    config = resolve(settings, takes_model=True)
    model = PLAN.grown
    units = find_new_units([PLAN])
    marks = model.table.tree(lambda row: mark_new(row, model, units))
    if all_new:
        marks = model.table.tree(mark_all)
    multipliers = None if rate is None else Multipliers(new=marks)
    state = init_state(config, model, jax.tree.map(jnp.array, params))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (1, 2, 17)))
    return make_train_step(config, model, multipliers)(state, tokens)[0].params


def mark_all(row):
    return (np.ones([1] * len(row.stacked_shape(PLAN.grown.sizes)), bool),)


def draw(model):
    return init_params(model, resolve({}, takes_model=True).precision, 0)


def find_old():
    """What is old: where growth that keeps first copies' moments keeps one."""
    ones = jax.tree.map(np.ones_like, draw(NEOX))
    first = growkit.set_options(PLAN, moments="first")
    grown = growkit.grow({"params": ones, "mu": ones}, first)
    return jax.tree.map(lambda leaf: leaf != 0, grown["mu"])


def require_same_bits(old, ours, theirs):
    for leaf, one, other in zip(*map(jax.tree.leaves, (old, ours, theirs)), strict=True):
        assert np.array_equal(np.asarray(one)[leaf], np.asarray(other)[leaf])


def test_old_numbers_keep_their_bits_and_new_ones_take_the_factor():
    params, old = draw(PLAN.grown), find_old()
    plain, doubled = take_step(params), take_step(params, 2.0)
    require_same_bits(old, plain, doubled)
    kept, moved = 0, 0.0
    leaves = map(jax.tree.leaves, (old, params, plain, doubled))
    for leaf, begun, once, twice in zip(*leaves, strict=True):
        begun = np.asarray(begun)[~leaf]
        first, second = np.asarray(once)[~leaf] - begun, np.asarray(twice)[~leaf] - begun
        # Adam's direction is doubled and the decay is not: its part of a step is 1e-3 |p|.
        assert (np.abs(second - 2 * first) <= 1e-3 * np.abs(begun) + 1e-6).all()
        kept += leaf.sum()
        moved += np.abs(second - first).sum()
    assert kept and moved > 1.0
    # Were all of it new, old numbers would not keep their bits.
    with pytest.raises(AssertionError):
        require_same_bits(old, plain, take_step(params, 2.0, all_new=True))


@pytest.mark.parametrize(
    "settings,grown_at,factors",
    [
        (NewRate(rewarmup=4), 6, [0.25, 0.5, 0.75, 1.0, 1.0]),
        (NewRate(rewarmup=4, rate=2.0), 6, [0.5, 1.0, 1.5, 2.0, 2.0]),
        (NewRate(rate=0.5), 6, [0.5] * 5),
        # A schedule that was begun since: from its first step.
        (NewRate(rewarmup=9), None, [7 / 9, 8 / 9, 1.0, 1.0, 1.0]),
    ],
)
def test_the_factor(settings, grown_at, factors):
    numbers = encode_new_rate(settings, grown_at)
    assert np.allclose([evaluate_new_rate(numbers, step) for step in range(6, 11)], factors)


def test_the_factor_is_said_at_the_start():
    config = resolve({"optimizer": {"new": NEW}, "train": "new"}, takes_model=True)
    assert list(describe_new(config, Part((1, 3)), PLAN.grown, True)) == [
        "train=new: 2 of 4 layers are trained",
        "optimizer.new: learning rate x 2 for what growth added, from 0 over 3 steps",
    ]
    assert list(describe_new(config, ALL, PLAN.grown, False)) == []


def with_new(root, make=values, **sections):
    settings = RECIPE | {"optimizer": {"new": NEW}, "log": {"every": 1}} | sections
    return make(root, **settings)


@pytest.fixture(scope="module")
def within(data, tmp_path_factory):
    """A run that grows at its sixth step, with a rate of its own for the new layer."""
    out = tmp_path_factory.mktemp("within") / "run"
    train(with_new(data, grow=DEPTH | {"at": 6}, checkpoint={"every": 6}), out)
    return out


@pytest.mark.slow
def test_growth_on_the_way_is_growth_on_disk(data, within, tmp_path):
    source = open_source(f"{within}@6")
    assert source.model.layer == 2
    plan = plan_depth(source.model, "2:3")
    write_output(tmp_path / "grown", "checkpoint", prepare_growth(source, plan), [source])
    ends = {}
    for name, new in (("same", NEW), ("none", {})):
        sections = {"optimizer": {"new": new}, "schedule": {"continued": True}}
        settings = with_new(data, recipe, checkpoint={"every": 6}, **sections)
        train(settings, tmp_path / name, str(tmp_path / "grown"))
        ends[name] = state_of(f"{tmp_path / name}@6")
    ours = state_of(within)
    assert ours.pop("step") == STEPS and [end.pop("step") for end in ends.values()] == [6, 6]
    assert same_state(ours, ends["same"]) and not same_state(ours, ends["none"])


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(data, within, tmp_path):
    settings = with_new(data, grow=DEPTH | {"at": 6}, checkpoint={"every": 6})
    out = tmp_path / "parts"
    Run(begin(prepare(settings, out))).go()
    stopped = Run(begin(prepare(settings, out)))
    assert send_at(stopped, 8, signal.SIGINT).go().signal == signal.SIGINT
    assert 8 <= find_last_step(out) < STEPS
    assert train(settings, out).signal is None
    assert same_state(state_of(out), state_of(within))


@pytest.mark.slow
def test_at_the_start_with_new_layers_alone_and_annealed(data, small, tmp_path):
    grow = {"map": "2:3", "depth_method": "identity"}
    ends = {}
    for name, new in (("plain", {}), ("warm", NEW), ("one", {"rate": 1.0, "rewarmup": 1})):
        settings = with_new(data, recipe, grow=grow, train="new", optimizer={"new": new})
        train(settings, tmp_path / name, str(small))
        tensors = open_source(str(tmp_path / name)).tensors["params"]
        ends[name] = {key: tensor.read() for key, tensor in tensors.items()}
    assert same_state(ends["plain"], ends["one"])
    differ = {
        key for key in ends["plain"] if not np.array_equal(ends["plain"][key], ends["warm"][key])
    }
    assert differ and all("layers.1." in key for key in differ)
    # The factor stays while new layers alone are trained; the warm-up is over.
    annealed, _ = plan_annealing(str(tmp_path / "warm"), 0.0, 10_000, [])
    assert annealed["optimizer"]["new"] == {"rate": 2.0}


@pytest.mark.slow
def test_after_a_training_of_all_nothing_is_new(data, within, tmp_path):
    with pytest.raises(UsageError, match="nothing is new: all parameters were trained since"):
        train(with_new(data, recipe), tmp_path / "run", str(within))
    annealed, _ = plan_annealing(str(within), 0.0, 10_000, [])
    assert resolve(annealed).optimizer.new == NewRate()


def test_where_nothing_is_new_it_is_refused(data, small, tmp_path):
    said = "optimizer.new sets the learning rate of what growth added, and nothing is new"
    with pytest.raises(UsageError, match=f"{said}: no growth came before"):
        train(with_new(data, recipe), tmp_path / "run", str(small))
    with pytest.raises(UsageError, match=f"{said}: no growth came before"):
        train(with_new(data), tmp_path / "run")
    for new, problem in (
        ({"rewarmup": -1}, "optimizer.new.rewarmup must be at least 0, got -1"),
        ({"rate": 0}, "optimizer.new.rate must be above 0, got 0.0"),
        ({"rate": -2.0}, "optimizer.new.rate must be above 0, got -2.0"),
        ({"warmup": 3}, "unknown key optimizer.new.warmup; the keys here are rewarmup, rate"),
    ):
        with pytest.raises(UsageError, match=problem):
            train(
                with_new(data, recipe, grow=DEPTH, optimizer={"new": new}),
                tmp_path / "run",
                str(small),
            )
    assert not (tmp_path / "run").exists()
