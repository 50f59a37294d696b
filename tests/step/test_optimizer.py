"""AdamW is optax's, its multipliers are growth's: a cloned model trains as the small one did."""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from growkit.growth.axes import tile
from growkit.growth.padding import MU, NU, VALUE
from growkit.growth.plan import Plan
from growkit.growth.rule import grow_array
from growkit.growth.shares import share_scale
from growkit.models.gpt_neox import GPT_NEOX
from trainer.config.sections import Batch, Config, Dropout, Optimizer, Precision, Schedule
from trainer.model.parameters import find_row
from trainer.run.state import from_tree, to_tree
from trainer.step.optimizer import Multipliers, adamw, clip_by_norm, global_norm, select_decayed
from trainer.step.update import init_state, make_train_step

TINY = GPT_NEOX.model(
    layer=2, embed=16, head=2, mlp=32, vocab=64, context=16, rotary_pct=0.5, tied=False
)
MATRICES = {"embed_in", "embed_out", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
SETTINGS = Optimizer(learning_rate=1e-2, eps=1e-5, weight_decay=0.3, clip=1.0)
RATE, STEPS = 1e-2, 20


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@lru_cache
def parameters(model=TINY):
    """A parameter tree of random numbers, larger than a new model's, so that errors show."""
    random = np.random.default_rng(0)
    tree = {}
    for row in model.table.rows:
        node = tree
        for key in row.path[:-1]:
            node = node.setdefault(key, {})
        shape = row.stacked_shape(model.sizes)
        node[row.path[-1]] = 0.1 * random.normal(size=shape) + (row.begins == "ones")
    return tree


def gradients(step):
    """Random gradients, in some steps above the clip and in others below."""
    random = np.random.default_rng(step)
    size = 10.0 ** random.uniform(-3, 0)
    return jax.tree.map(lambda leaf: size * random.normal(size=leaf.shape), parameters())


@lru_cache
def update_step(clip):
    """One update, compiled once for all numbers."""

    def update(numbers, trees, gradient, state, params):
        optimizer = adamw(Optimizer(clip=clip, **numbers), TINY, Multipliers(*trees))
        direction, state = optimizer.update(gradient, state, params)
        return jax.tree.map(lambda param, change: param - RATE * change, params, direction), state

    return jax.jit(update)


def updated(multipliers=None, steps=STEPS, make=update_step, **change):
    """The parameters after some updates; `change` replaces settings."""
    settings = dataclasses.asdict(dataclasses.replace(SETTINGS, **change))
    update = make(settings.pop("clip"))
    numbers = {name: value for name, value in settings.items() if isinstance(value, float)}
    multipliers = multipliers or Multipliers()
    trees = (multipliers.learning_rate, multipliers.eps, multipliers.clip)
    params, state = parameters(), adamw(SETTINGS, TINY).init(parameters())
    for step in range(steps):
        params, state = update(numbers, trees, gradients(step), state, params)
    return params


def difference(ours, theirs):
    gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours, theirs)
    return max(jax.tree.leaves(gaps))


def is_matrix(path):
    return path[-1].key == "weight" and path[-2].key in MATRICES


@lru_cache
def optax_result():
    mask = jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), parameters())
    chain = optax.chain(
        optax.clip_by_global_norm(SETTINGS.clip),
        optax.adamw(
            RATE,
            SETTINGS.beta1,
            SETTINGS.beta2,
            SETTINGS.eps,
            weight_decay=SETTINGS.weight_decay,
            mask=mask,
        ),
    )
    params, state = parameters(), chain.init(parameters())
    update = jax.jit(chain.update)
    for step in range(STEPS):
        changes, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, changes)
    return params


def test_without_multipliers_it_is_optax_adamw():
    assert difference(updated(), optax_result()) < 1e-12


@pytest.mark.parametrize(
    "change",
    [{"eps": 2e-5}, {"beta1": 0.89}, {"beta2": 0.96}, {"weight_decay": 0.29}, {"clip": 0.0}],
    ids=str,
)
def test_another_setting_is_not(change):
    assert difference(updated(**change), optax_result()) > 1e-9


def test_decay_of_everything_is_not(monkeypatch):
    everything = jax.tree.map(lambda _: True, parameters())
    monkeypatch.setattr("trainer.step.optimizer.select_decayed", lambda *_: everything)
    assert difference(updated(make=update_step.__wrapped__), optax_result()) > 1e-9


@pytest.mark.parametrize("tied", [True, False])
def test_decay_acts_on_the_matrices(tied):
    model = TINY.change(tied=tied)
    mask = select_decayed(model)
    assert jax.tree.structure(mask) == jax.tree.structure(parameters(model))
    for path, decayed in jax.tree_util.tree_leaves_with_path(mask):
        assert decayed == is_matrix(path), path


def test_multipliers_of_one_change_nothing():
    ones = jax.tree.map(np.ones_like, parameters())
    assert difference(updated(Multipliers(ones, ones, ones)), optax_result()) < 1e-12


def test_the_learning_rate_multiplier_acts_on_adam_and_not_on_decay():
    thirds = jax.tree.map(lambda _: 1 / 3, parameters())
    ours = updated(Multipliers(learning_rate=thirds), steps=1)
    adam, both = updated(steps=1, weight_decay=0.0), updated(steps=1)
    expected = jax.tree.map(
        lambda start, a, b: start + (a - start) / 3 + (b - a), parameters(), adam, both
    )
    assert difference(ours, expected) < 1e-12
    multiplied_whole = jax.tree.map(lambda start, b: start + (b - start) / 3, parameters(), both)
    assert difference(ours, multiplied_whole) > 1e-4


def test_multipliers_may_differ_by_unit():
    """One factor for each unit of embed_in's second axis multiplies that column's update."""
    factors = np.linspace(0.5, 2.0, TINY.embed)
    ones = jax.tree.map(lambda _: 1.0, parameters())
    by_unit = Multipliers(learning_rate=ones | {"embed_in": {"weight": factors}})

    def embedding(tree):
        return tree["embed_in"]["weight"]

    start = embedding(parameters())
    ours = embedding(updated(by_unit, steps=1, weight_decay=0.0))
    plain = embedding(updated(steps=1, weight_decay=0.0))
    np.testing.assert_allclose(ours - start, (plain - start) * factors, rtol=0, atol=1e-12)


def test_the_eps_multiplier_is_another_eps():
    tenths = jax.tree.map(lambda _: 0.1, parameters())
    ours = updated(Multipliers(eps=tenths))
    assert difference(ours, updated(eps=SETTINGS.eps / 10)) < 1e-12
    assert difference(ours, updated()) > 1e-6


def test_clip_weights_weigh_squares():
    gradient = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    assert float(global_norm(gradient)) == 13.0
    weights = {"a": 4.0, "b": jnp.array([0.25])}
    norm = math.sqrt(4 * 25 + 0.25 * 144)
    assert float(global_norm(gradient, weights)) == pytest.approx(norm, rel=1e-15)
    clipped, _ = clip_by_norm(2.0, weights).update(gradient, None)
    np.testing.assert_allclose(clipped["a"], np.array([3.0, 4.0]) * 2 / norm, rtol=1e-15)
    kept, _ = clip_by_norm(norm + 1, weights).update(gradient, None)
    np.testing.assert_array_equal(kept["a"], gradient["a"])


def test_a_gradient_of_zero_is_not_clipped_to_nan():
    clipped, _ = clip_by_norm(1.0).update({"a": jnp.zeros(3)}, None)
    assert np.array_equal(clipped["a"], np.zeros(3))


# Exact growth: a model cloned in width and trained on with its multipliers stays the small model.

MAPS = {"embed": tile(16, 32), "head": tile(2, 4), "mlp": tile(32, 96)}
BEFORE, AFTER = 5, 40
CONFIG = Config(
    dropout=Dropout(0.0, 0.0, 0.0),
    precision=Precision("float64", "float64"),
    batch=Batch(4, 1),
    optimizer=Optimizer(learning_rate=1e-2, eps=1e-4, weight_decay=0.1, clip=0.5),
    schedule=Schedule(steps=60, warmup=8),
)


def by_row(model, tree, leaf_of):
    """A tree of the parameters' structure, each leaf made by `leaf_of(row, leaf)`."""
    keys = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (tuple(key.key for key in path), leaf), tree
    )
    return jax.tree.map(
        lambda pair: leaf_of(find_row(model, pair[0]), pair[1]),
        keys,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def cloned(model, tree, moment):
    plan = Plan("width", "clone", model, enlarged(model), MAPS)

    def leaf_of(row, leaf):
        if not row.stacked:
            return grow_array(leaf, row, plan, moment)
        layers = [grow_array(layer, row, plan, moment, (i,)) for i, layer in enumerate(leaf)]
        return np.stack(layers)

    return by_row(model, jax.device_get(tree), leaf_of)


def scales(model, tree, moment):
    """What growth multiplies each parameter by: one number, because tiles have equal shares."""

    def leaf_of(row, leaf):
        (part,) = row.parts
        scale = share_scale(part.axes, MAPS, moment)
        assert (scale == scale.flat[0]).all()
        return float(scale.flat[0])

    return by_row(model, tree, leaf_of)


def multipliers_of(model, tree):
    value = scales(model, tree, VALUE)
    mu = scales(model, tree, MU)
    # The weight of a squared gradient: copies of the axes written over those of the axes read.
    clip = jax.tree.map(lambda read, written: read / written, value, mu)
    return Multipliers(learning_rate=value, eps=mu, clip=clip)


def tokens(step):
    return np.random.default_rng(step).integers(0, TINY.vocab, (1, 4, TINY.context + 1))


def losses(step, state):
    """The losses and gradient norms of AFTER more steps.

    They begin from a copy of the state, because a step's argument is donated.
    """
    state = jax.tree.map(jnp.array, jax.device_get(state))
    found, norms = [], []
    for number in range(AFTER):
        state, metrics = step(state, tokens(BEFORE + number))
        found.append(float(metrics["loss"]))
        norms.append(float(metrics["gradient_norm"]))
    return np.array(found), np.array(norms)


@lru_cache
def small(tied):
    """A small model after a few steps, so with moments and counts; and the losses that follow."""
    model = TINY.change(tied=tied)
    state = init_state(CONFIG, model, jax.tree.map(jnp.asarray, parameters(model)))
    step = make_train_step(CONFIG, model)
    for number in range(BEFORE):
        state, _ = step(state, tokens(number))
    return model, state, *losses(step, state)


@lru_cache
def clone_step(tied=False):
    """The clone's train step, with multipliers as an argument, so that it is compiled once."""
    model = enlarged(small(tied)[0])

    @jax.jit
    def step(multipliers, state, tokens):
        return make_train_step(CONFIG, model, Multipliers(**multipliers))(state, tokens)

    return step


def with_multipliers(tied=False, **change):
    """The clone's train step with the multipliers of its growth; `change` replaces some."""
    model, state, *_ = small(tied)
    multipliers = dataclasses.replace(multipliers_of(model, state.params), **change)
    return partial(clone_step(tied), vars(multipliers))


def enlarged(model):
    return model.resize(model.sizes | {axis: len(axis_map) for axis, axis_map in MAPS.items()})


def grown(tied=False, params=VALUE, mu=MU, nu=NU):
    """The clone's state; `params`, `mu` and `nu` are the rules by which each grows."""
    model, state, *_ = small(tied)
    tree = to_tree(state)
    for slot, moment in {"params": params, "mu": mu, "nu": nu}.items():
        tree[slot] = cloned(model, tree[slot], moment)
    return from_tree(tree, state)


@pytest.mark.parametrize("tied", [True, False])
def test_a_clone_trains_as_the_small_model(tied):
    *_, expected, norms = small(tied)
    assert (norms > CONFIG.optimizer.clip).any(), "the clip must act for this to prove anything"
    assert expected[0] - expected[-1] > 0.01, "and the model must learn"
    found, found_norms = losses(with_multipliers(tied), grown(tied))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found_norms, norms, rtol=1e-10)


def differs(step, state):
    """Whether the losses are visibly not the small model's."""
    expected = small(False)[2]
    return np.abs(losses(step, state)[0] - expected).max() > 1e-7


@pytest.mark.parametrize("left_out", ["learning_rate", "eps", "clip"])
def test_without_one_of_the_multipliers_it_does_not(left_out):
    ones = jax.tree.map(lambda _: 1.0, small(False)[1].params)
    assert differs(with_multipliers(**{left_out: ones}), grown())


def test_with_the_decay_multiplied_too_it_does_not(monkeypatch):
    """Parameter groups decay at the multiplied rate; exact growth does not."""
    model, state, *_ = small(False)
    multipliers = multipliers_of(model, state.params)
    shrunk = jax.tree.map(
        lambda factor, decayed: factor * decayed, multipliers.learning_rate, select_decayed(model)
    )

    def decayed(decay, mask):
        return optax.stateless(
            lambda updates, params: jax.tree.map(
                lambda u, s, p: u + decay * s * p, updates, shrunk, params
            )
        )

    monkeypatch.setattr("trainer.step.optimizer.optax.add_decayed_weights", decayed)
    inner = adamw(CONFIG.optimizer, enlarged(model), multipliers).init(grown().params)
    state = from_tree(to_tree(grown()), grown()._replace(optimizer=inner))
    assert differs(make_train_step(CONFIG, enlarged(model), multipliers), state)


@pytest.mark.parametrize("wrong", [{"mu": VALUE}, {"nu": MU}, {"params": MU}], ids=str)
def test_with_a_slot_grown_by_another_rule_it_does_not(wrong):
    assert differs(with_multipliers(), grown(**wrong))


@pytest.mark.parametrize("counter", ["count", "schedule_step"])
def test_with_a_count_begun_anew_it_does_not(counter):
    tree = to_tree(grown()) | {counter: jnp.zeros((), jnp.int32)}
    assert differs(with_multipliers(), from_tree(tree, grown()))
