"""Schedules are optax's, one update ahead; the default is to the bit what it always was."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainer.step.schedule
from growkit.errors import UsageError
from trainer.config.sections import Config, Schedule, resolve
from trainer.step.schedule import compute_learning_rate

PEAK, STEPS, WARMUP, FLOOR, DECAY = 2.0, 100, 10, 0.1, 0.3
SCHEDULE = Schedule(steps=STEPS, warmup=WARMUP, floor=FLOOR, decay=DECAY)
WARM = optax.linear_schedule(0.0, PEAK, WARMUP)
FALL = int(STEPS * DECAY)
# What each kind is after `count` + 1 updates, by optax.
ORACLES = {
    "cosine": optax.warmup_cosine_decay_schedule(0.0, PEAK, WARMUP, STEPS, FLOOR * PEAK),
    "linear": optax.join_schedules(
        [WARM, optax.linear_schedule(PEAK, FLOOR * PEAK, STEPS - WARMUP)], [WARMUP]
    ),
    "wsd": optax.join_schedules(
        [WARM, optax.constant_schedule(PEAK), optax.linear_schedule(PEAK, FLOOR * PEAK, FALL)],
        [WARMUP, STEPS - FALL],
    ),
    "constant": optax.warmup_constant_schedule(0.0, PEAK, WARMUP),
}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def rates(schedule, **given):
    steps = range(schedule.steps + 5)
    return np.array([compute_learning_rate(schedule, PEAK, step, **given) for step in steps])


def of_optax(kind, schedule=SCHEDULE):
    return np.array([ORACLES[kind](step + 1) for step in range(schedule.steps + 5)])


@pytest.mark.parametrize("kind", ORACLES)
def test_every_kind_is_optaxs_one_update_ahead(kind, float64):
    ours = rates(dataclasses.replace(SCHEDULE, kind=kind))
    np.testing.assert_allclose(ours, of_optax(kind), rtol=1e-6)
    assert ours[0] == pytest.approx(PEAK / WARMUP)
    assert ours[WARMUP - 1] == PEAK
    end = PEAK if kind == "constant" else FLOOR * PEAK
    assert ours[STEPS - 1] == pytest.approx(end, rel=1e-12)
    assert ours[-1] == pytest.approx(end, rel=1e-12)


@pytest.mark.parametrize("kind", ORACLES)
def test_no_kind_is_another(kind, float64):
    for other in ORACLES.keys() - {kind}:
        assert np.abs(rates(dataclasses.replace(SCHEDULE, kind=kind)) - of_optax(other)).max() > 0.1


def test_a_wrong_shape_is_noticed(float64, monkeypatch):
    monkeypatch.setitem(trainer.step.schedule.SHAPES, "wsd", lambda part: 1 - jnp.sqrt(part))
    with pytest.raises(AssertionError):
        test_every_kind_is_optaxs_one_update_ahead("wsd", None)


def former(schedule, peak, step):
    """The only schedule before there were kinds, word for word."""
    step = jnp.asarray(step + 1, jnp.result_type(float))
    warm = step / max(schedule.warmup, 1)
    part = jnp.clip((step - schedule.warmup) / max(schedule.steps - schedule.warmup, 1), 0.0, 1.0)
    cosine = schedule.floor + (1 - schedule.floor) * 0.5 * (1 + jnp.cos(jnp.pi * part))
    return peak * jnp.where(step < schedule.warmup, warm, cosine)


def test_the_default_is_to_the_bit_what_it_was(strict_promotion):
    steps = jnp.arange(0, 82_500, dtype=jnp.int32)
    config = Config()
    peak = config.optimizer.learning_rate
    ours = jax.jit(lambda step: compute_learning_rate(config.schedule, peak, step))(steps)
    theirs = jax.jit(lambda step: former(config.schedule, peak, step))(steps)
    assert ours.dtype == jnp.float32 and np.array_equal(ours, theirs)
    # A difference in the last place would be noticed.
    assert not np.array_equal(ours, np.nextafter(theirs, 1))


def test_without_warm_up_the_first_update_is_the_first_of_the_fall(float64):
    half = [0.5 * (1 + np.cos(np.pi * step / 4)) for step in (1, 2, 3, 4)]
    schedule = Schedule(steps=4, warmup=0, floor=0.0)
    assert [
        float(compute_learning_rate(schedule, 1.0, step)) for step in range(4)
    ] == pytest.approx(half)


@pytest.mark.parametrize(
    "section,said",
    [
        (
            {"kind": "cosin"},
            "must be one of cosine, linear, wsd, constant, got 'cosin'; did you mean 'cosine'",
        ),
        ({"decay": 1.5}, "schedule.decay must lie in [0, 1], got 1.5"),
        (
            {"kind": "wsd", "steps": 100, "warmup": 60, "decay": 0.5},
            "schedule.warmup (60 steps) and schedule.decay (0.5 of the steps) do not fit into "
            "schedule.steps (100)",
        ),
    ],
)
def test_impossible_schedules_are_refused(section, said):
    with pytest.raises(UsageError) as caught:
        resolve({"schedule": section})
    assert said in str(caught.value)
