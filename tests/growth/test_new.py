"""What growth made new: from maps, in the lineage, and as `growkit inspect --new` shows it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import save_checkpoint, save_directory

import growkit
from growkit.cli import run
from growkit.growth.depth import plan_depth
from growkit.growth.new import (
    describe_new,
    describe_units,
    find_new_layers,
    find_new_units,
    list_new_parameters,
    mark_new,
    parse_units,
)
from growkit.growth.plan import Plan, combine_plans
from growkit.growth.vocabulary import plan_vocabulary
from growkit.growth.width import plan_width
from growkit.lineage import Lineage
from growkit.models import FAMILIES
from growkit.models.gpt_neox import GPT_NEOX

NEOX = GPT_NEOX.model(
    layer=2, embed=16, head=2, mlp=12, vocab=40, context=16, rotary_pct=0.5, tied=False
)
LLAMA = FAMILIES["llama"].model(
    layer=2, embed=24, kv=2, group=2, head_dim=6, mlp=32, vocab=40, context=16, tied=False
)


@pytest.mark.parametrize(
    "layers,method,scale,new",
    [
        ("2:5", None, None, {1, 2, 4}),
        ("2:5", "stack", None, {2, 3, 4}),
        ("2:3", "identity", None, {1}),
        ("0,1,0-1", None, None, {2, 3}),
        ("2:4", None, 0.5, {1, 3}),
        # The original is the copy that adds something.
        ("0,0,1", None, [0, 1, 1], {0}),
        ("1,0", None, None, set()),
    ],
)
def test_new_layers(layers, method, scale, new):
    assert find_new_layers([plan_depth(NEOX, layers, method, scale)]) == new


def test_growth_after_growth_keeps_what_was_new():
    first = plan_depth(NEOX, "2:3", "identity")
    second = plan_depth(first.grown, "3:5", "stack")
    # 0 0 1 with 1 new; then 0 1 2 0 1: the copy of a new layer is new, and so is its original.
    assert find_new_layers([first, second]) == {1, 3, 4}
    assert find_new_layers([second]) == {3, 4}
    wider = plan_width(second.grown, mlp="2x")
    new = describe_new(find_new_units([first, second, wider]))
    assert new == {"layer": "1,3-4", "mlp": "12-23"}


def numbers_of(plan: Plan) -> dict[str, int]:
    """How many numbers of each parameter are new, from an array that marks the old ones.

    Growth copies ones with shares that are never zero; padding adds what is not marked.
    """
    found = {}
    units = find_new_units([plan])
    model = plan.grown
    for name, row, position in model.table.names(model.sizes):
        old = []
        for part in row.parts:
            marks = np.ones(part.unfused(model.sizes), bool)
            for place, axis in enumerate(part.names):
                if axis in units:
                    marks &= ~units[axis].reshape(
                        [-1 if at == place else 1 for at in range(len(part.names))]
                    )
            old.append(marks)
        stacked = any(
            a.name in units and units[a.name][u] for a, u in zip(row.stacked, position, strict=True)
        )
        found[name] = sum(int(part.size if stacked else (~part).sum()) for part in old)
    return {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["gpt_neox", "llama"])
def test_parts_are_counted(model):
    plans = [plan_depth(model, "2:3"), plan_width(model, embed="2x"), plan_vocabulary(model, "+8")]
    plan = combine_plans("grow", plans, model)
    found = list_new_parameters(plan.grown, find_new_units([plan]))
    assert {each.name: each.elements for each in found} == numbers_of(plan)
    added = plan.grown.parameters - model.parameters
    # All that was added is new, and nothing else is: every old number stands somewhere once.
    assert sum(each.elements for each in found) == added
    whole = [each.name for each in found if each.whole]
    assert whole and all(".layers.1." in name for name in whole)
    head = next(each for each in found if each.name in ("embed_out.weight", "lm_head.weight"))
    assert head.axes == ("vocab", "embed") and not head.whole


def test_units_in_words_and_back():
    units = np.zeros(14, bool)
    units[[1, 3, 8, 9, 10, 13]] = True
    assert describe_units(units) == "1,3,8-10,13"
    assert np.array_equal(parse_units("1,3,8-10,13", 14), units)


@pytest.mark.parametrize("kind", ["huggingface", "checkpoint"])
def test_lineage_and_inspect(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (save_directory if kind == "huggingface" else save_checkpoint)(tmp_path / "small", NEOX)
    assert run(["inspect", "--new", "small"]) == 0
    assert "new          nothing: every growth" in capsys.readouterr().out
    assert run(["depth", "--map", "2:3", "--method", "identity", "small", "deep"]) == 0
    assert run(["width", "--embed", "2x", "deep", "out", "--json"]) == 0
    shown = capsys.readouterr().out
    made = json.loads(shown[shown.index("{") :])["new"]
    assert made == {"embed": "16-31", "head": "2-3", "mlp": "12-23"}
    lineage = growkit.read_lineage("out")
    assert [entry.new for entry in lineage] == [{"layer": "1"}, made]
    assert lineage.growths_new() == list(lineage)
    assert run(["verify", "deep", "out"]) == 0
    capsys.readouterr()
    assert run(["inspect", "--new", "out"]) == 0
    shown = capsys.readouterr().out
    assert "layer: 1 of 3" in shown and "embed: 16-31 of 32" in shown
    assert "layers.1.mlp.dense_h_to_4h.weight: whole, 768 numbers" in shown
    assert "layers.0.mlp.dense_h_to_4h.weight: new units of embed, mlp, 576 numbers" in shown
    assert run(["inspect", "--new", "--json", "out"]) == 0
    found = json.loads(capsys.readouterr().out)["new"]
    assert found["units"] == made | {"layer": "1"}
    grown = growkit.open_source("out").model
    assert found["counts"]["elements"] == grown.parameters - NEOX.parameters
    assert not [
        name
        for name, each in found["parameters"].items()
        if each["new"] not in ("whole",) and "layers.1." in name
    ]


def test_entries_of_earlier_versions_stay_as_they_are():
    stored = Lineage(()).to_json()
    plan = plan_depth(NEOX, "2:3")
    entry = growkit.entries.Growth.of(plan).to_json()
    del entry["new"]
    lineage = Lineage.read([*stored, entry])
    assert lineage.to_json() == [entry]
    plans = [growth.plan_within(plan.grown) for growth in lineage.growths_new()]
    assert find_new_layers(plans) == {1}


@pytest.mark.parametrize("train,new", [("all", 0), ("new", 1), (None, 0)])
def test_a_training_of_all_ends_what_is_new(train, new):
    config = {"schedule": {}} | ({"train": train} if train else {})
    training = {"operation": "train", "growkit": "0", "multipliers": False, "config": config}
    growth = growkit.entries.Growth.of(plan_depth(NEOX, "2:3")).to_json()
    assert len(Lineage.read([growth, training]).growths_new()) == new


@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["gpt_neox", "llama"])
def test_marks_are_the_new_numbers(model):
    plan = combine_plans("grow", [plan_depth(model, "2:3"), plan_width(model, mlp="1.5x")], model)
    units = find_new_units([plan])
    counted = {each.name: each.elements for each in list_new_parameters(plan.grown, units)}
    assert any(counted.values())
    for row in plan.grown.table.rows:
        marks = mark_new(row, plan.grown, units)
        whole = np.zeros(row.stacked_shape(plan.grown.sizes), bool)
        for mark in marks:
            assert sum(size > 1 for size in mark.shape) == 1
            whole = whole | mark
        for position in row.positions(plan.grown.sizes):
            assert whole[position].sum() == counted.get(row.name_at(position), 0)


def test_marks_of_fused_and_summed_axes():
    table = "m.w  (head head_dim | kv head_dim) /mlp  normal  matrix"
    model = growkit.describe_model(table, {"head": 2, "kv": 1, "head_dim": 2, "mlp": 3})
    new = {"head": np.array([False, True]), "mlp": np.array([False, False, True])}
    down, across = mark_new(model.table.rows[0], model, new)
    assert down.tolist() == [[False], [False], [True], [True], [False], [False]]
    assert across.tolist() == [[False, False, True]]
