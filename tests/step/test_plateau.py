"""A plateau is where optax finds one; it lowers the rate, and a resumed run finds it again."""

from __future__ import annotations

import math
import signal

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import STEPS, rows_of, same_state, send_at, state_of, values

from growkit.checkpoint.location import open_source
from growkit.errors import UsageError
from trainer.config.sections import Plateau, resolve
from trainer.run.begin import begin, prepare
from trainer.run.loop import Run
from trainer.run.stages import train
from trainer.run.validation import Validation
from trainer.step.plateau import find_plateaus

pytestmark = pytest.mark.usefixtures("compiled_once")


def by_optax(losses, settings):
    """The indices of the losses at which optax.contrib.reduce_on_plateau lowers its scale."""
    rule = optax.contrib.reduce_on_plateau(
        factor=0.5, patience=settings.patience, rtol=settings.rtol
    )
    state = rule.init({})
    found = []
    for number, loss in enumerate(losses):
        _, after = rule.update({}, state, value=jnp.float32(loss))
        if after.scale != state.scale:
            found.append(number)
        state = after
    return found


SOME = [4.0, 3.0, 3.0, 3.1, 2.9, 2.5, 2.49, 2.48, 2.6, 2.4, 2.4, 2.4, 2.4, 2.4, 2.0, 2.1]


@pytest.mark.parametrize("rtol", [1e-6, 0.02])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_plateau_is_where_optax_finds_one(patience, rtol):
    settings = Plateau(patience=patience, rtol=rtol)
    found = find_plateaus(SOME, settings)
    assert found == by_optax(SOME, settings) and found
    # Other settings find other plateaus.
    other_rtol = 0.02 if rtol < 0.02 else 1e-6
    assert found != find_plateaus(SOME, Plateau(patience=patience + 1, rtol=rtol))
    assert found != find_plateaus(SOME, Plateau(patience=patience, rtol=other_rtol))


def test_without_patience_there_are_none():
    assert find_plateaus(SOME, Plateau()) == []
    assert resolve({}).schedule.plateau.patience == 0


# Validation at steps 0, 3, 4, 6, 8, 9 and 12: flat at 4 and again at 8.
LOSSES = {0: 4.0, 3: 4.0, 4: 4.0, 6: 3.0, 8: 3.5, 9: 3.2, 12: 2.0}
FLAT = {
    "schedule": {"kind": "constant", "warmup": 0, "plateau": {"patience": 2, "factor": 0.5}},
    "log": {"every": 1},
}


@pytest.fixture(autouse=True)
def losses(monkeypatch):
    monkeypatch.setattr(Run, "validate", lambda run: Validation(LOSSES.get(run.step, 1.0)))


def new_run(root, out, **more):
    return Run(begin(prepare(values(root, **FLAT, **more), out)))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "validate", lambda run: Validation(LOSSES[run.step]))
        new_run(data, out).go()
    return out


def rates(out):
    return [float(row["learning_rate"]) for row in rows_of(out) if row["learning_rate"]]


def test_a_plateau_lowers_the_rate(whole):
    assert rates(whole) == pytest.approx([1e-2] * 4 + [5e-3] * 5 + [2.5e-3] * 3)
    events = {row["step"]: row["event"] for row in rows_of(whole) if row["event"]}
    assert events == {
        "0": "start",
        "4": "plateau: learning rate x 0.5",
        "9": "plateau: learning rate x 0.25",
    }
    records = [open_source(f"{whole}@{step}").record for step in (4, 8, 12)]
    assert [record["reduction"] for record in records] == [0.5, 0.5, 0.25]


@pytest.mark.parametrize("step", [3, 5, 8])
def test_a_resumed_run_finds_the_plateaus_again(step, data, tmp_path, whole):
    out = tmp_path / "run"
    send_at(new_run(data, out), step, signal.SIGTERM).go()
    new_run(data, out).go()
    assert same_state(state_of(out), state_of(whole)) and rows_of(out) == rows_of(whole)


def test_a_run_that_forgot_its_losses_would_be_another(data, tmp_path, whole):
    out = tmp_path / "run"
    send_at(new_run(data, out), 5, signal.SIGTERM).go()
    run = new_run(data, out)
    run.history.rows.clear()
    run.go()
    assert rates(out)[6:] == pytest.approx([1e-2] * 3 + [5e-3] * 3)
    assert not same_state(state_of(out), state_of(whole))


def test_a_schedule_that_goes_on_in_its_sources_keeps_the_reduction(data, tmp_path, whole):
    section = values(data, **FLAT)
    section["schedule"]["continued"] = True
    train(section, tmp_path / "on", str(whole))
    assert rates(tmp_path / "on")[0] == pytest.approx(2.5e-3)
    train(values(data, **FLAT), tmp_path / "again", str(whole))
    assert rates(tmp_path / "again")[0] == pytest.approx(1e-2)


@pytest.mark.parametrize(
    "section,said",
    [
        ({"patience": -1}, "schedule.plateau.patience must be at least 0, got -1"),
        ({"factor": 0}, "schedule.plateau.factor must lie in (0, 1], got 0.0"),
        ({"rtol": 1}, "schedule.plateau.rtol must lie in [0, 1), got 1.0"),
        (
            {"cooldown": 1},
            "unknown key schedule.plateau.cooldown; the keys here are patience, factor, rtol",
        ),
    ],
)
def test_impossible_plateaus_are_refused(section, said):
    with pytest.raises(UsageError) as caught:
        resolve({"schedule": {"plateau": section}})
    assert said in str(caught.value)


def test_losses_that_only_rise_are_one_plateau_after_another():
    assert find_plateaus(np.arange(1.0, 8.0), Plateau(patience=2)) == [2, 4, 6]
    assert find_plateaus([math.inf], Plateau(patience=1)) == [0]
    assert STEPS in LOSSES
