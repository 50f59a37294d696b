"""Axes beside embed, heads, head_dim and mlp grow by name; sizes that follow stay exact."""

from __future__ import annotations

import pytest

from growkit.cli import run
from growkit.errors import UsageError
from growkit.growth.width import plan_like, plan_width
from growkit.models.tables import read_shipped

SIZES = {"layer": 3, "vocab": 40, "embed": 32, "kv": 2, "group": 2, "head_dim": 8}
EXPERTS = read_shipped("qwen3_moe").model(**SIZES, moe_intermediate_size=20, expert=4)
OLMO = read_shipped("olmo2").model(**SIZES, mlp=24)


def test_an_axis_grows_by_its_name():
    plan = plan_width(EXPERTS, axes={"moe_intermediate_size": "1.5x"}, spread=0.3)
    assert plan.grown.sizes == {**EXPERTS.sizes, "moe_intermediate_size": 30}
    assert plan.preserved
    assert plan.maps["moe_intermediate_size"].copies.max() == 2


def test_more_query_heads_for_each_key():
    plan = plan_width(EXPERTS, axes={"group": 4})
    assert plan.grown.sizes == {**EXPERTS.sizes, "group": 4}
    assert plan.grown.head_count == 8
    both = plan_width(EXPERTS, heads=16, axes={"group": 4})
    assert (both.grown.sizes["kv"], both.grown.sizes["group"]) == (4, 4)


@pytest.mark.parametrize(
    "axis,words",
    [
        ("mlp", "--axis mlp is not needed: its size is --mlp"),
        ("layer", "layers grow by `growkit depth`"),
        ("moe_size", "no axis of the model's table.*--axis grows group, moe_intermediate"),
        ("expert", "experts grow by `growkit experts`"),
    ],
)
def test_an_axis_that_does_not_grow_is_refused(axis, words):
    with pytest.raises(UsageError, match=words):
        plan_width(EXPERTS, axes={axis: "2x"})


def test_copies_that_a_norm_would_see_are_refused():
    with pytest.raises(UsageError, match="as many: 3 is no multiple of 2; the nearest are 2 and 4"):
        plan_width(OLMO, heads=6)
    assert plan_width(OLMO, heads=8).preserved


def test_sizes_that_follow_keep_to_what_is_exact():
    plan = plan_width(OLMO, embed=48)
    assert plan.preserved
    assert plan.grown.sizes["kv"] == 2 and plan.grown.mlp == 36
    assert any(note.startswith("heads stay 4: copies of kv are exact only") for note in plan.notes)
    # Moshi's mlp cannot grow; its stream can.
    moshi = read_shipped("moshi").model(**SIZES, mlp=24)
    plan = plan_width(moshi, embed=64)
    assert plan.grown.mlp == 24 and any("mlp stays 24" in note for note in plan.notes)


def test_growth_to_another_model_takes_every_axis():
    like = EXPERTS.change(moe_intermediate_size=40, layer=5)
    assert plan_like(EXPERTS, like).grown.sizes == like.sizes


@pytest.mark.parametrize("given", [["group"], ["=2x"], ["group=2", "group=4"]])
def test_an_option_that_is_no_size_is_refused(given, tmp_path, capsys):
    words = [word for text in given for word in ("--axis", text)]
    assert run(["width", *words, str(tmp_path), str(tmp_path / "out")]) == 2
    assert "--axis takes NAME=SIZE, each name once" in capsys.readouterr().err
