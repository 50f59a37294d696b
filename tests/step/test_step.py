"""One step: accumulation is the big batch, dropout is a function of the step, and a golden run."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

import trainer.step.update
from growkit.models.gpt_neox import GPT_NEOX
from trainer.config.sections import Batch, Config, Dropout, Optimizer, Precision, Schedule
from trainer.model.decoder import init_params
from trainer.step.update import init_state, make_eval_step, make_train_step

TINY = GPT_NEOX.model(layer=2, embed=16, head=2, mlp=32, vocab=64, context=16, rotary_pct=0.5)
CONFIG = Config(
    dropout=Dropout(0.0, 0.0, 0.0),
    precision=Precision("float32", "float32"),
    batch=Batch(8, 1),
    optimizer=Optimizer(learning_rate=1e-2),
    schedule=Schedule(steps=20, warmup=2),
)


@pytest.fixture(scope="module")
def params():
    return jax.device_get(init_params(TINY, CONFIG.precision, seed=0))


def batch(step, parts=1):
    tokens = np.random.default_rng(step).integers(
        0, TINY.vocab, (8, TINY.context + 1), dtype=np.int32
    )
    return tokens.reshape(parts, 8 // parts, -1)


STEPS = {}


def step_of(config):
    """The train step of a configuration, made once (a configuration holds dicts, so it has no hash)."""
    return STEPS.setdefault(repr(config), make_train_step(config, TINY))


def run(config, params, steps=1, parts=1, first=0, make=step_of, batches=batch):
    """The losses, gradient norms and parameters of some steps from a fresh state."""
    state = init_state(config, TINY, jax.tree.map(jax.numpy.array, params))
    state = state._replace(step=state.step + first)
    step = make(config)
    metrics = []
    for number in range(steps):
        state, found = step(state, batches(number, parts))
        metrics.append((float(found["loss"]), float(found["gradient_norm"])))
    losses, norms = np.array(metrics).T
    return losses, norms, jax.device_get(state.params)


def gap(ours, theirs):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), ours, theirs)))


# With so large an eps an update is the gradient, nearly; with a small one Adam's first is only its sign.
PLAIN = dataclasses.replace(CONFIG, optimizer=Optimizer(learning_rate=1.0, eps=1.0, clip=0.0))


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_is_the_big_batch(params, parts):
    whole, parted = run(PLAIN, params, steps=2), run(PLAIN, params, steps=2, parts=parts)
    np.testing.assert_allclose(parted[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(parted[1], whole[1], rtol=1e-6)
    assert gap(parted[2], whole[2]) < 1e-6
    assert gap(params, whole[2]) > 1e-2


def test_parts_divided_by_their_own_size_are_not(params, monkeypatch):
    """The classic mistake: a sum of the parts' means."""
    right = trainer.step.update.accumulate_gradients

    def wrong(network, params, tokens, key):
        return jax.tree.map(
            lambda leaf: leaf * tokens.shape[0], right(network, params, tokens, key)
        )

    monkeypatch.setattr(trainer.step.update, "accumulate_gradients", wrong)
    whole = run(PLAIN, params)
    parted = run(PLAIN, params, parts=2, make=lambda config: make_train_step(config, TINY))
    assert parted[0][0] / whole[0][0] > 1.5
    assert gap(parted[2], whole[2]) > 1e-3


def changed(**sections):
    """The plain configuration with other values in some sections, and as many that a run alone has."""
    return dataclasses.replace(PLAIN, **sections)


@pytest.mark.parametrize(
    "other",
    [
        changed(optimizer=dataclasses.replace(PLAIN.optimizer, learning_rate=0.25)),
        changed(schedule=dataclasses.replace(PLAIN.schedule, steps=7, warmup=3, floor=0.5)),
        changed(seed=4),
    ],
    ids=["rate", "schedule", "seed"],
)
def test_one_program_serves_runs_that_differ_in_numbers(params, other):
    """And gives what a program of their own gives; rates and schedules do make a difference."""
    before = make_train_step(PLAIN, TINY)
    shared = make_train_step(other, TINY)
    assert shared.program is before.program
    together = run(other, params, steps=3, make=lambda config: shared)
    trainer.step.update.forget_programs()
    alone = run(other, params, steps=3, make=lambda config: make_train_step(config, TINY))
    np.testing.assert_array_equal(together[0], alone[0])
    assert gap(together[2], alone[2]) == 0
    assert (gap(together[2], run(PLAIN, params, steps=3)[2]) > 1e-6) == (other.seed == PLAIN.seed)


@pytest.mark.parametrize(
    "other",
    [
        changed(dropout=Dropout(0.2, 0.0, 0.0)),
        changed(remat="full"),
        changed(schedule=dataclasses.replace(PLAIN.schedule, kind="linear")),
        changed(optimizer=dataclasses.replace(PLAIN.optimizer, beta2=0.9)),
    ],
    ids=["dropout", "remat", "kind", "beta2"],
)
def test_what_is_another_computation_is_another_program(other):
    assert make_train_step(other, TINY).program is not make_train_step(PLAIN, TINY).program


def test_the_first_loss_is_that_of_a_guess(params):
    assert run(PLAIN, params)[0][0] == pytest.approx(math.log(TINY.vocab), abs=0.05)


def test_evaluation_is_the_training_loss_of_the_unmasked(params):
    evaluate = make_eval_step(CONFIG, TINY)
    tokens = batch(0)[0]
    whole = float(evaluate(params, tokens, np.ones(8, bool))) / (8 * TINY.context)
    assert whole == pytest.approx(run(PLAIN, params)[0][0], rel=1e-6)
    mask = np.arange(8) < 3
    some = float(evaluate(params, np.where(mask[:, None], tokens, 0), mask))
    parts = sum(float(evaluate(params, tokens, np.arange(8) == row)) for row in range(3))
    assert some == pytest.approx(parts, rel=1e-6)
    assert some != pytest.approx(whole * 8 * TINY.context, rel=0.1)


DROPPED = dataclasses.replace(PLAIN, dropout=Dropout(0.2, 0.2, 0.2))


def test_dropout_is_a_function_of_seed_and_step(params):
    losses = {
        "once": run(DROPPED, params)[0][0],
        "again": run(DROPPED, params)[0][0],
        "later": run(DROPPED, params, first=1)[0][0],
        "other seed": run(dataclasses.replace(DROPPED, seed=1), params)[0][0],
        "none": run(PLAIN, params)[0][0],
    }
    assert losses["once"] == losses["again"]
    assert len(set(losses.values())) == 4


def test_accumulated_parts_drop_differently(params):
    """Two parts change places: with one key for both, the mean of their losses would stay the same."""
    forth = run(DROPPED, params, parts=2)[0][0]
    back = run(DROPPED, params, parts=2, batches=lambda number, parts: batch(number, parts)[::-1])[
        0
    ][0]
    assert abs(forth - back) > 1e-4
    plain = run(PLAIN, params, parts=2)[0][0]
    assert plain == pytest.approx(
        run(PLAIN, params, parts=2, batches=lambda number, parts: batch(number, parts)[::-1])[0][0],
        rel=1e-6,
    )


# The losses of five steps of a tiny model, from numbers that are made here and not by jax.random, whose values
# may change with a version of JAX. They stand for the whole of model, loss, gradient, clip, AdamW and schedule.
# A small change is rounding: other machines and versions of XLA add up in other orders, hence the tolerance. A
# change beyond it means that the same command now trains another model: find out why, and if it is meant, say
# so in the changelog, since runs begun before will not go on as they would have. (The numbers are those of float64.)
GOLDEN = [
    4.453732590261702,
    4.504966996114115,
    4.377921834639921,
    4.334923671743635,
    4.392085776166311,
]


def golden_params():
    random = np.random.default_rng(7)
    tree = {}
    for row in TINY.table.rows:
        node = tree
        for key in row.path[:-1]:
            node = node.setdefault(key, {})
        shape = row.stacked_shape(TINY.sizes)
        node[row.path[-1]] = (
            0.2 * random.normal(size=shape) + (row.begins == "ones")
        ).astype(np.float32)
    return tree


def test_golden_losses():
    losses, _, _ = run(CONFIG, golden_params(), steps=5)
    np.testing.assert_allclose(losses, GOLDEN, rtol=2e-5)


def test_golden_losses_notice_another_warm_up():
    config = dataclasses.replace(CONFIG, schedule=Schedule(steps=20, warmup=3))
    losses, _, _ = run(config, golden_params(), steps=5)
    assert np.abs(losses / GOLDEN - 1).max() > 1e-4
