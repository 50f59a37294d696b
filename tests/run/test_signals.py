"""A signal at any moment leaves the run that would have been: saved whole, at once, and said."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from runs import (
    STEPS,
    Killed,
    assert_as_if_uninterrupted,
    configuration,
    new_run,
    send_at,
)

import trainer.run.loop
from growkit.checkpoint.location import open_source
from trainer.log import report
from trainer.run.checkpoint import REPLACED, find_last_step
from trainer.run.interrupt import Interrupt

pytestmark = pytest.mark.usefixtures("compiled_once")


def signalled_in_validation(run, step, number=signal.SIGTERM):
    """A run that gets a signal when the validation of a step begins."""
    validate = run.validate

    def signalled():
        if run.step == step:
            os.kill(os.getpid(), number)
        return validate()

    run.validate = signalled
    return run


def record_of(out, step):
    text = (out / "checkpoints" / str(step) / "meta" / "metadata").read_text()
    return json.loads(text)["record"]


def history_of(out, step):
    """The rows that a checkpoint carries, without speeds."""
    text = (out / "checkpoints" / str(step) / "files" / "metadata").read_text()
    rows = csv.DictReader(json.loads(text)["history.csv"]["text"].splitlines())
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def assert_same_checkpoints(out, whole):
    for path in (whole / "checkpoints").iterdir():
        step = int(path.name)
        assert record_of(out, step) == record_of(whole, step)
        assert history_of(out, step) == history_of(whole, step)
    best = [open_source(f"{run}@best").record["step"] for run in (out, whole)]
    assert best[0] == best[1]


@pytest.mark.parametrize("step", [4, STEPS])
def test_a_validation_cut_short_is_in_the_checkpoint_after_the_resume(
    step,
    data,
    tmp_path,
    whole,
):
    out = tmp_path / "run"
    result = signalled_in_validation(new_run(data, out), step).go()
    assert (result.step, result.signal) == (step, signal.SIGTERM)
    assert record_of(out, step)["validation_loss"] is None
    assert new_run(data, out).go().signal is None
    assert_as_if_uninterrupted(out, whole)
    assert_same_checkpoints(out, whole)
    assert not (out / REPLACED).exists()


def test_a_kill_before_it_is_saved_again_changes_nothing(
    data,
    tmp_path,
    whole,
    monkeypatch,
):
    out = tmp_path / "run"
    signalled_in_validation(new_run(data, out), 4).go()
    run = new_run(data, out)

    def killed(*given):
        raise Killed

    # Once before the old checkpoint is moved, and once after.
    for method in ("replace", "save"):
        with monkeypatch.context() as patch:
            patch.setattr(run.checkpoints, method, killed)
            with pytest.raises(Killed):
                run.go()
        run.close()
        assert find_last_step(out) == 4
        run = new_run(data, out)
        assert run.step == 4
    run.go()
    assert_as_if_uninterrupted(out, whole)
    assert_same_checkpoints(out, whole)


def test_a_run_stopped_in_its_first_validation_begins_again(data, tmp_path, whole):
    out = tmp_path / "run"
    result = signalled_in_validation(new_run(data, out), 0).go()
    assert (result.step, result.signal) == (0, signal.SIGTERM)
    assert find_last_step(out) is None
    run = new_run(data, out)
    assert not run.resumed
    run.go()
    assert_as_if_uninterrupted(out, whole)


def test_a_closed_terminal_saves(data, tmp_path, whole):
    out = tmp_path / "run"
    # A hangup is often followed by another: of the shell, and of the kernel.
    result = send_at(new_run(data, out), 5, signal.SIGHUP, times=3).go()
    assert (result.step, result.signal) == (6, signal.SIGHUP)
    assert find_last_step(out) == 6
    new_run(data, out).go()
    assert_as_if_uninterrupted(out, whole)


def test_hangups_that_nohup_ignores_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert interrupt.stop is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_costs_nothing(monkeypatch):
    heard = []

    def gone(words, err):
        heard.append(words)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(report.click, "echo", gone)
    with report.Report("run", 10) as shown:
        shown.say("one")
        shown.say("two")
        shown.show_row(3, 1.0, 1e-3, "fast")
    assert heard == ["run  one"]


@pytest.mark.parametrize("name", ["require_fit", "make_eval_step", "make_train_step"])
def test_a_signal_while_a_program_compiles_is_obeyed_at_once(
    name,
    data,
    tmp_path,
    whole,
    monkeypatch,
):
    out, ended = tmp_path / "run", threading.Event()
    run = new_run(data, out)
    begun = threading.Event()

    def compiles(*given):
        begun.set()
        ended.wait(60)

    if name == "require_fit":
        monkeypatch.setattr(trainer.run.loop, name, compiles)
    elif name == "make_eval_step":
        run.eval_step = compiles
    else:
        compiles.trace, compiles.memory = run.train_step.trace, run.train_step.memory
        run.train_step = compiles
        run.train_step.remat = "none"
    threading.Thread(target=lambda: (begun.wait(60), os.kill(os.getpid(), 15))).start()
    at = time.monotonic()
    result = run.go()
    assert time.monotonic() - at < 30
    assert (result.step, result.signal, result.compiling) == (0, signal.SIGTERM, True)
    assert find_last_step(out) is None
    ended.set()
    monkeypatch.undo()


COMPILING = """
import os, sys, threading, time
from trainer.run import loop
def compiles(*given):
    threading.Timer(0.3, lambda: os.kill(os.getpid(), int(sys.argv[1]))).start()
    time.sleep(100)
loop.require_fit = compiles
from growkit.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)]
)
def test_the_command_ends_without_waiting_for_the_compiler(number, code, data, tmp_path):
    config = configuration(tmp_path / "run.yaml", data)
    command = ["train", str(config), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", COMPILING, str(int(number)), *command],
        capture_output=True,
        text=True,
        timeout=90,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == code, done.stderr
    assert "stopping at step 0: nothing to save" in done.stderr
    assert "step 0, stopped; the same command resumes it" in done.stdout
