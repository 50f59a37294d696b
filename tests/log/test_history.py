"""Metrics: what is added is what is read, through a kill, a resumption and a growth."""

from __future__ import annotations

import os

import pytest
from etils import epath

from growkit.errors import GrowkitError
from trainer.log.history import CARRIED, COLUMNS, History, parse_rows, render_rows


def begun(path, earlier=b""):
    path.mkdir(exist_ok=True)
    history = History(epath.Path(path))
    history.begin(earlier)
    return history


def test_rows_round_trip(tmp_path):
    history = begun(tmp_path / "run")
    history.add(step=0, tokens=0, event='start, grown: layer 2 to "3"')
    history.add(
        step=1, tokens=64, flops=1.5e20, loss=0.1 + 0.2, learning_rate=2e-4, tokens_per_second=12.5
    )
    again = History(epath.Path(tmp_path / "run"))
    assert again.rows == history.rows == parse_rows(render_rows(history.rows))
    assert set(again.rows[1]) == set(COLUMNS)
    # Every digit: a resumed run's file must be the uninterrupted one's to the bit.
    assert float(again.rows[1]["loss"]) == 0.1 + 0.2
    assert again.rows[0]["event"] == 'start, grown: layer 2 to "3"'


def test_a_line_cut_off_by_a_kill_is_forgotten(tmp_path):
    history = begun(tmp_path / "run")
    for step in (1, 2, 3):
        history.add(step=step, tokens=64 * step, loss=1.0, event="data stream 1 begins")
    path = tmp_path / "run" / "metrics.csv"
    whole = path.read_text()
    line = whole.rindex("\n", 0, -1) + 1
    for cut in range(line, len(whole)):
        path.write_text(whole[:cut])
        assert [row["step"] for row in History(epath.Path(tmp_path / "run")).rows] == ["1", "2"]
    path.write_text(whole)
    assert len(History(epath.Path(tmp_path / "run")).rows) == 3


def test_keep_until_forgets_later_rows_in_the_file_too(tmp_path):
    history = begun(tmp_path / "run")
    for step in (0, 5, 10, 15):
        history.add(step=step, tokens=step, loss=1.0)
    history.keep_until(10)
    history.add(step=11, tokens=11, loss=2.0)
    again = History(epath.Path(tmp_path / "run"))
    assert (
        [row["step"] for row in again.rows]
        == ["0", "5", "10", "11"]
        == [row["step"] for row in history.rows]
    )


def test_beginning_anew_forgets_what_a_killed_run_left(tmp_path):
    begun(tmp_path / "run").add(step=0, tokens=0, event="start")
    begun(tmp_path / "run").add(step=0, tokens=0, event="start")
    assert len(History(epath.Path(tmp_path / "run")).rows) == 1


def test_validation_loss_is_the_steps_own(tmp_path):
    history = begun(tmp_path / "run")
    history.add(step=1, tokens=1, loss=3.0)
    history.add(step=1, tokens=1, validation_loss=2.5)
    history.add(step=11, tokens=1, validation_loss=1.5)
    assert [history.find_validation_loss(step) for step in (1, 11, 0)] == [2.5, 1.5, None]


def test_the_last_file_stands_when_writing_the_next_fails(tmp_path, monkeypatch):
    history = begun(tmp_path / "run")
    history.add(step=1, tokens=1, loss=3.0)

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    try:
        history.flush()
    except OSError:
        assert len(History(epath.Path(tmp_path / "run")).rows) == 1
    else:
        raise AssertionError("a full disk went unnoticed")


def many_rows(history):
    for step in range(3 * CARRIED):
        history.add(step=step, tokens=step, loss=1.0)
        if step % 100 == 0:
            history.add(step=step, tokens=step, validation_loss=1.0)
    history.add(step=step, tokens=step, event="data stream 1 begins")


def kinds(rows):
    return (
        sum(bool(row["loss"]) for row in rows),
        sum(bool(row["validation_loss"]) for row in rows),
        sum(bool(row["event"]) for row in rows),
    )


def test_what_is_carried_is_thinned_but_for_validations_and_events(tmp_path):
    history = begun(tmp_path / "run")
    many_rows(history)
    carried = parse_rows(history.export().decode())
    assert kinds(history.rows) == (3 * CARRIED, 3 * CARRIED // 100, 1)
    assert kinds(carried) == (CARRIED, 3 * CARRIED // 100, 1)
    steps = [int(row["step"]) for row in carried]
    assert steps == sorted(steps)


def test_what_is_carried_becomes_the_earlier_rows_of_the_next_run(tmp_path):
    first = begun(tmp_path / "first")
    first.add(step=1, tokens=64, loss=3.0)
    second = begun(tmp_path / "second", first.export())
    second.add(step=1, tokens=128, loss=2.0)
    again = History(epath.Path(tmp_path / "second"))
    assert again.earlier == first.rows
    assert [row["tokens"] for row in parse_rows(again.export().decode())] == ["64", "128"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hello,world", "it has 2 columns and the header 14"),
        ("x,64,1.0,2.0,,,,,,,,,,", "the step is 'x'"),
        ("2,64,1.0,loss,,,,,,,,,,", "could not convert string to float: 'loss'"),
        ('2,64,1.0,,,,,,,,,"[",,', "Expecting value"),
        ("2,64,1.0,,,,,,,,,,[],", "the validation_losses are not an object"),
    ],
)
def test_a_line_that_is_no_row_is_named(line, words, tmp_path):
    begun(tmp_path / "run").add(step=1, tokens=64, flops=1.0, loss=2.0)
    path = tmp_path / "run" / "metrics.csv"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(GrowkitError) as caught:
        History(epath.Path(tmp_path / "run"))
    said = str(caught.value)
    assert said.startswith(f"{path}, line 3, is not a row of metrics ({words}")
    assert said.endswith("remove the file, and the run makes it again from its last checkpoint")


@pytest.mark.parametrize("content", [b"\xff\xfe\0\0", b"\0\0\0\0\n", b"not,a,header\n1,2,3\n"])
def test_a_file_of_foreign_bytes_is_named(content, tmp_path):
    begun(tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").write_bytes(content)
    with pytest.raises(GrowkitError, match="metrics.csv.*remove the file"):
        History(epath.Path(tmp_path / "run"))


def add_rows(history, first, last):
    for step in range(first, last + 1):
        history.add(step=step, tokens=64 * step, flops=1.0 * step, loss=2.0)
        if step % 4 == 0:
            history.add(step=step, tokens=64 * step, flops=1.0 * step, validation_loss=1.0)


@pytest.mark.parametrize("left", [0, 1, 5, 9])
def test_lost_rows_are_made_again_in_their_order(left, tmp_path):
    history = begun(tmp_path / "run", b"")
    history.add(step=0, tokens=0, flops=0.0, event="start")
    add_rows(history, 1, 8)
    rows = list(history.rows)
    carried = history.export()
    assert history.restore(carried, 8) == 0 and history.rows == rows
    history.rows = rows[:left]
    assert history.restore(carried, 8) == len(rows) - left
    assert history.rows == rows


def test_lost_rows_of_the_source_are_made_again(tmp_path):
    source = begun(tmp_path / "source")
    source.add(step=0, tokens=0, flops=0.0, event="start")
    add_rows(source, 1, 8)
    history = begun(tmp_path / "run", source.export())
    history.add(step=0, tokens=512, flops=8.0, event="start, grown: layer 2 to 3")
    add_rows(history, 1, 4)
    carried = history.export()
    for name in ("metrics.csv", "history.csv"):
        (tmp_path / "run" / name).unlink()
    again = History(epath.Path(tmp_path / "run"))
    assert again.restore(carried, 4) == len(history.rows)
    assert again.rows == history.rows and again.earlier == history.earlier
    assert History(epath.Path(tmp_path / "run")).earlier == history.earlier


def test_a_row_that_was_changed_is_put_right(tmp_path):
    history = begun(tmp_path / "run")
    add_rows(history, 1, 4)
    carried, rows = history.export(), list(history.rows)
    history.rows[2] = history.rows[2] | {"loss": "9.0"}
    assert history.restore(carried, 8) == 0 and history.rows == rows


def test_a_step_that_is_validated_before_and_after_growth_keeps_both(tmp_path):
    history = begun(tmp_path / "run")
    history.add(step=0, tokens=0, flops=0.0, event="start")
    add_rows(history, 1, 4)
    before = list(history.rows)
    carried = history.export()
    history.add(step=4, tokens=256, flops=4.0, event="grown: layer 2 to 3")
    history.add(step=4, tokens=256, flops=4.0, validation_loss=0.9)
    after = list(history.rows)
    assert history.restore(history.export(), 4) == 0 and history.rows == after
    # A run that was killed after its growth goes on from the checkpoint before it.
    assert history.restore(carried, 4) == 0 and history.rows == before
