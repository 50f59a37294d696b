"""Tables say what they say: shapes of sums, offsets, norms, conditions, stacked axes.

A line that says something else, or nothing, is refused with the line in the message.
"""

from __future__ import annotations

import doctest
import importlib
import re

import pytest

from growkit.errors import GrowkitError
from growkit.models import FAMILIES
from growkit.models.family import holds_for
from growkit.models.notation import Axis, parse_table
from growkit.models.table import Table

SIZES = {"embed": 6, "mlp": 5, "head": 2, "kv": 1, "head_dim": 4, "qkv": 3, "layer": 3, "expert": 2}
FUSED = "m.qkv.weight  (head head_dim | kv head_dim | kv head_dim) /embed  normal  qkv"


def parse(line: str):
    (row,) = parse_table(line)
    return row


@pytest.mark.parametrize("name", ["growkit.models.notation", "growkit.models.custom"])
def test_the_examples_of_docstrings(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0 and failed == 0


def test_the_examples_of_the_first_page_are_lines():
    text = importlib.import_module("growkit.models.notation").__doc__
    lines = [line for line in text.splitlines() if line.startswith("    layers.")]
    rows = parse_table("\n".join(lines))
    assert len(rows) == len(lines) > 4
    assert any(row.summed is not None for row in rows) and any(row.offset for row in rows)
    assert any(len(row.stacked) == 2 for row in rows) and any(row.writes_stream for row in rows)


# Dimensions


def test_a_product_multiplies_and_a_sum_adds():
    assert parse("w  (head head_dim) /embed  normal  matrix").shape(SIZES) == (8, 6)
    assert parse("w  (mlp | mlp) /embed  normal  matrix").shape(SIZES) == (10, 6)
    assert parse("w  /embed (mlp | mlp)  normal  matrix").shape(SIZES) == (6, 10)
    assert parse("w  head (mlp | embed | kv) embed  normal  matrix").shape(SIZES) == (2, 12, 6)
    assert parse(FUSED).shape(SIZES) == (8 + 4 + 4, 6)


@pytest.mark.parametrize(
    "axes,summed",
    [("(mlp | mlp) /embed", 0), ("/embed (mlp | mlp)", 1), ("(mlp embed) /head", None)],
)
def test_which_dimension_is_a_sum(axes, summed):
    row = parse(f"w  {axes}  normal  matrix")
    assert row.summed == summed
    assert [part.label for part in row.parts] == ([None] if summed is None else ["0", "1"])


def test_the_blocks_of_a_fused_row_are_query_key_and_value():
    row = parse(FUSED)
    assert [part.role for part in row.parts] == ["query", "key", "value"]
    assert [part.label for part in row.parts] == ["query", "key", "value"]
    assert [part.shape(SIZES) for part in row.parts] == [(8, 6), (4, 6), (4, 6)]
    assert row.parts[0].names == ("head", "head_dim", "embed")
    assert row.parts[1].unfused(SIZES) == (1, 4, 6)
    assert row.axes == {"head", "kv", "head_dim", "embed"}
    # A row with an axis of kinds is one block.
    (part,) = parse("w  (head qkv head_dim) /embed  normal  qkv").parts
    assert (part.role, part.label, part.unfused(SIZES)) == ("qkv", None, (2, 3, 4, 6))


def test_what_is_read_and_what_is_written():
    row = parse("w  embed (/head head_dim | /mlp)  normal  matrix")
    assert row.parts[0].axes == (Axis("embed"), Axis("head", True), Axis("head_dim"))
    assert row.parts[1].axes == (Axis("embed"), Axis("mlp", True))


def test_a_number_has_no_dimensions():
    row = parse("m.scale  ()  ones  matrix")
    assert row.shape(SIZES) == () and row.axes == frozenset() and len(row.parts) == 1


# What it begins as, roles


@pytest.mark.parametrize(
    "begins,offset,initialisation",
    [
        ("normal", 0.0, "normal"),
        ("zeros", 0.0, "zeros"),
        ("1+zeros", 1.0, "zeros"),
        ("0.5+ones", 0.5, "ones"),
        ("12.25+normal", 12.25, "normal"),
    ],
)
def test_offsets(begins, offset, initialisation):
    row = parse(f"w  embed  {begins}  norm")
    assert (row.offset, row.begins) == (offset, initialisation)


@pytest.mark.parametrize(
    "role,averages",
    [
        ("norm", ("head", "head_dim")),
        ("norm(head_dim)", ("head_dim",)),
        ("norm(head head_dim)", ("head", "head_dim")),
        ("query", ()),
    ],
)
def test_what_a_norm_averages_over(role, averages):
    row = parse(f"w  (head head_dim)  ones  {role}")
    assert row.averages == averages
    assert row.role == role.split("(")[0]
    assert Table((row,)).uniform_axes == set(averages)


@pytest.mark.parametrize(
    "norm,of_queries",
    [
        ("(head head_dim)  ones  norm", True),
        ("head_dim  ones  norm", True),
        ("(head head_dim)  ones  norm(head_dim)", True),
        ("mlp  ones  norm", False),
        ("embed  ones  norm", False),
    ],
)
def test_norms_of_queries_average_over_axes_that_queries_write(norm, of_queries):
    queries = "q  (head head_dim) /embed  normal  query"
    table = Table(parse_table(f"{queries}\nw  {norm}"))
    assert table.normalises_queries == of_queries
    assert bool(table.other_norms) == ("mlp" in norm)
    # Without queries there is nothing that such a norm could be of.
    assert not Table(parse_table(f"w  {norm}")).normalises_queries


def test_norms_over_embed_are_no_norms_of_queries():
    assert not Table(parse_table("w  embed  ones  norm")).normalises_queries
    assert not Table(parse_table("w  (embed mlp)  ones  norm(embed)")).normalises_queries


@pytest.mark.parametrize(
    "line,decays,multiplies",
    [
        ("w  mlp /embed  normal  matrix", True, True),
        ("w  vocab embed  normal  embedding", True, False),
        ("w  vocab /embed  normal  head", True, True),
        ("w  mlp  zeros  bias", False, False),
        ("w  /embed  ones  norm", False, False),
        ("w  (head head_dim)  zeros  query", False, False),
        (FUSED, True, True),
    ],
)
def test_what_decays_and_what_multiplies(line, decays, multiplies):
    row = parse(line)
    assert (row.decays, row.multiplies) == (decays, multiplies)


# Conditions


@pytest.mark.parametrize(
    "conditions,options,holds",
    [
        ("", {}, True),
        ("tied", {"tied": True}, True),
        ("tied", {"tied": False}, False),
        ("untied", {"tied": True}, False),
        ("untied", {"tied": False}, True),
        ("!tied", {"tied": False}, True),
        ("bias untied", {"bias": True, "tied": False}, True),
        ("bias untied", {"bias": True, "tied": True}, False),
        ("bias untied", {"bias": False, "tied": False}, False),
        ("unit_offset", {"unit_offset": True}, True),
        ("!unit_offset", {"unit_offset": True}, False),
        ("window", {"window": 0}, False),
        ("window", {"window": 4096}, True),
    ],
)
def test_conditions(conditions, options, holds):
    row = parse(f"w  embed  zeros  bias  {conditions}")
    assert row.conditions == tuple(conditions.split())
    assert holds_for(row, options) == holds


@pytest.mark.parametrize("condition", ["biased", "untie", "!biased", "tied"])
def test_a_condition_that_no_option_answers_is_refused(condition):
    row = parse(f"m.w  embed  zeros  bias  {condition}")
    said = f"the row m.w depends on {condition!r}, which is not an option"
    with pytest.raises(GrowkitError, match=re.escape(said)):
        holds_for(row, {"bias": True})


# Names and stacked axes


def test_several_stacked_axes():
    row = parse("m.{layer}.experts.{/expert}.w2  embed /mlp  normal  matrix")
    assert row.name == "m.{layer}.experts.{expert}.w2"
    assert row.stacked == (Axis("layer"), Axis("expert", True))
    # A sum over experts is not the residual stream, which is a sum over layers.
    assert not row.writes_stream
    assert row.name_at((2, 1)) == "m.2.experts.1.w2"
    assert row.match("m.2.experts.1.w2") == (2, 1)
    wrong = ["m.2.experts.w2", "m.2.experts.01.w2", "m.2.experts.1.w22", "m.{layer}.experts.1.w2"]
    assert [row.match(name) for name in wrong] == [None] * 4
    assert row.path == ("m", "experts", "w2")
    assert list(row.positions(SIZES)) == [(layer, unit) for layer in range(3) for unit in range(2)]
    assert row.stacked_shape(SIZES) == (3, 2, 6, 5)
    assert "expert" not in row.axes


def test_names_go_layer_by_layer_and_are_found_again():
    table = Table(
        parse_table(
            """
            m.embed  mlp embed  normal  embedding
            m.{layer}.norm  embed  ones  norm
            m.{layer}.experts.{expert}.w  embed /mlp  normal  matrix
            """,
            prefix="m",
        )
    )
    found = list(table.names(SIZES))
    assert [name for name, _, _ in found][:5] == [
        "m.embed",
        "m.0.norm",
        "m.0.experts.0.w",
        "m.0.experts.1.w",
        "m.1.norm",
    ]
    assert len(found) == 1 + 3 * (1 + 2)
    for name, row, position in found:
        assert table.match(name) == (row, position) and row.name_at(position) == name
    assert table.rows[2].path == ("experts", "w")
    with pytest.raises(GrowkitError, match="the nearest row is m.{layer}.experts.{expert}.w"):
        table.match("m.0.expert.0.w")


def test_layers_of_a_kind():
    row = parse("m.{/layer:sparse}.w  embed /mlp  normal  matrix")
    assert (row.name, row.kind, row.writes_stream) == ("m.{layer}.w", "sparse", True)
    table = Table((row,), {"sparse": (0, 2)})
    assert [name for name, _, _ in table.names(SIZES)] == ["m.0.w", "m.2.w"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_familys_rows_are_told_apart(kind):
    family = FAMILIES[kind]
    tied, untied = (family.model(tied=tied) for tied in (True, False))
    for model in (tied, untied):
        names = [row.name for row in model.table.rows]
        assert len(names) == len(set(names))
        for row in model.table.rows:
            name = row.name_at((0,) * len(row.stacked))
            matching = [other for other in model.table.rows if other.match(name) is not None]
            assert matching == [row]
    assert {row.name for row in untied.table.rows} - {row.name for row in tied.table.rows} == {
        family.head_name
    }


# Lines that are none


@pytest.mark.parametrize(
    "line,said",
    [
        ("w (mlp /embed normal matrix", "'(mlp' is not one"),
        ("w mlp) /embed normal matrix", "'mlp)' is not one"),
        ("w mlp|embed normal matrix", "'mlp|embed' is not one"),
        ("w mlp/embed normal matrix", "'mlp/embed' is not one"),
        ("w //embed normal matrix", "'//embed' is not one"),
        ("w {mlp} normal matrix", "'{mlp}' is not one"),
        ("w norm(embed) normal matrix", "'norm(embed)' is not one"),
        ("w ((head head_dim)) normal matrix", "is not one"),
        ("w (mlp | ) normal matrix", "every block of a dimension needs an axis"),
        ("w (mlp || mlp) normal matrix", "every block of a dimension needs an axis"),
        ("w (a | b) (c | d) normal matrix", "one dimension of a row can be a sum"),
        ("w (a | b) /c normal qkv", "has three blocks, query | key | value"),
        ("w mlp /embed normal qkv", "an axis qkv or a sum of three"),
        ("w (qkv qkv) normal qkv", "an axis qkv or a sum of three"),
        ("w embed ones norm(mlp)", "a norm averages over axes, and over its own"),
        ("w embed ones norm()", "a norm averages over axes, and over its own"),
        ("w embed ones matrix(embed)", "only a norm averages over axes"),
        ("w embed two+ones norm", "a table line is `name axes"),
        ("w embed -1+ones norm", "a table line is `name axes"),
        ("w embed normal", "a table line is `name axes"),
        ("w embed normal gate", "a table line is `name axes"),
        ("w normal matrix", "a table line is `name axes"),
        ("m.{layer.w embed ones norm", "braces of a name hold an axis"),
        ("m.{}.w embed ones norm", "braces of a name hold an axis"),
        ("m.{layer:}.w embed ones norm", "braces of a name hold an axis"),
    ],
)
def test_a_line_that_is_none_is_quoted_with_the_reason(line, said):
    with pytest.raises(ValueError, match=re.escape(f"got {line!r}")) as refusal:
        parse_table(f"# a table\n\nm.first  embed  ones  norm\n{line}")
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
