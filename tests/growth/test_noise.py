"""Random numbers that are the same everywhere, and noise that lets training tell copies apart."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growkit.growth.noise import centred, threefry, uniform
from growkit.growth.tree import grow
from growkit.growth.width import plan_width
from growkit.models.gpt_neox import GPT_NEOX
from trainer.config.sections import Batch, Config, Dropout, Optimizer, Precision, Schedule
from trainer.model.decoder import init_params
from trainer.step.update import init_state, make_train_step

# Random123's known answers for Threefry-2x32: rounds, key, counter, first word.
KNOWN = [
    (20, (0x00000000, 0x00000000), (0x00000000, 0x00000000), 0x6B200159),
    (20, (0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), 0x1CB996FC),
    (20, (0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), 0xC4923A9C),
    (13, (0x00000000, 0x00000000), (0x00000000, 0x00000000), 0x9D1C5EC6),
    (13, (0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), 0xFD36D048),
    (13, (0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), 0xBA3E4725),
]


@pytest.mark.parametrize("rounds,key,counter,word", KNOWN)
def test_known_answers(rounds, key, counter, word):
    high, low = (np.array([half], np.uint32) for half in counter)
    with np.errstate(over="ignore"):
        assert threefry(key, high, low, rounds=rounds)[0] == word
        # One bit of the key or the counter is another number.
        assert threefry((key[0] ^ 1, key[1]), high, low, rounds=rounds)[0] != word
        assert threefry(key, high, low ^ np.uint32(1), rounds=rounds)[0] != word
        assert threefry(key, high, low, rounds=rounds - 1)[0] != word


@pytest.mark.parametrize(
    "make", [centred, lambda *args: uniform(*args, spread=0.02)], ids=["centred", "uniform"]
)
def test_numpy_and_jax_give_the_same_bits(make):
    expected = make(3, "a", (7, 11, 13))
    assert expected.dtype == np.float32
    assert np.array_equal(make(3, "a", (7, 11, 13), jnp), expected)
    assert np.array_equal(jax.jit(lambda: make(3, "a", (7, 11, 13), jnp))(), expected)
    assert not np.array_equal(make(4, "a", (7, 11, 13), jnp), expected)


def test_two_constants_multiplied_apart_are_not_the_same_bits():
    """Why `uniform` takes the spread: a compiler folds what is multiplied afterwards into one
    constant.
    """
    apart = uniform(3, "a", (1000,)) * np.float32(0.02)
    assert not np.array_equal(apart, uniform(3, "a", (1000,), spread=0.02))


def test_a_shape_is_only_a_view():
    flat = uniform(3, "a", (60,))
    assert np.array_equal(uniform(3, "a", (3, 4, 5)).ravel(), flat)
    assert np.array_equal(uniform(3, "a", (10,)), flat[:10])


def test_mean_variance_and_bounds():
    numbers = uniform(0, "moments", (1 << 18,), spread=0.5).astype(np.float64) / 0.5
    error = 1 / np.sqrt(len(numbers))
    assert abs(numbers.mean()) < 4 * error and abs(numbers.var() - 1) < 4 * error
    assert 1.73 < numbers.max() < np.sqrt(3) + 1e-6 and -np.sqrt(3) - 1e-6 < numbers.min() < -1.73
    counts = np.histogram(numbers, 16, (-np.sqrt(3), np.sqrt(3)))[0]
    assert ((counts / (1 << 14) - 1) ** 2).sum() * (1 << 14) < 40, (
        "chi squared, 15 degrees of freedom"
    )


def test_names_and_seeds_are_independent():
    streams = [uniform(seed, name, (1 << 14,)) for seed in (0, 1) for name in ("a", "b", "a noise")]
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlations).max() < 5 / np.sqrt(1 << 14)
    assert np.abs(np.corrcoef(streams[0][:-1], streams[0][1:])[0, 1]) < 5 / np.sqrt(1 << 14)
    assert np.array_equal(uniform(0, "a", (1 << 14,)), streams[0])


def test_differences_of_copies_are_exact():
    numbers = centred(0, "a", (1 << 12,))
    ours = numbers - np.roll(numbers, 1)
    assert np.array_equal(ours, numbers.astype(np.float64) - np.roll(numbers.astype(np.float64), 1))


def test_tensors_too_large_for_the_counter_are_refused():
    with pytest.raises(ValueError, match="2\\*\\*32 - 1"):
        uniform(0, "a", (1 << 16, 1 << 16))


TINY = GPT_NEOX.model(
    layer=1,
    embed=8,
    head=2,
    mlp=8,
    vocab=16,
    context=8,
    rotary_pct=0.5,
    tied=False,
    initializer_range=0.1,
)
CONFIG = Config(
    dropout=Dropout(0.0, 0.0, 0.0),
    precision=Precision("float64", "float64"),
    batch=Batch(2, 1),
    optimizer=Optimizer(learning_rate=1e-2, eps=1e-8, weight_decay=0.1, clip=1.0),
    schedule=Schedule(steps=60, warmup=2),
)
PLANS = {
    "exact": plan_width(TINY, embed="2x"),
    "noise": replace(plan_width(TINY, embed="2x"), noise=0.1),
    "uneven shares": plan_width(TINY, embed="2x", spread=0.2),
}


@cache
def train_step():
    """One program for all plans: their models are the same."""
    return make_train_step(CONFIG, PLANS["exact"].grown)


def gaps(params):
    """How far the copies of embed, and of each mlp unit in what it computes, are apart (weights of
    copies summed).
    """
    embed = np.asarray(params["embed_in"]["weight"]).reshape(TINY.vocab, 2, TINY.embed)
    read = np.asarray(params["layers"]["mlp"]["dense_h_to_4h"]["weight"])
    mlp = read.reshape(2, TINY.mlp, 2, TINY.embed).sum(2)
    return {"embed": np.abs(embed[:, 0] - embed[:, 1]).max(), "mlp": np.abs(mlp[0] - mlp[1]).max()}


@pytest.mark.parametrize(
    "name,tied", [("exact", {"embed", "mlp"}), ("noise", set()), ("uneven shares", {"embed"})]
)  # fmt: skip
def test_noise_or_uneven_shares_let_training_separate_copies(name, tied):
    plan = PLANS[name]
    assert plan.preserved
    with jax.enable_x64(True):
        params = jax.tree.map(np.asarray, init_params(TINY, CONFIG.precision, 0))
        state = init_state(CONFIG, plan.grown, jax.tree.map(jnp.asarray, grow(params, plan)))
        assert max(gaps(state.params).values()) < 1e-15
        for number in range(40):
            tokens = np.random.default_rng(number).integers(0, TINY.vocab, (1, 2, TINY.context + 1))
            state, _ = train_step()(state, tokens)
    # After 40 steps: noise embed 0.11, mlp 0.11; uneven shares mlp 0.04; the others 0.0.
    for axis, found in gaps(state.params).items():
        assert found < 1e-9 if axis in tied else found > 1e-3, (axis, found)
        assert (axis in plan.tied_copies) == (axis in tied)
