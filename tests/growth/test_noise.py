"""Random numbers that are the same everywhere, and noise that lets training tell copies apart."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growkit.errors import UsageError
from growkit.growth.noise import centred, threefry, uniform
from growkit.growth.plan import set_options
from growkit.growth.separation import (
    SquareSum,
    find_root_mean_square,
    parse_noise,
    state_noise,
)
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


# Noise in units of a tensor's own root mean square


def measure(*pieces):
    squares = SquareSum()
    for piece in pieces:
        squares.add(piece)
    return squares.root_mean


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e3])
def test_a_root_mean_square_is_the_same_in_any_pieces(dtype, size):
    numbers = np.random.default_rng(0).normal(size=(37, 5)) * size
    array = numbers.astype(jnp.dtype(dtype))
    found = measure(array)
    wanted = np.sqrt(np.square(array.astype(np.float64)).mean())
    assert found == pytest.approx(wanted, rel=2**-8)
    # At most 8 bits: a whole number of 256ths of its power of two.
    assert np.frexp(found)[0] * 2**8 % 1 == 0
    backwards = [array[row : row + 1, ::-1] for row in reversed(range(37))]
    assert measure(*backwards) == measure(array[:20], array[20:]) == found
    with jax.enable_x64(True):
        jitted = jax.jit(lambda array: find_root_mean_square(array, jnp))(jnp.asarray(array))
    assert float(jitted) == found


def test_sums_of_squares_are_exact_where_those_of_floats_are_not():
    """One large square, then many small ones: added one by one in float32 these would be lost."""
    array = np.full(1 << 16, 1.0, np.float32)
    array[0] = 2.0**13
    # The mean square is (2**26 + 2**16 - 1) / 2**16: of 1024 and nearly 1.
    assert measure(array) == measure(array[::-1]) == pytest.approx(np.sqrt(1025), rel=2**-8)
    squares = SquareSum()
    squares.add(array)
    assert sum(squares.sums) == 2**30 + (2**16 - 1) * 2**30


def test_a_known_size():
    """What lineages rely on: 1 to 10 have the mean square 38.5, and 6.2048 is 199/32 to 8 bits."""
    numbers = np.arange(1, 11)
    assert measure(numbers.astype(np.float32)) == measure(numbers.astype(np.float16)) == 199 / 32


def test_numbers_that_have_no_size():
    assert measure() == measure(np.zeros(3)) == measure(np.array([np.nan, np.inf])) == 0.0
    assert measure(np.array([3.0, np.nan])) == pytest.approx(np.sqrt(4.5), rel=2**-8)
    assert float(find_root_mean_square(jnp.zeros(3), jnp)) == 0.0


@pytest.mark.parametrize(
    "stated,size,unit",
    [
        (0.5, 0.5, "initializer_range"),
        ("2", 2.0, "initializer_range"),
        ("0.5rms", 0.5, "rms"),
        ("1e-3rms", 1e-3, "rms"),
    ],
)
def test_noise_as_it_is_stated(stated, size, unit):
    assert parse_noise(stated) == (size, unit)
    assert parse_noise(state_noise(size, unit)) == (size, unit)
    third = state_noise(1 / 3, "rms")
    assert parse_noise(third) == (1 / 3, "rms") and state_noise(1.0, "rms") == "1rms"


@pytest.mark.parametrize("wrong", ["rms", "0.5 rms units", "much", "rms0.5", ""])
def test_noise_that_is_none(wrong):
    with pytest.raises(UsageError, match="as 0.5rms; got"):
        parse_noise(wrong)


def test_noise_follows_the_size_of_each_tensor():
    """On copies of half the value, noise of 0.5rms has half their root mean square."""
    plan = set_options(plan_width(TINY, embed="2x"), noise="0.5rms")
    params = jax.tree.map(np.asarray, init_params(TINY, Precision("float32", "float32"), 0))
    weights = params["layers"]["mlp"]["dense_h_to_4h"]["weight"]
    # Layers of other sizes, so that a tensor's own size shows.
    larger = {**params["layers"]["mlp"]["dense_h_to_4h"], "weight": 16 * weights}
    mlp = {**params["layers"]["mlp"], "dense_h_to_4h": larger}
    params = {**params, "layers": {**params["layers"], "mlp": mlp}}
    grown = grow(params, plan)
    still = grow(params, replace(plan, noise=0.0))
    double = grow(params, replace(plan, noise=1.0))
    for path, rate in ((("mlp", "dense_h_to_4h"), 16), (("mlp", "dense_4h_to_h"), 1)):
        ours, theirs, twice = (
            tree["layers"][path[0]][path[1]]["weight"] for tree in (grown, still, double)
        )
        noise = ours - theirs
        size = np.sqrt(np.square(theirs).mean())
        assert noise.std() == pytest.approx(0.5 * size, rel=0.15), rate
        assert np.allclose(twice - theirs, 2 * noise, rtol=1e-3, atol=1e-6 * size)
        copies = noise.reshape(*noise.shape[:-1], 2, noise.shape[-1] // 2)
        assert np.abs(copies.sum(-2)).max() < 1e-5 * size


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
