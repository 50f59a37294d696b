"""An annealing is the run it branches from, trained on at a learning rate that comes down."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from runs import (
    NO_DROPOUT,
    SEQUENCES,
    STEPS,
    TINY,
    recipe,
    rows,
    same_state,
    state_of,
    values,
)

from convert.directory import convert_to_directory
from growkit.checkpoint.location import open_source, write_output
from growkit.cli import run as run_command
from growkit.errors import UsageError
from growkit.growth.depth import plan_depth
from growkit.quantity import parse_count
from growkit.surgery.grow import prepare_growth
from trainer.run.stages import train

pytestmark = pytest.mark.usefixtures("compiled_once")

STEP = SEQUENCES * TINY.context


@pytest.fixture(scope="module")
def source(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("source") / "run"
    train(values(data, dropout=NO_DROPOUT), out)
    return out


def anneal(source, out, *more, to="2e-4", tokens=6 * STEP):
    return run_command(
        ["anneal", str(source), "--to", to, "--tokens", str(tokens), "--out", str(out), *more]
    )


def rates(out):
    return [float(row["learning_rate"]) for row in rows(out) if row["learning_rate"]]


@pytest.fixture(scope="module")
def branch(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("branch") / "run"
    assert anneal(source, out, "log.every=1") == 0
    return out


def test_the_rate_falls_linearly_from_where_the_run_stood(branch, source):
    last = rates(source)[-1]
    assert last == pytest.approx(1e-3)  # a tenth of the peak
    np.testing.assert_allclose(rates(branch), np.linspace(last, 2e-4, 7)[1:], rtol=1e-5)


def test_a_rate_that_cannot_fall_further_is_said_to_stay(source, tmp_path, capsys):
    assert anneal(source, tmp_path / "run", to="1e-3", tokens=STEP) == 0
    assert "the learning rate is 0.001 already and stays for 1 steps" in capsys.readouterr().err
    assert rates(tmp_path / "run") == [pytest.approx(1e-3)]


def test_it_is_a_training_from_the_checkpoint_at_that_rate(branch, source, data, tmp_path):
    fall = {"kind": "linear", "steps": 6, "warmup": 0, "floor": 0.2}
    sections = {"dropout": NO_DROPOUT, "batch": {"accumulation": 2}, "eval": {"every": 3}}
    by_hand = recipe(data, schedule=fall, optimizer={"learning_rate": 1e-3}, **sections)
    train(by_hand, tmp_path / "hand", str(source))
    ours, theirs = state_of(branch), state_of(tmp_path / "hand")
    assert same_state(ours, theirs)
    assert ours["count"] == STEPS + 6
    # A fresh optimizer, or another checkpoint, gives another training.
    write_output(tmp_path / "hf", "huggingface", convert_to_directory(open_source(str(source))))
    train(by_hand, tmp_path / "cold", str(tmp_path / "hf"))
    train(by_hand, tmp_path / "earlier", f"{source}@8")
    assert not same_state(ours, state_of(tmp_path / "cold"))
    assert not same_state(ours, state_of(tmp_path / "earlier"))


def test_the_data_stream_goes_on_and_the_lineage_records_the_branch(branch, source, capsys):
    ours, theirs = open_source(str(branch)), open_source(str(source))
    assert ours.record["stream"] == theirs.record["stream"] | {"drawn": (STEPS + 6) * SEQUENCES}
    assert ours.record["tokens"] == (STEPS + 6) * STEP
    entry = ours.lineage[-1]
    assert entry["branch"] == {"verb": "anneal", "from": 1e-3, "to": 2e-4, "tokens": 6 * STEP}
    assert (entry["source"]["step"], entry["source"]["fingerprint"]) == (STEPS, theirs.fingerprint)
    assert run_command(["inspect", str(branch)]) == 0
    assert "anneal: learning rate 0.001 to 0.0002 over 384 tokens" in capsys.readouterr().out


def test_the_same_command_resumes_it_even_without_its_source(branch, source, capsys):
    before = state_of(branch)
    moved = source.rename(source.with_name("moved"))
    try:
        assert anneal(source, branch, "log.every=1") == 0
        assert anneal(source, branch, "log.every=1", to="1e-4") == 2
    finally:
        moved.rename(source)
    said = capsys.readouterr()
    assert "finished" in said.out
    assert (
        "was begun with --to 0.0002 --tokens 384, got 0.0001 and 384; name another --out"
        in said.err
    )
    assert same_state(state_of(branch), before)


def test_from_a_step_and_onto_other_data(source, data, tmp_path):
    assert (
        anneal(
            f"{source}@4",
            tmp_path / "run",
            f"data.train={data / 'code'}",
            "log.every=1",
            tokens=STEP,
        )
        == 0
    )
    entry = open_source(str(tmp_path / "run")).lineage[-1]
    # Step 4 of 12 after 3 of warm-up: one ninth of the way down.
    assert entry["branch"]["from"] == pytest.approx(
        1e-2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / 9))), rel=1e-6
    )
    assert rates(tmp_path / "run") == pytest.approx([2e-4])
    assert open_source(str(tmp_path / "run")).record["stream"]["number"] == 1


@pytest.mark.parametrize(
    "given,said",
    [
        (
            {"to": "2e-3"},
            "--to must lie between 0 and 0.001, the learning rate that SOURCE has come to, "
            "got 0.002",
        ),
        ({"to": "-1"}, "--to must lie between 0 and 0.001"),
        ({"to": "nan"}, "--to must lie between 0 and 0.001"),
        (
            {"tokens": STEP - 1},
            "--tokens 63 is less than one step of this run, which is 4 sequences of 16 tokens",
        ),
        (
            {"tokens": "5Q"},
            "--tokens is a whole number above 0, as 5B, 500M, 1e9 or 1000000, got '5Q'",
        ),
        (
            {"more": "schedule.floor=0"},
            "an annealing takes schedule.floor from the run, or from --to and --tokens",
        ),
        (
            {"more": "optimizer.learning_rate=1"},
            "an annealing takes optimizer.learning_rate from the run",
        ),
    ],
)
def test_annealings_that_cannot_be(given, said, source, tmp_path, capsys):
    more = [given.pop("more")] if "more" in given else []
    assert anneal(source, tmp_path / "run", *more, **given) == 2
    assert said.replace("SOURCE", str(source)) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["huggingface", "checkpoint"])
def test_what_is_no_runs_checkpoint_has_no_schedule(kind, source, tmp_path, capsys):
    of = open_source(str(source))
    contents = (
        convert_to_directory(of)
        if kind == "huggingface"
        else prepare_growth(of, plan_depth(of.model, "2:3"))
    )
    write_output(tmp_path / "model", kind, contents)
    assert anneal(tmp_path / "model", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert (
        "is not a run's checkpoint, so it has no schedule to come down from" in said
        and said.count("\n") == 1
    )


def test_a_flipped_bit_is_refused_unless_it_is_told_not_to_look(source, tmp_path, capsys):
    copy = shutil.copytree(source, tmp_path / "run")
    file = copy / "checkpoints" / str(STEPS) / "state" / "mu.embed_in.weight" / "0.0"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert anneal(copy, tmp_path / "branch") == 1
    said = capsys.readouterr().err
    assert f"{copy}/checkpoints/{STEPS} is damaged: the bytes of 'mu.embed_in.weight' are" in said
    assert anneal(copy, tmp_path / "branch", "--no-verify") == 0


def test_a_run_that_annealing_did_not_begin(source, tmp_path, capsys):
    assert anneal(source, source) == 2
    assert "is a run that annealing did not begin; name another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text,count",
    [
        ("5B", 5 * 10**9),
        ("500M", 5 * 10**8),
        ("1e9", 10**9),
        ("2.5b", 25 * 10**8),
        ("12", 12),
        ("1_000", 1000),
    ],
)
def test_counts_of_tokens(text, count):
    assert parse_count(text, "--tokens") == count


@pytest.mark.parametrize(
    "text", ["", "B", "0", "-1", "1.5", "nan", "inf", "5 B 3", "1e99999999999"]
)
def test_counts_that_are_none(text):
    with pytest.raises(UsageError, match="whole number above 0"):
        parse_count(text, "--tokens")
