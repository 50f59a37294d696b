"""Four published laws on one question: what each says, where they disagree, what studies say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SMALL, save_checkpoint

from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.models.gpt_neox import GPT_NEOX
from trainer.study.advice import Growth, Size
from trainer.study.evidence import find_studies, read_study
from trainer.study.laws import find_agreements, find_disagreements, list_findings
from trainer.study.verdict import describe_study

LARGE = GPT_NEOX.model(layer=12, embed=64, head=4, mlp=256, vocab=128, context=64)


def ask(target=1.1e9, source=0.55e9, tokens=20e9, seen=None) -> Growth:
    """A growth between two bare counts, with a budget of so many tokens of the target."""
    large, small = (Size.from_count(str(count), int(count)) for count in (target, source))
    return Growth(large, replace(small, tokens=seen), tokens * large.flops_per_token)


def find(growth: Growth, name: str):
    (found,) = [finding for finding in list_findings(growth) if finding.name == name]
    return found


def test_there_are_four_and_each_has_a_source_and_a_range():
    findings = list_findings(ask())
    assert [finding.name for finding in findings] == ["timing", "late", "boundary", "factor"]
    assert all("arXiv" in finding.work and finding.measured for finding in findings)


def test_timing_says_what_the_budget_says():
    growth = ask(seen=3e9)
    timing = find(growth, "timing")
    assert timing.figures["source_tokens"] == growth.source_tokens
    assert timing.outside == growth.list_deviations() != []
    assert "The source has seen 3B." in timing.says
    assert find(ask(tokens=1e6), "timing").says.startswith("No advice: it asks for a source of")


def test_late_growth_costs_four_fifths_of_one_layer_and_a_fifth_of_all():
    target = Size.from_model("large", LARGE)
    source = Size.from_model("small", LARGE.change(layer=6))
    growth = Growth(target, source, 1e9 * target.flops_per_token)
    one = LARGE.change(layer=1).flops_per_token()
    late = find(growth, "late")
    assert late.figures["flops"] == pytest.approx(1e9 * (0.8 * one + 0.2 * LARGE.flops_per_token()))
    assert late.figures["source_tokens"] == 0.8e9
    assert late.outside[1] == "a source of 6 layers, measured 0 and 1 (more were worse)"
    assert len(late.outside) == 2 and "measured 124M to 7B" in late.outside[0]
    # A bare count has no layers: the paper's own figure stands.
    bare = find(ask(), "late")
    assert bare.figures["flops"] is None and "about a fifth of from-scratch's FLOPs" in bare.says
    assert bare.outside == []


@pytest.mark.parametrize("seen,method", [(10.9e9, "stack"), (11e9, "stack"), (11.1e9, "replicate")])
def test_the_boundary_is_at_20_tokens_a_parameter_of_the_source(seen, method):
    growth = ask(seen=seen)
    boundary = find(growth, "boundary")
    assert boundary.figures["method"] == method and boundary.outside == []
    disagreeing = any("Which copies" in words for words in find_disagreements(growth))
    assert disagreeing == (method == "replicate") and disagreeing != any(find_agreements(growth))


def test_the_boundary_without_a_source_that_was_trained():
    # By the timing law, where that has advice.
    growth = ask(tokens=100e9)
    assert growth.affordable
    ratio = growth.source_tokens / 0.55e9
    assert find(growth, "boundary").figures["tokens_a_parameter"] == pytest.approx(ratio)
    costly = ask(tokens=1e6)
    assert find(costly, "boundary").figures["method"] is None
    assert find(costly, "boundary").says.startswith("Stack before the source has seen 11B tokens")
    assert not list(find_agreements(costly))
    assert any("G_stack has no advice" in words for words in find_disagreements(costly))


@pytest.mark.parametrize(
    "source,words",
    [(0.55e9, "by 2 in parameters: the most reliable."), (0.85e9, "below 2"), (0.275e9, "above 2")],
)
def test_the_factor(source, words):
    assert words in find(ask(source=source), "factor").says


@pytest.mark.parametrize("tokens,words", [(21.9e9, "are largest below"), (22.1e9, "shrink beyond")])
def test_gains_shrink_past_20_tokens_a_parameter_of_the_target(tokens, words):
    growth = ask(tokens=tokens)
    assert f"gains {words} 20." in find(growth, "factor").says
    assert any("How much" in said for said in find_disagreements(growth)) == ("shrink" in words)


def test_growth_in_width_is_outside_of_what_depth_was_measured_on():
    target, source = (
        Size.from_model(str(model.embed), model) for model in (LARGE, LARGE.change(embed=32))
    )
    growth = Growth(target, source, 1e15)
    for name in ("late", "boundary"):
        assert any("growth in width" in words for words in find(growth, name).outside), name


# Studies of one's own


def arm(name, operator, loss, saved=None, layers=2, tokens=9, std=None, **changes):
    spread = {"mean": saved, "std": 0.01 if saved else None, "runs": 1 if std is None else 3}
    return {
        "name": name,
        "operator": operator,
        "sources": [f"of {layers}"],
        "source": {"layer": layers, "parameters": 50},
        "control": False,
        "saved": spread,
        "saved_without_source": spread,
        "loss": {"mean": loss, "std": std, "runs": spread["runs"]},
        "rewarmup": 0,
        "reached": saved is not None,
    } | changes


def save_study(path: Path, arms, seen=9) -> str:
    names = {name for each in arms for name in each.get("sources", ())}
    results = {
        "format": 1,
        "target": {"layer": 8, "parameters": 100},
        "source": {"layer": 2, "parameters": 50},
        "tokens": {"scratch": 2000, "source": 50 * seen},
        "arms": arms,
        "runs": [{"name": name, "budget": None, "tokens": 50 * seen} for name in sorted(names)],
    }
    path.mkdir()
    (path / "results.json").write_text(json.dumps(results))
    return str(path)


STACK = arm("stacked", "map 2:8, depth_method stack", 3.5, saved=0.25)
REPLICATE = arm("replicated", "map 2:8", 3.6)


def say(tmp_path, arms, **options):
    return list(describe_study(read_study(save_study(tmp_path / "study", arms, **options))))


@pytest.mark.parametrize("seen,agrees", [(9, "as"), (30, "not as")])
def test_a_study_says_which_copies_are_better(tmp_path, seen, agrees):
    assert say(tmp_path, [STACK, REPLICATE], seen=seen) == [
        "Best: stacked saved 25.0% ± 1.0% (1 run), its source counted; growth by 2 in parameters "
        f"from {seen} tokens a parameter of the source.",
        "Stack ahead of replicate: stacked (3.5000, 1 run), replicated (3.6000, 1 run), at "
        f"{seen} tokens a parameter of the source: {agrees} Wang has it.",
    ]


def test_differences_within_the_deviation_are_none(tmp_path):
    close = arm("replicated", "map 2:8", 3.55, std=0.06)
    said = say(tmp_path, [STACK, close])
    assert said[1].startswith("Stack level with replicate:") and said[1].endswith(
        "not as Wang has it."
    )


def test_only_arms_that_differ_in_nothing_else_are_compared(tmp_path):
    others = [
        arm("wider", "map 2:8, embed 2x", 3.6),
        arm("listed", "map 0,1,0,1", 3.6),
        arm("elsewhere", "map 1:8", 3.7, layers=1),
        arm("control", "", 3.0, control=True),
    ]
    said = say(tmp_path, [STACK, *others])
    assert not any("replicate" in words for words in said)
    # From one layer stacking and replicating are the same; it is held against the others.
    assert said[-1] == (
        "From one layer, as Bu grows: elsewhere (3.7000, 1 run), behind the best of the others, "
        "stacked (3.5000, 1 run)."
    )


def test_a_study_that_saved_nothing_or_is_not_finished(tmp_path):
    assert say(tmp_path, [REPLICATE])[0].startswith(
        "No arm reached from-scratch's loss in all of its runs; nearest is replicated (3.6000, 1"
    )
    unfinished = arm("later", "map 2:8", None)
    path = save_study(tmp_path / "other", [unfinished])
    assert list(describe_study(read_study(path))) == ["No arm is finished yet."]


# The command


QUESTION = ["advise", "--target", "760m", "--source", "580m", "--tokens", "41B"]


def test_studies_of_the_directory_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(QUESTION) == 0
    assert "Your studies: none here" in capsys.readouterr().out
    save_study(tmp_path / "mine", [STACK, REPLICATE])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    assert [study.path for study in find_studies()] == ["mine"]
    assert run(QUESTION) == 0
    out = capsys.readouterr().out
    assert "What your study says: mine, found here" in out and "Stack ahead of replicate" in out
    assert run([*QUESTION, "--study", "mine", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["studies"][0]["says"][0].startswith("Best: stacked saved 25.0%")
    assert found["studies_found"] is False
    assert [law["name"] for law in found["laws"]] == ["timing", "late", "boundary", "factor"]
    assert found["laws"][2]["figures"]["method"] == "replicate"
    assert len(found["disagreements"]) == 4 and found["agreements"] == []


@pytest.mark.parametrize(
    "options", [[], ["--topology", "v3-32", "--price", "2"], ["--study", "mine"]]
)
def test_everything_fits_80_columns(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    save_study(
        tmp_path / "mine", [STACK, REPLICATE, arm("a_very_long_name_of_an_arm_" * 3, "", 4.0)]
    )
    assert run([*QUESTION, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 60 and max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines), "nothing is cut"


def test_what_a_source_has_seen_is_in_its_checkpoint(tmp_path, capsys):
    save_checkpoint(tmp_path / "source", SMALL)
    tokens = open_source(str(tmp_path / "source")).record["tokens"]
    question = ["advise", "--target", "760m", "--source", str(tmp_path / "source"), "--json"]
    assert run([*question, "--tokens", "41B"]) == 0
    assert json.loads(capsys.readouterr().out)["source"]["tokens"] == tokens
    assert run([*question, "--tokens", "41B", "--source-tokens", "5B"]) == 0
    assert json.loads(capsys.readouterr().out)["source"]["tokens"] == 5e9
    assert run([*question, "--tokens", "41B", "--source-tokens", "many"]) == 2
    assert "--source-tokens is a whole number above 0" in capsys.readouterr().err
