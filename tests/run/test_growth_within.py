"""Growth within a run is stopping, growing on disk and going on, wherever it is interrupted."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from runs import (
    NO_DROPOUT,
    SEQUENCES,
    STEPS,
    Killed,
    rows_of,
    same_state,
    state_of,
    values,
)

from growkit.checkpoint.location import open_source, write_output
from growkit.errors import UsageError
from growkit.growth.depth import plan_depth
from growkit.lineage import Lineage
from growkit.surgery.grow import prepare_growth
from trainer.config.sections import resolve
from trainer.data.stream import Stream
from trainer.log.curves import split_segments
from trainer.log.history import History
from trainer.run.loop import Run
from trainer.run.stages import train
from trainer.run.validation import Validation

pytestmark = pytest.mark.usefixtures("compiled_once")

AT = 6
# The learning rate still falls at the end, and three steps of warm-up follow the growth.
SECTIONS = {
    "dropout": NO_DROPOUT,
    "checkpoint": {"every": 6},
    "schedule": {"rewarmup": 3},
    "log": {"every": 1},
}
DEPTH = {"map": "2:3", "at": AT}


def settings(root, **sections):
    return values(root, **(SECTIONS | sections))


@pytest.fixture(scope="module")
def small(data, tmp_path_factory):
    """The same run without growth."""
    out = tmp_path_factory.mktemp("small") / "run"
    train(settings(data), out)
    return out


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that grows at its sixth step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(settings(data, grow=DEPTH), out).step == STEPS
    return out


@pytest.fixture(scope="module")
def on_disk(small, data, tmp_path_factory):
    """By steps of re-warm-up: the run stopped at step AT, grown on disk, and trained on."""
    root, runs = tmp_path_factory.mktemp("disk"), {}
    source = open_source(f"{small}@{AT}")
    write_output(
        root / "grown",
        "checkpoint",
        prepare_growth(source, plan_depth(source.model, "2:3")),
        [source],
    )
    for rewarmup in (3, 0):
        sections = settings(data, schedule={"continued": True, "rewarmup": rewarmup})
        sections.pop("model")
        runs[rewarmup] = root / f"run{rewarmup}"
        train(sections, runs[rewarmup], str(root / "grown"))
    return runs


def measured(out, step=0, last=STEPS):
    """The rows after the last event, by their number of steps after `step`."""
    rows = [row for row in rows_of(out) if step <= int(row["step"]) <= last]
    begun = max((n for n, row in enumerate(rows) if row["event"]), default=0)
    rest = [
        {key: text for key, text in row.items() if key not in ("step", "event")}
        for row in rows[begun:]
    ]
    return list(zip([int(row["step"]) - step for row in rows[begun:]], rest, strict=True))


def test_growth_within_is_growth_on_disk(whole, on_disk):
    ours, theirs = state_of(whole), state_of(f"{on_disk[3]}@{STEPS - AT}")
    assert ours.pop("step") == STEPS and theirs.pop("step") == STEPS - AT
    assert same_state(ours, theirs)
    assert measured(whole, AT) == measured(on_disk[3], last=STEPS - AT)
    assert len(measured(whole, AT)) > STEPS - AT
    # Without the re-warm-up the training differs.
    assert not same_state(ours, {**state_of(f"{on_disk[0]}@{STEPS - AT}")} | {"step": 0})
    assert measured(whole, AT) != measured(on_disk[0], last=STEPS - AT)


def test_before_the_growth_it_is_the_small_run(whole, small):
    until = [[row for row in rows_of(out) if int(row["step"]) < AT] for out in (whole, small)]
    assert until[0] == until[1]
    assert same_state(state_of(f"{whole}@{AT}"), state_of(f"{small}@{AT}"))
    assert not same_state(state_of(whole), state_of(small))


def rates(out):
    return {
        int(row["step"]): float(row["learning_rate"])
        for row in rows_of(out)
        if row["learning_rate"]
    }


def test_the_schedule_goes_on_under_a_warm_up_that_counts_from_the_growth(whole, small):
    factors = {step: rate / rates(small)[step] for step, rate in rates(whole).items()}
    expected = {
        step: min(1.0, (step - AT) / 3) if step > AT else 1.0 for step in range(1, STEPS + 1)
    }
    assert factors == pytest.approx(expected, rel=1e-6)


def test_the_run_says_what_happened(whole):
    source = open_source(str(whole))
    assert [entry["operation"] for entry in source.lineage] == ["train", "depth", "train"]
    assert source.lineage[1]["source"]["step"] == AT
    assert Lineage.read(source.lineage).grown_at == AT
    assert source.model.layer == 3 and open_source(f"{whole}@{AT}").model.layer == 2
    events = [(row["step"], row["event"]) for row in rows_of(whole) if row["event"]]
    assert events == [("0", "start"), (str(AT), "grown: layer 2 to 3")]
    assert len(split_segments(rows_of(whole))) == 2
    assert source.record["stream"]["drawn"] == STEPS * SEQUENCES


def stopped(monkeypatch, step, act):
    """Patch the data stream so that it calls `act` before it draws the batch after `step` steps."""
    batch = Stream.batch

    def drawing(stream, drawn, count):
        if drawn == step * SEQUENCES:
            act()
        return batch(stream, drawn, count)

    monkeypatch.setattr(Stream, "batch", drawing)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def kill():
    raise Killed


# The batch after AT steps is the first one of the grown model, which has no checkpoint of its own
# yet.
@pytest.mark.parametrize(
    "step,act",
    [(3, terminate), (5, terminate), (6, terminate), (8, terminate), (6, kill), (8, kill)],
)
def test_stopped_around_the_growth_it_goes_on_the_same(
    step, act, data, tmp_path, whole, monkeypatch
):
    out, sections = tmp_path / "run", settings(data, grow=DEPTH)
    with monkeypatch.context() as patch:
        stopped(patch, step, act)
        if act is terminate:
            result = train(sections, out)
            assert (result.step, result.signal) == (step + 1, signal.SIGTERM)
        else:
            with pytest.raises(Killed):
                train(sections, out)
    assert train(sections, out).signal is None
    assert same_state(state_of(out), state_of(whole))
    assert rows_of(out) == rows_of(whole)
    assert train(sections, out).step == STEPS


def test_rows_of_a_growth_that_is_made_again_would_be_there_twice(
    data, tmp_path, whole, monkeypatch
):
    monkeypatch.setattr(History, "forget_growth", lambda history, step: None)
    monkeypatch.setattr(History, "restore", lambda history, carried, step: 0)
    with pytest.raises(AssertionError):
        test_stopped_around_the_growth_it_goes_on_the_same(
            6, kill, data, tmp_path, whole, monkeypatch
        )


def losses(out):
    return [float(row["loss"]) for row in rows_of(out) if row["loss"]]


def test_exact_growth_within_goes_on_as_the_small_model_would(data, small, whole, tmp_path, capsys):
    out = tmp_path / "run"
    train(settings(data, grow={"embed": "2x", "at": AT}, schedule={"rewarmup": 0}), out)
    np.testing.assert_allclose(losses(out), losses(small), rtol=2e-4)
    assert "growth was exact: the source's validation loss was" in capsys.readouterr().err
    # Growth by copied layers does not go on as the small model would.
    assert not np.allclose(losses(whole), losses(small), rtol=2e-4)


# Validation is flat at steps 3 and 6, and after the growth at steps 9 and 12.
FLAT = {0: 4.0, 3: 4.0, 6: 4.0, 9: 5.0, 12: 5.0}


def test_growth_at_the_first_plateau(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Run, "validate", lambda run: Validation(FLAT[run.step] + (run.model.layer == 3))
    )
    plateau = {"patience": 2, "factor": 0.5}
    sections = settings(data, grow={"map": "2:3", "at": "plateau"}, schedule={"plateau": plateau})
    train(sections, tmp_path / "run")
    events = [(row["step"], row["event"]) for row in rows_of(tmp_path / "run") if row["event"]]
    # The best loss of before the growth does not count for the grown model.
    assert events == [
        ("0", "start"),
        ("6", "grown: layer 2 to 3"),
        ("12", "plateau: learning rate x 0.5"),
    ]
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stopped(patch, AT, kill)
        with pytest.raises(Killed):
            train(sections, out)
    train(sections, out)
    assert rows_of(out) == rows_of(tmp_path / "run") and same_state(
        state_of(out), state_of(tmp_path / "run")
    )


def test_growth_on_the_way_of_a_run_that_begins_with_a_source(data, small, tmp_path):
    sections = settings(data, grow=DEPTH)
    sections.pop("model")
    train(sections, tmp_path / "run", str(small))
    lineage = open_source(str(tmp_path / "run")).lineage
    assert [entry["operation"] for entry in lineage] == ["train", "train", "depth", "train"]
    assert lineage[-1]["source"]["schedule_step"] == AT == Lineage.read(lineage).grown_at


@pytest.mark.parametrize(
    "section,said",
    [
        (
            {"map": "2:3", "at": STEPS},
            f"grow.at must be a step from 1 to {STEPS - 1}, a part of the steps such as 0.8, or "
            f"plateau, got '{STEPS}'",
        ),
        ({"map": "2:3", "at": 0}, "grow.at must be a step from 1"),
        ({"map": "2:3", "at": "platoo"}, "or plateau, got 'platoo'"),
        # After 0.01 of the steps is before the first.
        ({"map": "2:3", "at": 0.01}, "grow.at must be a step from 1"),
        ({"map": "2:3", "at": "nan"}, "or plateau, got 'nan'"),
        ({"map": "2:3", "at": "plateau"}, "grow.at=plateau needs schedule.plateau.patience"),
        ({"at": 6}, "has options but no growth"),
        ({"map": "3:4", "at": 6}, "the source has 2"),
    ],
)
def test_growth_that_cannot_come(data, tmp_path, section, said):
    with pytest.raises(UsageError, match=said):
        train(settings(data, grow=section), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_step_of_growth_may_be_given_as_a_number():
    assert resolve({"grow": {"at": 6, "map": "2:3"}}).grow.at == "6"
