"""Metrics elsewhere and traces: a run writes its whole history, and trains as it would without."""

from __future__ import annotations

import importlib
import json
import signal
import struct
from types import SimpleNamespace

import pytest
from runs import new_run, same_state, send_at, state_of

from growkit.errors import GrowkitError, UsageError
from trainer.log import trace, writers
from trainer.log.history import parse_rows

pytestmark = pytest.mark.usefixtures("compiled_once")


def numbers_of(out):
    """(step, name, number) of every number in RUN/metrics.csv."""
    rows = parse_rows((out / "metrics.csv").read_text())
    return {
        (int(row["step"]), name, float(text))
        for row in rows
        for name, text in row.items()
        if text and name not in ("step", "event", "scores")
    }


class Board:
    """Stands for Weights & Biases: keeps what it is told of each run by its id."""

    def __init__(self):
        self.runs, self.begun, self.ended = {}, [], 0

    def init(self, **given):
        self.begun.append(given)
        logged = self.runs.setdefault(given["id"], [])

        def finish():
            self.ended += 1

        return SimpleNamespace(
            define_metric=lambda *names, **more: None, log=logged.append, finish=finish
        )


@pytest.fixture
def board(monkeypatch):
    board, load = Board(), importlib.import_module
    found = SimpleNamespace(import_module=lambda name: board if name == "wandb" else load(name))
    monkeypatch.setattr(writers, "importlib", found)
    return board


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    new_run(data, out).go()
    return out


def logged(board):
    (rows,) = board.runs.values()
    return {
        (row["step"], name, number)
        for row in rows
        for name, number in row.items()
        if name not in ("step", "event")
    }  # fmt: skip


def test_weights_and_biases_gets_the_history(data, tmp_path, plain, board):
    out = tmp_path / "run"
    new_run(data, out, log={"wandb": "growth"}).go()
    assert logged(board) == numbers_of(out) and len(logged(board)) > 30
    (begun,) = board.begun
    assert (begun["project"], begun["name"], begun["config"]["seed"]) == ("growth", "run", 5)
    assert [row["event"] for row in board.runs[begun["id"]] if "event" in row] == ["start"]
    assert board.ended == 1
    assert same_state(state_of(out), state_of(plain))


def test_a_resumed_run_goes_on_where_it_was_written_to(data, tmp_path, board):
    out = tmp_path / "run"
    send_at(new_run(data, out, log={"wandb": "growth"}), 5, signal.SIGTERM).go()
    new_run(data, out, log={"wandb": "growth"}).go()
    assert len(board.begun) == 2 and len(board.runs) == 1
    assert logged(board) == numbers_of(out)


def test_no_login_is_a_sentence_before_anything_is_computed(
    data,  # noqa: F811
    tmp_path,
    board,
    monkeypatch,
):
    def refuse(**given):
        raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    def compute(*given):
        raise AssertionError("a state was made before Weights & Biases was reached")

    monkeypatch.setattr(board, "init", refuse)
    monkeypatch.setattr("trainer.run.begin.new_state", compute)
    with pytest.raises(GrowkitError) as caught:
        new_run(data, tmp_path / "run", log={"wandb": "growth"})
    said = str(caught.value)
    assert "(No API key configured.); log in with `wandb login`, or set WANDB_MODE=offline" in said
    assert "\n" not in said
    monkeypatch.undo()
    new_run(data, tmp_path / "run").close()


def test_rows_left_out_would_be_seen(data, tmp_path, board, monkeypatch):
    add = writers.Writers.add
    monkeypatch.setattr(
        writers.Writers, "add", lambda self, row: row["validation_loss"] or add(self, row)
    )
    new_run(data, tmp_path / "run", log={"wandb": "growth"}).go()
    assert logged(board) != numbers_of(tmp_path / "run")


def test_scores_have_names_of_their_own():
    told = []
    kept = writers.Writers(SimpleNamespace(log=SimpleNamespace(tensorboard=False, wandb="")))
    kept.writers = [SimpleNamespace(add=lambda step, numbers: told.append((step, numbers)))]
    kept.add({"step": "4", "loss": "", "scores": json.dumps({"piqa/acc": 0.5}), "event": ""})
    assert told == [(4, {"score/piqa/acc": 0.5})]


def test_tensorboards_files_hold_the_history(data, tmp_path, plain):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    out, found = tmp_path / "run", set()
    new_run(data, out, log={"tensorboard": True}).go()
    (file,) = (out / "tensorboard").iterdir()
    content = file.read_bytes()
    while content:
        # A record: its length, a checksum, itself, a checksum.
        (length,) = struct.unpack("<Q", content[:8])
        event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
        found |= {
            (event.step, value.tag, value.simple_value)
            for value in event.summary.value
            if not value.HasField("tensor")
        }
    as_float32 = {
        (step, name, struct.unpack("f", struct.pack("f", number))[0])
        for step, name, number in numbers_of(out)
    }
    assert found == as_float32
    assert same_state(state_of(out), state_of(plain))


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (
            {"tensorboard": True},
            "log.tensorboard needs tensorboardX, which is not installed: pip install tensorboardX",
        ),
        ({"wandb": "growth"}, "log.wandb needs wandb, which is not installed: pip install wandb"),
        (
            {"profile": "9:9"},
            "log.profile must be FIRST:LAST, such as 100:110 for the ten steps after step 100; "
            "got '9:9'",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_run_is_begun(
    log,
    sentence,
    data,
    tmp_path,
    monkeypatch,
):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(writers, "importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(UsageError) as caught:
        new_run(data, tmp_path / "run", log=log)
    assert str(caught.value) == sentence
    assert not (tmp_path / "run").exists()


def traced(monkeypatch):
    """The steps at which a trace begins and ends, in turn."""
    heard, at = [], trace.Trace.update

    def told(self, step, state):
        before = self.running
        at(self, step, state)
        heard.extend([step] * (self.running != before))

    monkeypatch.setattr(trace.Trace, "update", told)
    return heard


def test_some_steps_are_traced(data, tmp_path, plain, monkeypatch):
    heard, out = traced(monkeypatch), tmp_path / "run"
    new_run(data, out, log={"profile": "5:7"}).go()
    assert heard == [5, 7]
    assert list((out / "profile").rglob("*.xplane.pb"))
    assert same_state(state_of(out), state_of(plain))


def test_a_trace_ends_with_the_run(data, tmp_path, monkeypatch):
    heard, out = traced(monkeypatch), tmp_path / "run"
    run = send_at(new_run(data, out, log={"profile": "5:700"}), 6, signal.SIGTERM)
    run.go()
    assert heard == [5]
    assert not run.setup.trace.running
    assert list((out / "profile").rglob("*.xplane.pb"))
