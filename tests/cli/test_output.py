"""--json and --quiet, the same for every verb with a result; records and fields in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from conftest import save_checkpoint, save_directory

from growkit.cli import run
from growkit.cli.comparing import _format_fields
from growkit.cli.output import WITHOUT
from growkit.cli.records import describe_record
from growkit.cli.verbs import VERBS, growkit
from growkit.models.gpt_neox import GPT_NEOX

TINY = GPT_NEOX.model(
    layer=2, embed=16, head=2, mlp=12, vocab=40, context=16, rotary_pct=0.5, tied=True
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model of each kind, and one that was grown."""
    path = tmp_path_factory.mktemp("models")
    save_directory(path / "hf", TINY)
    save_checkpoint(path / "ck", TINY)
    save_checkpoint(path / "other", TINY)
    assert run(["depth", "--map", "2:3", str(path / "ck"), str(path / "grown")]) == 0
    return path


def test_every_verb_has_both_options_or_says_why_not():
    context = click.Context(growkit)
    for name in VERBS:
        command = growkit.get_command(context, name)
        options = {option for parameter in command.params for option in parameter.opts}
        assert ("--json" in options) == ("--quiet" in options) == (name not in WITHOUT), name


@pytest.mark.parametrize(
    ("words", "key", "value", "brief"),
    [
        ("verify ck grown", "verified", True, "verified: all "),
        ("depth --map 2:4 ck OUT", "dry_run", False, "wrote OUT"),
        ("average ck other --out OUT", "weights", [0.5, 0.5], "wrote OUT: the mean of 2 models"),
        ("import hf OUT", "parameters", TINY.parameters, "wrote OUT: "),
        ("export ck OUT", "dtype", "float32", "wrote OUT: "),
    ],
)
def test_a_result_is_one_document_or_one_line(
    words, key, value, brief, place, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(place)
    for option in ("--json", "--quiet"):
        out = tmp_path / option.strip("-")
        given = [str(out) if word == "OUT" else word for word in words.split()]
        assert run([*given, option]) == 0
        said = capsys.readouterr()
        assert said.err == "" and "\x1b" not in said.out
        if option == "--json":
            assert json.loads(said.out)[key] == value
        else:
            assert said.out.startswith(brief.replace("OUT", str(out)))
            assert said.out.count("\n") == 1


def test_tables_have_colours_on_no_pipe(capsys):
    assert run(["advise", "--target", "760M", "--tokens", "41B"]) == 0
    said = capsys.readouterr().out
    assert "760M" in said and "\x1b" not in said


def test_no_color_is_obeyed_on_a_terminal(monkeypatch):
    from trainer.log.report import _make_bar

    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # as if standard error were a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert _make_bar().console.is_terminal and not _make_bar().console.no_color
    monkeypatch.setenv("NO_COLOR", "1")
    assert _make_bar().console.no_color


def test_a_record_in_words():
    record = {
        "step": 1200,
        "schedule_step": 1200,
        "count": 900,
        "tokens": 76_800,
        "flops": 3.4e12,
        "validation_loss": 3.384,
        "validation_windows": "ab",
        "stream": {"number": 0, "drawn": 4800},
        "some_other": 3,
    }
    assert describe_record(record) == (
        "step 1,200, Adam's count 900, 76.8K tokens, 3.4e+12 FLOPs, validation loss 3.3840 "
        "(perplexity 29.49), 4,800 sequences drawn, some other 3"
    )
    assert describe_record({}) == "no record"
    assert describe_record({"step": "x", "stream": [], "validation_loss": None}) == "no record"


def test_fields_that_differ_in_words():
    lists = (["full"] * 3, ["full", "full", "sliding", "full"])
    fields = {
        "layer": (2, 3),
        "rope_theta": (None, 10000.0),
        "layer_types": lists,
        "rope": ({"a": 1, "b": 2}, {"a": 1, "b": 3}),
        "long": (None, list(range(99))),
    }
    assert _format_fields(fields) == (
        "layer 2 and 3, rope_theta only in B (10000.0), layer_types from entry 2 on (of 3 and 4), "
        "rope (b 2 and 3), long only in B (a list of 99)"
    )


def test_a_name_of_the_hub_beside_a_folder_of_its_owner(place, monkeypatch, capsys):
    """As in transformers: what is here is taken from here, and all else is asked of the Hub."""
    import huggingface_hub

    monkeypatch.chdir(place)
    (place / "owner" / "small").mkdir(parents=True)
    asked = []

    def fail(name, **_):
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert run(["inspect", "owner/smal"]) == 1
    said = capsys.readouterr().err
    assert "there is no directory 'owner/smal'" in said and "did you mean 'owner/small'?" in said
    assert run(["inspect", "owner/small"]) == 1 and asked == ["owner/smal"]


@pytest.mark.parametrize("stuck", [True, False])
def test_a_signal_ends_what_does_not_act_on_it(stuck):
    """A handler that does nothing stands for a call that Python cannot interrupt."""
    program = """
import signal, time
from growkit.cli import signals
signals.GRACE = 0.2
def terminate(*_):
    raise SystemExit(75)
signal.signal(signal.SIGTERM, terminate)
with signals.leave_on_signal():
    print("ready", flush=True)
    if STUCK:
        signal.signal(signal.SIGTERM, lambda *_: None)
    time.sleep(60)
""".replace("STUCK", str(stuck))
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75
    assert said == ("growkit: terminated\n" if stuck else "")
