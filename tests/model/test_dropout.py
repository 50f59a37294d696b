"""Dropout's masks have the right share, no pattern, and depend on key and place alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.model import dropout
from trainer.model.dropout import draw_mask, drop

pytestmark = pytest.mark.usefixtures("strict_promotion")

WORDS = jax.random.key_data(jax.random.key(3))
SHAPE = (3, 4, 128, 256)


def mask(words=WORDS, rate=0.1, shape=SHAPE) -> np.ndarray:
    return np.asarray(jax.jit(draw_mask, static_argnums=(1, 2))(words, rate, shape))


def measure_deviation(draws: np.ndarray, share: float) -> float:
    """How many standard deviations the mean of independent draws is from the expected share."""
    return abs(draws.mean() - share) / np.sqrt(share * (1 - share) / draws.size)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_numbers_are_dropped_with_the_probability_asked_for(rate):
    assert measure_deviation(mask(rate=rate), 1 - rate) < 4
    assert measure_deviation(mask(rate=rate), 1 - rate - 0.01) > 4


def measure_patterns(drawn: np.ndarray) -> list[float]:
    """Deviations from chance, in standard deviations, of fair draws.

    First how often neighbours along each dimension are equal, then how far the sums of rows and
    columns spread.
    """
    found = []
    for axis in range(drawn.ndim):
        size = drawn.shape[axis]
        neighbours = drawn.take(range(size - 1), axis) == drawn.take(range(1, size), axis)
        found.append(measure_deviation(neighbours, 0.5))
    rows = drawn.reshape(-1, drawn.shape[-1])
    for axis in (0, 1):
        count = rows.shape[axis]
        spread = ((rows.sum(axis) - count / 2) ** 2 / (count / 4)).mean()
        found.append(abs(spread - 1) / np.sqrt(2 / rows.shape[1 - axis]))
    return found


def test_a_mask_has_no_pattern(monkeypatch):
    assert max(measure_patterns(mask(rate=0.5))) < 4
    other = mask(jax.random.key_data(jax.random.key(4)), 0.5)
    assert measure_deviation(mask(rate=0.5) == other, 0.5) < 4
    # Too few rounds leave patterns.
    jax.clear_caches()
    monkeypatch.setattr(dropout, "ROUNDS", 3)
    assert max(measure_patterns(mask(rate=0.5))) > 4
    jax.clear_caches()


def test_a_part_of_a_mask_is_the_mask_of_the_part():
    whole = mask()
    assert np.array_equal(mask(shape=(2, *SHAPE[1:])), whole[:2])
    assert not np.array_equal(whole[1], whole[0]) and not np.array_equal(whole[0, 0], whole[0, 1])


@pytest.mark.parametrize("shape", [(5,), (6, 7), (2, 6, 7)])
def test_every_place_has_a_number_of_its_own(shape):
    cut = max(0, len(shape) - 2)
    outer = np.asarray(dropout._number_places(shape, 0, cut))
    inner = np.asarray(dropout._number_places(shape, cut, len(shape)))
    numbers = outer * np.prod(shape[cut:]) + inner
    assert np.array_equal(numbers, np.arange(np.prod(shape)).reshape(shape))


def test_more_places_than_32_bits_can_number_are_refused():
    with pytest.raises(ValueError, match="too few"):
        jax.eval_shape(lambda words: draw_mask(words, 0.1, (2, 1 << 17, 1 << 16)), WORDS)


def test_the_gradient_is_that_of_the_written_out_mask():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 16)), jnp.float32)

    def plain(x):
        return jnp.where(draw_mask(WORDS, 0.3, x.shape), x / 0.7, 0)

    assert np.array_equal(drop(x, WORDS, 0.3), plain(x))
    ours = jax.grad(lambda x: jnp.sin(drop(x, WORDS, 0.3)).sum())(x)
    theirs = jax.grad(lambda x: jnp.sin(plain(x)).sum())(x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    other = jax.grad(lambda x: jnp.sin(drop(x, WORDS + 1, 0.3)).sum())(x)
    assert not np.allclose(ours, other)


def test_nothing_but_the_key_is_kept_for_the_gradient():
    x = jnp.ones((4, 8, 16))
    saved = jax.tree.leaves(jax.vjp(lambda x: drop(x, WORDS, 0.3), x)[1])
    assert sum(leaf.size for leaf in saved) < x.size
    plain = jax.tree.leaves(
        jax.vjp(lambda x: jnp.where(draw_mask(WORDS, 0.3, x.shape), x / 0.7, 0), x)[1]
    )
    assert sum(leaf.size for leaf in plain) >= x.size
