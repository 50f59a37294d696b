"""However a run is stopped, it resumes to the bit; a grown one goes on where its source was."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import (
    SEQUENCES,
    STEPS,
    TINY,
    Killed,
    assert_as_if_uninterrupted,
    configuration,
    new_run,
    rows_of,
    same_state,
    send_at,
    state_of,
    values,
)

import trainer.run.loop
from convert.directory import convert_to_checkpoint, convert_to_directory
from growkit.checkpoint.location import open_source, write_output
from growkit.cli import run as run_command
from growkit.errors import GrowkitError, UsageError
from growkit.growth.depth import plan_depth
from growkit.surgery.grow import prepare_growth
from trainer.data.stream import Stream
from trainer.run.begin import begin, prepare
from trainer.run.checkpoint import find_last_step
from trainer.run.directory import lock_run
from trainer.run.loop import Run
from trainer.run.stages import train
from trainer.run.state import from_tree, to_tree
from trainer.run.validation import Validation

# After a restore that fails, Orbax leaves coroutines behind that complain when they are
# collected, whenever that is.
pytestmark = [
    pytest.mark.usefixtures("compiled_once"),
]


# The command line in its own process, which sends itself a signal when it draws some batch.
DRIVER = """
import os, sys
from trainer.data.stream import Stream
batch = Stream.batch
def drawing(self, drawn, count):
    if drawn == int(sys.argv[1]):
        os.kill(os.getpid(), int(sys.argv[2]))
    return batch(self, drawn, count)
Stream.batch = drawing
from growkit.cli import main
main(sys.argv[3:])
"""
# name: (steps done when the signal comes, signal, exit code)
STOPS = {
    "terminated": (5, signal.SIGTERM, 75),
    "killed": (9, signal.SIGKILL, -signal.SIGKILL),
}


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """By name: the directory of a run that a signal stopped, its exit code and what it said."""
    root = tmp_path_factory.mktemp("stopped")
    config = configuration(root / "run.yaml", data)
    processes = {}
    for name, (step, number, _) in STOPS.items():
        arguments = [
            str(step * SEQUENCES),
            str(int(number)),
            "train",
            str(config),
            "--out",
            str(root / name),
        ]
        command = [sys.executable, "-c", DRIVER, *arguments]
        processes[name] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    found = {}
    for name, process in processes.items():
        output, errors = process.communicate(timeout=240)
        found[name] = (root / name, process.returncode, output + errors)
    return found


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_resumes_to_the_bit(name, stopped, data, whole):
    out, code, said = stopped[name]
    assert code == STOPS[name][2], said
    assert "Traceback" not in said
    if name == "terminated":
        assert "stopped; the same command resumes it" in said
    run = new_run(data, out)
    # The save at step 8 may have been cut off. The one at step 4 was complete before it began.
    assert run.first in ((4, 8) if name == "killed" else (STOPS[name][0] + 1,))
    assert run.go().signal is None
    assert_as_if_uninterrupted(out, whole)


def test_the_command_line_interrupted_and_given_again(data, tmp_path, whole, monkeypatch, capsys):
    config, out = configuration(tmp_path / "run.yaml", data), tmp_path / "run"
    batch = Stream.batch

    def interrupted(stream, drawn, count):
        if drawn == 9 * SEQUENCES:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(stream, drawn, count)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "batch", interrupted)
        assert run_command(["train", str(config), "--out", str(out)]) == 130
    assert find_last_step(out) == 10
    assert "step 10, stopped; the same command resumes it" in capsys.readouterr().out
    assert run_command(["train", str(config), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert f"step {STEPS}, validation loss" in said.out
    assert (
        f"drawn so far, of {STEPS * SEQUENCES} sequences: '{data / 'text'}' 100.00% (" in said.err
    )
    assert_as_if_uninterrupted(out, whole)


def stopped_early(data, out, step=5):
    """A run stopped by a signal after `step` + 1 steps."""
    result = send_at(new_run(data, out), step, signal.SIGTERM).go()
    assert (result.step, result.signal) == (step + 1, signal.SIGTERM)
    return out


@pytest.mark.parametrize("slot", ["mu", "nu"])
def test_a_resumed_run_with_a_cold_optimizer_is_another(slot, data, tmp_path, whole, monkeypatch):
    out = stopped_early(data, tmp_path / "run")
    run = new_run(data, out)
    tree = to_tree(run.state)
    cold = from_tree(tree | {slot: jax.tree.map(jnp.zeros_like, tree[slot])}, run.state)
    run.state = cold
    run.go()
    assert not same_state(state_of(out), state_of(whole))
    assert rows_of(out) != rows_of(whole)


def test_a_run_with_another_seed_is_another(data, tmp_path, whole):
    new_run(data, tmp_path / "run", seed=6).go()
    assert not same_state(state_of(tmp_path / "run"), state_of(whole))


def test_a_second_interrupt_acts_at_once_and_loses_nothing(data, tmp_path, whole, monkeypatch):
    monkeypatch.setattr("trainer.run.interrupt.REPEAT", 0.0)
    out = tmp_path / "run"
    run = send_at(new_run(data, out), 6, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        run.go()
    assert rows_of(out)[-1]["step"] == "6"
    run.close()
    new_run(data, out).go()
    assert_as_if_uninterrupted(out, whole)


def test_a_signal_that_comes_twice_at_once_is_one(data, tmp_path, whole):
    out = tmp_path / "run"
    assert send_at(new_run(data, out), 6, signal.SIGTERM, times=2).go().signal == signal.SIGTERM
    assert find_last_step(out) is not None
    new_run(data, out).go()
    assert_as_if_uninterrupted(out, whole)


@pytest.mark.parametrize("step", [0, 3, 4, STEPS])
def test_a_signal_during_validation(step, data, tmp_path, whole, monkeypatch):
    out = tmp_path / "run"
    run = new_run(data, out)
    batches = trainer.run.validation.validation_batches

    def interrupted(*given):
        for batch in batches(*given):
            if run.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(trainer.run.validation, "validation_batches", interrupted)
    result = run.go()
    # A run without the validation of its last step is not finished.
    assert (result.step, result.signal, result.validation_loss) == (step, signal.SIGTERM, None)
    monkeypatch.undo()
    monkeypatch.setattr(trainer.run.validation, "validation_batches", batches)
    assert new_run(data, out).go().signal is None
    assert_as_if_uninterrupted(out, whole)


def test_a_finished_run_started_again_does_nothing(data, tmp_path, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")}
    result = new_run(data, out).go()
    assert (result.step, result.signal) == (STEPS, None)
    assert result.validation_loss == float(rows_of(whole)[-1]["validation_loss"])
    assert rows_of(out) == rows_of(whole)
    assert {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")} == before


def test_the_picture_and_the_rows_of_a_run(whole):
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(whole)
    assert [row["event"] for row in rows if row["event"]] == ["start"]
    assert [int(row["step"]) for row in rows if row["loss"]] == [2, 4, 6, 8, 10, 12]
    assert [int(row["step"]) for row in rows if row["validation_loss"]] == [0, 3, 4, 6, 8, 9, 12]
    assert [int(row["tokens"]) for row in rows] == [
        int(row["step"]) * SEQUENCES * TINY.context for row in rows
    ]


def test_saving_a_step_again_keeps_it(data, tmp_path, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    run = new_run(data, out)
    run.state = jax.tree.map(jnp.zeros_like, run.state)
    run._save()
    run.close()
    assert same_state(state_of(out), state_of(whole))


def test_a_run_killed_before_its_first_checkpoint_begins_again(data, tmp_path, whole):
    out = tmp_path / "run"
    run = new_run(data, out)
    batch = run.position.stream.batch

    def killing(drawn, count):
        if drawn == run.position.drawn(3):
            raise Killed
        return batch(drawn, count)

    run.position.stream.batch = killing
    with pytest.raises(Killed):
        run.go()
    run.close()
    assert len(rows_of(out)) == 4
    assert find_last_step(out) is None
    new_run(data, out).go()
    assert_as_if_uninterrupted(out, whole)


# Which checkpoints stay.

LOSSES = {0: 5.0, 2: 4.0, 4: 1.0, 6: 3.0, 8: 2.5, 10: 2.0, 12: 1.5}


def checkpoints_of(out):
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("keep_best", [False, True])
def test_the_last_the_best_and_every_kth_stay(keep_best, resumed, data, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "validate", lambda run: Validation(LOSSES[run.step]))
    settings = {
        "checkpoint": {"every": 2, "keep_last": 2, "keep_every": 6, "keep_best": keep_best},
        "eval": {"every": 100},
    }
    out = tmp_path / "run"
    if resumed:
        # At step 7, which is saved without a validation loss.
        send_at(new_run(data, out, **settings), 6, signal.SIGTERM).go()
        assert checkpoints_of(out) == ([4] if keep_best else []) + [6, 7]
    new_run(data, out, **settings).go()
    assert checkpoints_of(out) == ([4] if keep_best else []) + [6, 10, 12]
    best = open_source(f"{out}@best").record
    assert (best["step"], best["validation_loss"]) == ((4, 1.0) if keep_best else (12, 1.5))


def test_the_names_of_a_runs_checkpoints(whole):
    losses = {
        int(row["step"]): float(row["validation_loss"])
        for row in rows_of(whole)
        if row["validation_loss"]
    }
    for name, step in {
        f"{whole}": 12,
        f"{whole}@8": 8,
        f"{whole}@best": min((4, 8, 12), key=losses.get),
    }.items():
        record = open_source(name).record
        assert (record["step"], record["validation_loss"]) == (step, losses[step])
    with pytest.raises(UsageError, match="has no checkpoint '7'; it has 4, 8, 12"):
        open_source(f"{whole}@7")


def half_written(out, step):
    """Make a checkpoint look as if its saving had been killed; returns its path."""
    path = out / "checkpoints" / str(step)
    return path.rename(path.with_name(f"{step}.orbax-checkpoint-tmp"))


def test_a_half_written_checkpoint_is_ignored_and_cleaned_away(data, tmp_path, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    left = half_written(out, 12)
    assert find_last_step(out) == 8
    run = new_run(data, out)
    assert run.first == 8
    run.go()
    assert not left.exists()
    assert_as_if_uninterrupted(out, whole)


def test_with_only_a_half_written_checkpoint_a_run_begins_with_its_source(data, tmp_path, whole):
    out, settings = tmp_path / "run", values(data, checkpoint={"every": STEPS})
    train(settings, out, str(whole))
    expected = rows_of(out)
    half_written(out, STEPS)
    train(settings, out, str(whole))
    assert rows_of(out) == expected
    assert float(expected[1]["validation_loss"]) == float(rows_of(whole)[-1]["validation_loss"])


@pytest.mark.parametrize("ocdbt", [True, False])
def test_the_storage_may_change_between_a_run_and_its_resumption(ocdbt, data, tmp_path, whole):
    out = tmp_path / "run"
    send_at(new_run(data, out, checkpoint={"ocdbt": ocdbt}), 5, signal.SIGTERM).go()
    new_run(data, out, checkpoint={"ocdbt": not ocdbt}).go()
    assert_as_if_uninterrupted(out, whole)


def test_a_checkpoint_that_cannot_be_read_is_named(data, tmp_path, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "checkpoints" / "12" / "state" / "mu.embed_in.weight" / "0.0").write_bytes(b"")
    with pytest.raises(GrowkitError, match="0.0 is cut off.*whole is .*@8, and --from-") as caught:
        new_run(data, out)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_cannot_be_written_is_a_sentence_and_costs_nothing_else(
    data, tmp_path, whole, monkeypatch
):
    out = tmp_path / "run"
    run = new_run(data, out)
    save, limits = run.checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(step, *given):
        if step == 8:
            run.checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        save(step, *given)
        run.checkpoints.wait()

    monkeypatch.setattr(run.checkpoints, "save", on_a_full_disk)
    try:
        with pytest.raises(GrowkitError, match="could not be written") as caught:
            run.go()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert find_last_step(out) == 4
    assert rows_of(out) == [row for row in rows_of(whole) if int(row["step"]) <= 8]


# Saves by the clock, numbers that are not finite, and what may not change.


def test_a_save_by_the_clock_changes_nothing_else(data, tmp_path, whole, monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock, out = Clock(), tmp_path / "run"
    monkeypatch.setattr(trainer.run.loop, "time", clock)
    run = new_run(data, out, checkpoint={"minutes": 1, "keep_last": 9})
    batch = run.position.stream.batch

    def slowly(drawn, count):
        clock.now += 12.5  # two draws a step, one for each accumulated part
        return batch(drawn, count)

    run.position.stream.batch = slowly
    run.go()
    # A planned save restarts the clock: the next one by time comes after three batches, 75 s.
    assert checkpoints_of(out) == [3, 4, 7, 8, 11, 12]
    assert open_source(f"{out}@7").record["validation_loss"] is None
    assert open_source(f"{out}@best").record["validation_loss"] is not None
    assert_as_if_uninterrupted(out, whole)


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_number_that_is_not_finite_stops_the_run(name, data, tmp_path):
    run = new_run(data, tmp_path / "run")
    right = run.train_step

    def wrong(state, tokens):
        state, metrics = right(state, tokens)
        bad = jnp.where(state.step == 7, jnp.nan, metrics[name])
        return state, metrics | {name: bad}

    wrong.trace, wrong.memory = right.trace, right.memory  # what the run compiles before it begins
    run.train_step = wrong
    with pytest.raises(GrowkitError) as caught:
        run.go()
    said = str(caught.value)
    assert caught.value.exit_code == 1
    assert "step 7 is not finite" in said
    assert "sequences 24 to 27 of data stream 0" in said
    assert said.endswith(f"the last good checkpoint is {tmp_path / 'run'}@4")
    assert find_last_step(tmp_path / "run") == 4


def test_a_validation_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "validate", lambda run: Validation(float("nan")))
    with pytest.raises(
        GrowkitError, match="the validation loss at step 0 is nan; no checkpoint was saved yet"
    ):
        new_run(data, tmp_path / "run").go()


def test_what_may_not_change_is_named(data, tmp_path, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with pytest.raises(
        UsageError,
        match=r"other values of optimizer.clip \(.* then, .* now\), "
        r"seed \(5 then, .* now\), which may not change",
    ):
        new_run(data, out, optimizer={"clip": 0.5}, seed=7)
    with pytest.raises(UsageError, match="other values of --from,"):
        train(values(data), out, str(whole))
    assert_as_if_uninterrupted(out, whole)
    assert new_run(data, out, log={"every": 5}, checkpoint={"every": 6}).go().signal is None


def test_a_second_process_is_kept_out(data, tmp_path):
    out = tmp_path / "run"
    run = new_run(data, out)
    with pytest.raises(
        GrowkitError, match=f"process {os.getpid()} is training into {out}; wait until it ends"
    ):
        new_run(data, out)
    run.go()
    with lock_run(out):
        pass


def test_a_run_locked_and_killed_before_it_was_begun_is_none(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    lock_run(out).close()
    (out / ".config.yaml.part").write_text("growk")
    assert not new_run(data, out).resumed


# Growth and other sources.


@pytest.fixture(scope="module")
def larger(whole, tmp_path_factory):
    """The uninterrupted run's last checkpoint, grown from two layers to three."""
    out = tmp_path_factory.mktemp("larger") / "grown"
    source = open_source(str(whole))
    write_output(
        out, source.kind, prepare_growth(source, plan_depth(source.model, "2:3")), [source]
    )
    return out


def begun(root, out, start, **sections):
    """A run that begins with a source and has taken no step."""
    sections = values(root, **sections) | {"model": {}}
    return Run(begin(prepare(sections, out, str(start))))


def same_tree(ours, theirs):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, jax.device_get(ours), theirs)))


def test_a_grown_model_keeps_adams_count_and_moments_and_restarts_its_schedule(
    data, tmp_path, larger, whole
):
    run = begun(data, tmp_path / "run", larger)
    tree = to_tree(run.state)
    assert [int(tree[name]) for name in ("count", "step", "schedule_step")] == [STEPS, 0, 0]
    source = open_source(str(larger))
    for slot in ("params", "mu", "nu"):
        assert same_tree(tree[slot], source.stack(slot))
    small, large = (
        open_source(str(path)).stack("nu")["layers"]["mlp"]["dense_4h_to_h"]
        for path in (whole, larger)
    )
    assert np.array_equal(large["weight"], small["weight"][[0, 0, 1]])
    assert small["weight"].max() > 0
    run.close()


def test_the_first_rows_after_growth(data, tmp_path, larger, whole):
    out = tmp_path / "run"
    begun(data, out, larger).go()
    rows = rows_of(out)
    assert rows[0]["event"] == "start, grown: layer 2 to 3"
    assert (rows[0]["step"], rows[1]["step"]) == ("0", "0")
    assert rows[1]["validation_loss"]
    assert rows[0]["tokens"] == rows[1]["tokens"] == rows_of(whole)[-1]["tokens"]
    assert rows[0]["flops"] == rows_of(whole)[-1]["flops"]
    rates = [float(row["learning_rate"]) for row in rows if row["loss"]]
    assert rates[0] == pytest.approx(1e-2 * 2 / 3)
    lineage = open_source(str(out)).lineage
    assert [entry["operation"] for entry in lineage] == ["train", "depth", "train"]
    # The source's rows come along, and are drawn before those of this run.
    earlier = (out / "history.csv").read_text()
    assert len(earlier.splitlines()) == 1 + len(rows_of(whole))


def test_a_grown_run_stopped_and_resumed_is_the_same(data, tmp_path, larger):
    begun(data, tmp_path / "whole", larger).go()
    out = tmp_path / "run"
    send_at(begun(data, out, larger), 5, signal.SIGTERM).go()
    moved = larger.rename(larger.with_name("moved"))
    try:
        # What was taken from the source is in the run: the source may be gone.
        train(values(data) | {"model": {}}, out, str(larger))
    finally:
        moved.rename(larger)
    assert_as_if_uninterrupted(out, tmp_path / "whole")


def test_the_data_stream_goes_on_after_growth(data, tmp_path, larger, whole):
    longer = new_run(data, tmp_path / "longer", schedule={"steps": 2 * STEPS})
    run = begun(data, tmp_path / "run", larger, seed=99)
    assert (run.position.drawn(0), run.position.new) == (STEPS * SEQUENCES, False)
    for step in range(3):
        ours = run.position.stream.batch(run.position.drawn(step), SEQUENCES)
        assert np.array_equal(
            ours, longer.position.stream.batch(longer.position.drawn(STEPS + step), SEQUENCES)
        )
        assert not np.array_equal(
            ours, longer.position.stream.batch(longer.position.drawn(step), SEQUENCES)
        )
    run.close()
    longer.close()


def test_other_data_after_growth_begin_a_stream_of_their_own(data, tmp_path, larger, whole):
    out = tmp_path / "run"
    mixture = {"train": {str(data / "text"): 1, str(data / "code"): 3}}
    run = begun(data, out, larger, data=mixture)
    assert (run.position.new, run.position.number, run.position.drawn(0)) == (True, 1, 0)
    assert not np.array_equal(
        run.position.stream.batch(0, SEQUENCES), Stream(run.data.mixture, 5).batch(0, SEQUENCES)
    )
    run.go()
    events = [row["event"] for row in rows_of(out) if row["event"]]
    assert events[1:] == ["data stream 1 begins", "another validation set"]
    stream = open_source(str(out)).record["stream"]
    assert (stream["number"], stream["drawn"]) == (1, STEPS * SEQUENCES)
    # A run from this one goes on in that stream.
    again = begun(data, tmp_path / "again", out, data=mixture)
    assert (again.position.new, again.position.number, again.position.drawn(0)) == (
        False,
        1,
        STEPS * SEQUENCES,
    )
    again.close()


@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_a_hugging_face_model_begins_adam_anew(as_checkpoint, data, tmp_path, whole):
    start = tmp_path / "hf"
    write_output(start, "huggingface", convert_to_directory(open_source(str(whole))))
    if as_checkpoint:
        source, start = open_source(str(start)), tmp_path / "imported"
        write_output(start, "checkpoint", convert_to_checkpoint(source))
    run = begun(data, tmp_path / "run", start)
    tree = to_tree(run.state)
    assert [int(tree[name]) for name in ("count", "step", "schedule_step")] == [0, 0, 0]
    assert same_tree(tree["params"], open_source(str(whole)).stack())
    assert not any(np.any(leaf) for slot in ("mu", "nu") for leaf in jax.tree.leaves(tree[slot]))
    assert run.position.drawn(0) == run.position.tokens(0) == 0
    run.close()


def test_a_context_of_its_own(data, tmp_path, whole):
    """The context may differ from the source's; then the windows differ, and so does the stream."""
    sections = values(data) | {"model": {"context": 8}}
    run = Run(begin(prepare(sections, tmp_path / "run", str(whole))))
    assert run.model_config["max_position_embeddings"] == 8
    assert run.position.new
    run.close()
