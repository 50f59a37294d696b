"""Advice: the published laws on their authors' own figures, and the numbers of your own studies."""

from __future__ import annotations

import json
import subprocess
import sys
from math import sqrt
from pathlib import Path

import pytest
from conftest import SMALL, save_checkpoint, save_directory

from growkit.cli import run
from growkit.errors import GrowkitError
from trainer.study import advice
from trainer.study.advice import (
    CLAIMS,
    Growth,
    Size,
    compute_source_tokens,
    convert_speedup,
    find_fitted_budgets,
)
from trainer.study.evidence import read_study

ROOT = Path(__file__).parents[2]
# Table 4 of arXiv 2405.15319: parameters, tokens from scratch, and the source's tokens by its law,
# rounded.
TABLE_4 = [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)]


def table_4_holds() -> bool:
    return all(
        compute_source_tokens(count, 6 * count * tokens) == pytest.approx(law, abs=0.006e9)
        for count, tokens, law in TABLE_4
    )


def test_the_timing_law_gives_its_authors_own_table():
    assert table_4_holds()
    # By hand, N = 1e9 and C = 1e20: 0.88 x 9 + 163.27 / 20 - 5.74 = 10.3435.
    assert compute_source_tokens(1e9, 1e20) == pytest.approx(10**10.3435)


@pytest.mark.parametrize(
    ("constant", "wrong"), [("PARAMETERS", 0.881), ("COMPUTE", 163.37), ("CONSTANT", -5.73)]
)
def test_a_law_with_another_constant_does_not(monkeypatch, constant, wrong):
    monkeypatch.setattr(advice, constant, wrong)
    assert not table_4_holds()


def test_a_speedup_is_not_a_saving():
    """G_stack's 54.6 % at 7B: 300B tokens against 194B, so 35 % saved, with the source."""
    assert convert_speedup(300 / 194 - 1) == pytest.approx(1 - 194 / 300)
    assert convert_speedup(1.0) == 0.5
    saved = {claim.where: claim.saved for claim in CLAIMS if claim.counts_source}
    assert saved["7B, depth x4, 300B tokens: 54.6 % speedup"] == pytest.approx(
        1 - 194 / 300, abs=1e-3
    )


def growth(target=1.1e9, source=None, flops=3e20) -> Growth:
    return Growth(
        Size.from_count("t", int(target)), Size.from_count("s", int(source or target / 4)), flops
    )


def test_the_budget_is_shared():
    budget = growth(760e6, 580e6, 6 * 760e6 * 41e9)
    assert budget.tokens == 41e9
    # 0.88 x 8.88081 + 163.27 / 20.27175 - 5.74 = 10.12918.
    assert budget.source_tokens == pytest.approx(10**10.12918, rel=1e-4)
    assert budget.target_tokens == pytest.approx(41e9 - budget.source_tokens * 580 / 760)
    assert budget.source_flops + budget.target_tokens * 6 * 760e6 == pytest.approx(budget.flops)
    counted = budget.compute_flops_to_same_loss(0.4, counts_source=True)
    assert counted == pytest.approx(0.6 * budget.flops)
    not_counted = budget.compute_flops_to_same_loss(0.4, counts_source=False)
    assert not_counted == pytest.approx(0.6 * budget.flops + budget.source_flops)


def test_a_source_that_takes_more_than_half_is_refused():
    assert growth().affordable
    costly = growth(flops=1e19)
    assert costly.source_flops > 0.5e19 and not costly.affordable
    assert costly.compute_flops_to_same_loss(0.4, counts_source=False) is None


def test_the_range_of_the_law():
    assert find_fitted_budgets(410e6) == pytest.approx((0.8e20, 2.2e20))
    assert find_fitted_budgets(3e9) == pytest.approx((4e20, 12e20))
    assert find_fitted_budgets(sqrt(410e6 * 1.1e9)) == pytest.approx(
        (sqrt(0.8 * 2) * 1e20, sqrt(2.2 * 7) * 1e20)
    )
    assert find_fitted_budgets(400e6) is None and find_fitted_budgets(3.1e9) is None
    assert not growth().list_deviations()


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (growth(flops=1.9e20), "budget of 1.9e+20 FLOPs, fitted 2e+20 to 7e+20 at this size"),
        (growth(flops=7.1e20), "fitted 2e+20 to 7e+20"),
        (growth(target=7e9), "target of 7e+09 parameters"),
        (growth(source=0.55e9), "factor of 2.00, fitted at 4"),
        (
            Growth(Size("t", 5, int(1.1e9), 1, 8), Size("s", 4, int(0.275e9), 1, 4), 3e20),
            "width (embed 4 to 8)",
        ),
    ],
)
def test_what_lies_outside_is_named(budget, words):
    found = budget.list_deviations()
    assert len(found) == 1 and words in found[0]


# The command


def said(capsys, *arguments: str) -> dict:
    assert run(["advise", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_counts_take_six_flops_a_parameter(capsys):
    found = said(capsys, "--target", "760M", "--source", "580M", "--tokens", "41B")
    assert found["scratch"] == {
        "tokens": 41e9,
        "flops": 6 * 760e6 * 41e9,
        "days": None,
        "cost": None,
    }
    law = found["law"]
    assert law["source"]["flops"] == pytest.approx(6 * 580e6 * law["source"]["tokens"])
    assert law["source"]["flops"] + law["grown"]["flops"] == pytest.approx(
        found["scratch"]["flops"]
    )
    assert law["outside"] == ["growth by a factor of 1.31, fitted at 4"]
    assert (
        said(capsys, "--target", "760M", "--source", "580M", "--flops", "1.8696e20")["law"] == law
    )


def test_presets_and_models_take_what_their_sizes_do(tmp_path, capsys):
    found = said(capsys, "--target", "760m", "--tokens", "41B")
    # 24 blocks of 12 d^2 and a tied head are multiplied; the attention's 12 layer d context.
    flops = 6 * (24 * 12 * 1536**2 + 50304 * 1536) + 12 * 24 * 1536 * 1024
    assert found["target"]["flops_per_token"] == flops and found["scratch"]["flops"] == 41e9 * flops
    assert found["target"]["parameters"] - found["target"]["without_embeddings"] == 50304 * 1536
    assert found["source"]["name"] == "6 layers of 760m" and found["source"]["recommended"]
    assert found["source"]["factor"] == pytest.approx(4, abs=1e-3) and not found["law"]["outside"]
    save_directory(tmp_path / "target", SMALL.change(layer=6))
    save_checkpoint(tmp_path / "source", SMALL)
    found = said(
        capsys,
        "--target",
        str(tmp_path / "target"),
        "--source",
        str(tmp_path / "source"),
        "--tokens",
        "1M",
    )
    assert found["source"]["flops_per_token"] == SMALL.flops_per_token()
    # The head of SMALL is not tied: both its tables are embeddings.
    assert found["source"]["without_embeddings"] == SMALL.parameters - 2 * SMALL.vocab * SMALL.embed
    assert found["law"]["affordable"] is False and found["law"]["grown"]["tokens"] is None


def test_days_and_cost_are_those_of_the_plan(capsys):
    from trainer.config.sections import build_architecture, resolve
    from trainer.config.values import read_values
    from trainer.devices.accelerators import parse_slice
    from trainer.plan.compiler import Memory
    from trainer.plan.plan import Plan
    from trainer.plan.topology import Target

    config = resolve(read_values("760m", []))
    part = parse_slice("v3-32")
    peak = part.chips * part.accelerator.peak
    target = Target("v3-32", [None] * 32, part.chips, 1, peak, "core")
    model = build_architecture(config.model)
    plan = Plan(config, model, target, {}, None, Memory(0, 0, 0, 0, 1), 0.0)
    tokens = str(config.schedule.steps * plan.tokens_per_step)
    options = ("--target", "760m", "--tokens", tokens, "--topology", "v3-32", "--price", "2")
    found = said(capsys, *options, "--mfu", "0.3")["scratch"]
    assert found["days"] == pytest.approx(plan.estimate_hours(0.3) / 24)
    assert found["cost"] == pytest.approx(plan.estimate_cost(0.3, 2.0))
    assert said(capsys, *options)["scratch"]["days"] == pytest.approx(plan.estimate_hours(0.4) / 24)
    assert run(["advise", *options]) == 0
    assert "FLOPs / (40% MFU, assumed, x 1,968 TFLOP/s of v3-32)" in capsys.readouterr().out


RESULTS = {
    "format": 1,
    "growkit": "0.1",
    "target": {"layer": 4, "parameters": 2_000_000},
    "source": {"layer": 2, "parameters": 1_000_000},
    "tokens": {"scratch": 4_000_000, "source": 500_000},
    "seeds": [0, 1, 2],
    "arms": [
        {
            "name": "replicate",
            "operator": "depth replicate",
            "saved": {"mean": 0.25, "std": 0.02, "runs": 3},
            "saved_without_source": {"mean": 0.375, "std": 0.03, "runs": 3},
            "loss": {"mean": 2.0, "std": 0.01, "runs": 3},
            "rewarmup": 20,
            "reached": True,
        },
        {
            "name": "clone",
            "operator": "width clone",
            "saved": {"mean": None, "std": None, "runs": 1},
            "saved_without_source": {"mean": None, "std": None, "runs": 1},
            "loss": {"mean": 2.1, "std": None, "runs": 1},
            "rewarmup": None,
            "reached": False,
        },
    ],
}


def study(path: Path, **changes) -> str:
    path.mkdir()
    (path / "results.json").write_text(json.dumps(RESULTS | changes))
    return str(path)


def test_a_saving_may_be_a_bound(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study(tmp_path / "mine", arms=[RESULTS["arms"][0] | {"at_least": True}])
    assert (
        run(
            ["advise", "--target", "760M", "--source", "580M", "--tokens", "41B", "--study", "mine"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "at least" in out and "25.0%" in out and "37.5%" in out


def test_a_study_is_told_as_it_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study(tmp_path / "mine")
    question = ("--target", "760M", "--source", "580M", "--tokens", "41B", "--study", "mine")
    arms = said(capsys, *question)["studies"][0]["arms"]
    assert arms[0]["if_so_here"]["flops"] == pytest.approx(0.75 * 6 * 760e6 * 41e9)
    assert arms[0]["saved"] == RESULTS["arms"][0]["saved"] and arms[0]["rewarmup"] == 20
    assert arms[1]["saved"]["mean"] is None and arms[1]["if_so_here"]["flops"] is None
    assert run(["advise", *question]) == 0
    out = capsys.readouterr().out
    table = out.partition("your study mine, ")[2]
    replicate, clone = (
        next(line for line in table.splitlines() if name in line)
        for name in ("│ replicate", "│ clone")
    )
    assert all(words in replicate for words in ("25.0% ± 2.0%", "37.5% ± 3.0%", " 20 ", "1.4e+20"))
    assert clone.count("loss not") == 2 and "%" not in clone and "at least" not in replicate
    assert (
        "your study mine" in out
        and "published, not measured here" in out
        and "EXTRAPOLATION" in out
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (None, "is not a study: it has no results.json"),
        ({"format": 2}, "has format 2, and this growkit reads format 1"),
        ({"arms": [{"name": "replicate"}]}, "a value of format 1 is missing or wrong"),
        ({"tokens": None}, "a value of format 1 is missing or wrong"),
    ],
)
def test_what_is_no_study(tmp_path, capsys, changes, words):
    path = str(tmp_path) if changes is None else study(tmp_path / "broken", **changes)
    with pytest.raises(GrowkitError, match=words):
        read_study(path)
    assert run(["advise", "--target", "760M", "--tokens", "1B", "--study", path]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--target 760M", "give the budget as either --tokens or --flops"),
        ("--target 760M --tokens 1B --flops 1e20", "give the budget as either --tokens or --flops"),
        (
            "--target 580M --source 760M --tokens 1B",
            "--source 760M has 760,000,000 parameters, --target 580M 580,000,000",
        ),
        ("--target 760x --tokens 1B", "--target takes a count such as 760M, a preset (1b, 580m"),
        ("--target 760M --source nowhere --tokens 1B", "--source takes a count such as 760M"),
        ("--target recipe --tokens 1B", "no model section"),
        ("--target 760M --tokens 1.5", "--tokens is a whole number above 0"),
        ("--target 760M --flops=", "--flops is a whole number above 0"),
        ("--target 760M --source= --tokens 1B", "--source takes a count such as 760M"),
        ("--target 760M --flops 2", "do not train 760M on one token"),
        ("--target 760M --tokens 1B --price 2", "--mfu and --price need a --topology"),
        (
            "--target 760M --tokens 1B --topology v3-32 --mfu 2",
            "--mfu must be above 0 and at most 1",
        ),
        ("--target 760M --tokens 1B --topology v9-1", "--topology is cpu, gpu or a slice"),
    ],
)
def test_refusals(arguments, words, capsys):
    assert run(["advise", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_budget_too_small_for_the_law_gets_no_advice(capsys):
    assert run(["advise", "--target", "tiny", "--tokens", "5M"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "no advice: the law asks the source for" in out and "then grown to" not in out


def test_the_documentation_shows_what_is_said(capsys):
    command, _, shown = (
        (ROOT / "docs" / "when.md").read_text().partition("$ growkit advise ")[2].partition("\n")
    )
    assert run(["advise", *command.split()]) == 0
    out = capsys.readouterr().out
    lines = [line for line in shown.partition("```")[0].splitlines() if line != "..."]
    assert len(lines) > 10 and all(line.rstrip() in out for line in lines)


def test_advice_needs_no_jax():
    code = (
        "import sys; from growkit.cli import run\n"
        "assert run('advise --target 760m --tokens 41B --topology v3-32'.split()) == 0\n"
        "print('jax' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.split() == ["False"]
