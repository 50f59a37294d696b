"""Families as text files: what is written is read again, and nothing of transformers is needed for
it.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest

from growkit.cli import run
from growkit.errors import GrowkitError, UsageError
from growkit.growth.axes import insert, make_map
from growkit.growth.plan import build_plan
from growkit.growth.width import plan_width
from growkit.models import FAMILIES
from growkit.models.family_check import check_family
from growkit.models.notation import parse_table
from growkit.models.table_file import read_family, write_family
from growkit.models.tables import list_shipped, read_shipped, read_text

SHIPPED = list_shipped()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_a_family_is_read_as_it_was_written(kind):
    family = FAMILIES[kind]
    text = write_family(family, {"embed": "1e-15"}, "by hand")
    again = read_family(text)
    assert write_family(again, {"embed": "1e-15"}, "by hand") == text
    for fact in fields(family):
        # A rule in Python has no place in a file, and what is computed is stated beside it.
        if fact.name not in ("text", "layer_kinds", "computation"):
            assert getattr(again, fact.name) == getattr(family, fact.name), fact.name
    assert again.rows == parse_table(family.text, family.prefix)


def test_what_is_wrong_with_a_file_is_said():
    with pytest.raises(GrowkitError, match="begins with 'growkit table 1'"):
        read_family("kind = llama\n")
    with pytest.raises(GrowkitError, match="line 2 .* not `name = value`"):
        read_family("growkit table 1\nkind\n")
    with pytest.raises(GrowkitError, match="has no 'colour'"):
        read_family("growkit table 1\ncolour = red\n[table]\n")
    with pytest.raises(GrowkitError, match="cannot be read"):
        read_family("growkit table 1\nkind = llama\n[table]\nmodel.weight embed\n")


def test_tables_are_read_without_torch():
    code = (
        "import sys; from growkit.models.tables import list_shipped, read_shipped;"
        "[read_shipped(kind) for kind in list_shipped()];"
        "assert not {'torch', 'transformers', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", SHIPPED)
def test_a_shipped_table_is_whole(kind):
    family = read_shipped(kind)
    assert family.kind == kind
    assert family.rows
    # Written again, the file is the same but for its first lines and the proof.
    section = write_family(family, {}, "")
    assert section.partition("[table]")[2] == read_text(kind).partition("[table]")[2]
    known = {*family.fields, *family.constants, *family.frozen}
    assert set(family.frozen) <= known
    if "layer" not in family.frozen:
        assert any(axis.name == "layer" for row in family.rows for axis in row.stacked)


LLAMA = FAMILIES["llama"]
SIZES = {"layer": 2, "embed": 8, "kv": 2, "group": 1, "head_dim": 4, "mlp": 8, "vocab": 16}


def test_what_a_family_cannot_do_is_refused():
    silent = replace(LLAMA, no_identity="its layers follow one another").model(**SIZES)
    with pytest.raises(UsageError, match="no layers that add nothing: its layers follow"):
        build_plan("depth", "", silent, {"layer": insert(2, 4)})
    assert build_plan("depth", "", silent, {"layer": make_map([0, 0, 1], 2)}).grown.layer == 3
    unpadded = replace(LLAMA, unpadded="padding it is another function").model(**SIZES)
    with pytest.raises(UsageError, match="whole copies only, not to 12: .* nearest is 16"):
        build_plan("width", "", unpadded, {}, {"embed": 12})


def test_axes_that_a_family_calls_uniform_are_copied_evenly():
    uneven = make_map([0, 1, 1, *range(2, 8)], 8, [1.0, 0.5, 0.5, *[1.0] * 6])
    assert build_plan("width", "", LLAMA.model(**SIZES), {"mlp": uneven}).preserved
    uniform = replace(LLAMA, uniform=("mlp",)).model(**SIZES)
    assert not build_plan("width", "", uniform, {"mlp": uneven}).preserved


def test_a_field_that_has_another_s_value_grows_with_it():
    """OPT has a projection where its embedding is narrower than the stream: another table."""
    family = read_shipped("opt")
    config = {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 24, "vocab_size": 40}
    stated = config | {"word_embed_proj_dim": 32}
    for given in (config, stated):
        model = family.read(given)
        grown = plan_width(model, embed="2x").grown.update(given)
        assert grown["hidden_size"] == 64
        assert grown.get("word_embed_proj_dim", 64) == 64
        assert grown.keys() - given.keys() <= {"ffn_dim", "num_attention_heads"}
    assert family.model(embed=64, head=8, head_dim=8).config()["word_embed_proj_dim"] == 64
    with pytest.raises(GrowkitError, match="word_embed_proj_dim is hidden_size, .* 16 and 32"):
        family.read(config | {"word_embed_proj_dim": 16})
    wrong = replace(family, equal={"word_embed_proj_dim": "hidden_sise"})
    with pytest.raises(GrowkitError, match="'hidden_sise', which states no size; did you mean"):
        check_family(wrong)


def test_an_unknown_model_type_is_refused(capsys):
    pytest.importorskip("transformers")
    assert run(["derive", "lama"]) == 2
    assert "no causal language model of the type 'lama'" in capsys.readouterr().err
