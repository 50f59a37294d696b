"""The time left of an evaluation is that of the tokens left, and is told without a terminal too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from growkit.cli import remaining
from growkit.cli.remaining import Remaining, format_seconds, show_remaining


class Clock:
    """A clock that is moved by hand, in seconds."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_time_left_by_tokens():
    clock = Clock()
    told = Remaining(clock)
    told.expect(3000, 1_000_000)
    assert told.estimate_seconds() is None
    assert told.describe() == "0 of 3,000 texts"
    clock.now += 60
    # A tenth of the texts, which are the longest, and a quarter of the work.
    told.advance(300, 250_000)
    assert told.estimate_seconds() == pytest.approx(180)
    assert told.describe() == "300 of 3,000 texts, 3 min left"
    told.advance(2700, 800_000)
    assert told.describe() == "3,000 of 3,000 texts, 0 s left"


def test_times_in_words():
    words = {0.4: "0 s", 59: "59 s", 61: "1 min", 3570: "1 h 0 min", 7500: "2 h 5 min"}
    assert {seconds: format_seconds(seconds) for seconds in words} == words


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(remaining, "Remaining", lambda: Remaining(clock))
    model = SimpleNamespace()
    with show_remaining("m: bpb/x (1 of 2)", model):
        model.expect(3000, 3_000_000)
        for _ in range(30):
            clock.now += 10
            model.advance(10, 10_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "m: bpb/x (1 of 2): 30 of 3,000 texts, 50 min left"
    assert not hasattr(model, "expect")


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    model = SimpleNamespace()
    with show_remaining("m: piqa", model):
        model.expect(4, 100)
        model.advance(4, 100)
    assert "Traceback" not in capsys.readouterr().err
