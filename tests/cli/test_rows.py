"""inspect --rows: what it says of every axis and row is what growth does."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import SMALL, random_tensors, save_directory

from growkit.cli import run
from growkit.cli.rows import COLUMNS, collect_rows, find_obstacle, format_rows
from growkit.errors import UsageError
from growkit.growth.axes import insert, tile
from growkit.growth.padding import MU
from growkit.growth.plan import build_plan
from growkit.growth.rule import grow_array
from growkit.growth.vocabulary import plan_vocabulary
from growkit.models import FAMILIES, find_family
from growkit.models.architecture import Architecture
from growkit.models.fields import Frozen
from growkit.models.notation import parse_table
from growkit.models.tables import list_shipped

KINDS = [*FAMILIES, *list_shipped()]


def small(kind):
    """A small model of a family, with the options that its defaults are."""
    family = find_family(kind)
    axes = {axis for row in family.rows for axis in row.axes}
    sizes = {axis: 4 for axis in (*family.fields, *axes)} | dict(family.constants)
    if family.coupled:
        sizes["embed"] = sizes["head_dim"] * sizes[family.heads] * sizes.get("group", 1)
    options = {name: family.defaults[path] for name, path in family.options.items()}
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 1.0}
    return Architecture(family, Frozen(sizes), Frozen(options | {"rope": rope}))


def grows(model, axis):
    """Whether growth takes the axis."""
    if axis == "vocab":
        plan = lambda: plan_vocabulary(model, "+1")  # noqa: E731
    elif axis == "layer":
        plan = lambda: build_plan("", "", model, {axis: tile(4, 8)})  # noqa: E731
    else:
        size = model.sizes[axis]
        maps = {axis: tile(size, 2 * size)}
        if model.coupled and axis == "embed":
            heads = model.sizes[model.heads]
            maps[model.heads] = tile(heads, 2 * heads)
        plan = lambda: build_plan("", "", model, maps)  # noqa: E731
    try:
        plan()
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_called_frozen_is_refused_and_nothing_else(kind):
    model = small(kind)
    for axis in model.sizes:
        if axis in model.family.fields and not (axis == "head_dim" and model.coupled):
            assert grows(model, axis) == (not find_obstacle(model, axis)), axis
    for line in format_rows(model).splitlines():
        # A name and its axes stand on one line, however long.
        assert len(line) <= COLUMNS or line.startswith("  ") and line[2] != " ", line


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "phi3", "qwen3_moe"])
def test_rows_are_written_as_tables_have_them(kind):
    model = small(kind)
    table = "\n".join(
        f"{row['name']} {row['axes']} {row['begins']} {row['role']}"
        for row in collect_rows(model)["rows"]
    )
    for ours, theirs in zip(parse_table(table), model.table.rows, strict=True):
        for fact in ("name", "blocks", "begins", "role", "offset", "averages", "stacked", "kind"):
            assert getattr(ours, fact) == getattr(theirs, fact)


@pytest.mark.parametrize("axis", ["embed", "head", "mlp"])
def test_shares_and_silence_are_those_of_growth(axis):
    """A row that shares an axis changes by it, and one that does not keeps its numbers."""
    size = SMALL.sizes[axis]
    maps = {axis: tile(size, 2 * size)}
    if axis in ("embed", "head"):
        maps = {name: tile(SMALL.sizes[name], 2 * SMALL.sizes[name]) for name in ("embed", "head")}
    plan = build_plan("", "", SMALL, maps)
    silent = build_plan("", "", SMALL, {"layer": insert(3, 4)})
    arrays = random_tensors(SMALL)
    for row, said in zip(SMALL.table.rows, collect_rows(SMALL)["rows"], strict=True):
        position = (0,) * len(row.stacked)
        array = arrays[row.name_at(position)]
        for moment, shared in ((0, said["values_share"]), (MU, said["moments_share"])):
            grown = grow_array(array, row, plan, moment, position)
            scaled = not set(np.unique(grown)) <= set(np.unique(array))
            assert scaled == bool(set(shared) & maps.keys()), (row.name, moment)
        if row.stacked:
            inserted = grow_array(array, row, silent, 0, (1,))
            assert (not inserted.any()) == said["silent_in_inserted_layers"], row.name


def test_the_verb_shows_rows_where_it_is_asked_to(tmp_path, capsys):
    place = str(save_directory(tmp_path / "hf"))
    assert run(["inspect", place]) == 0
    assert "axes" not in capsys.readouterr().out
    assert run(["inspect", "--rows", place]) == 0
    said = capsys.readouterr().out
    assert "  gpt_neox.layers.{/layer}.mlp.dense_4h_to_h.weight  embed /mlp\n" in said
    assert "matrix, 3 of 32 x 64; grows along embed, mlp, layer; values x shares of mlp" in said
    assert run(["inspect", "--rows", "--json", place]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "gpt_neox" and len(facts["rows"]) == len(SMALL.table.rows)
    assert [axis["axis"] for axis in facts["axes"]] == list(SMALL.sizes)
