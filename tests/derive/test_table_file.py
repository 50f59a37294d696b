"""Families as text files: what is written is read again, and nothing of transformers is needed for
it.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest

from growkit.errors import GrowkitError
from growkit.models import FAMILIES
from growkit.models.notation import parse_table
from growkit.models.table_file import read_family, write_family
from growkit.models.tables import list_shipped, read_shipped, read_text

SHIPPED = list_shipped()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_a_family_is_read_as_it_was_written(kind):
    # A rule in Python has no place in a file.
    family = replace(FAMILIES[kind], layer_kinds=read_family.__defaults__)
    text = write_family(family, {"embed": "1e-15"}, "by hand")
    again = read_family(text)
    assert write_family(again, {"embed": "1e-15"}, "by hand") == text
    for fact in fields(family):
        if fact.name not in ("text", "layer_kinds"):
            assert getattr(again, fact.name) == getattr(family, fact.name), fact.name
    assert again.rows == parse_table(family.text, family.prefix)


def test_what_is_wrong_with_a_file_is_said():
    with pytest.raises(GrowkitError, match="begins with 'growkit table 1'"):
        read_family("kind = llama\n")
    with pytest.raises(GrowkitError, match="line 2 .* no `name = value`"):
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
