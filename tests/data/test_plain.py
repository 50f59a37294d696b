"""Plain text is one document a file, which is said, or is cut where the user says."""

from __future__ import annotations

import gzip
import json

import pytest

from growkit.cli import run
from growkit.errors import GrowkitError
from trainer.data.text import open_inputs

TEXT = "one\r\ntwo\n\n \t\n  three — 3\n\n\nfour"
CUT = {
    "file": [TEXT],
    "line": ["one", "two", "  three — 3", "four"],
    "blank-line": ["one\r\ntwo", "  three — 3", "four"],
}


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("form", ["plain", "marked", "gzip", "utf-16"])
def test_plain_text_is_cut_where_it_is_said(cut, form, tmp_path):
    path = tmp_path / "a.txt"
    content = {
        "plain": TEXT.encode(),
        "marked": TEXT.encode("utf-8-sig"),
        "gzip": gzip.compress(TEXT.encode()),
        "utf-16": TEXT.encode("utf-16"),
    }
    path.write_bytes(content[form])
    assert list(open_inputs([path], cut=cut).read_documents()) == CUT[cut]


def test_a_fault_is_placed_in_its_file_and_costs_its_document_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\xff\nmore\n\nthree\n")
    for cut, rest in (("line", ["one", "more", "three"]), ("blank-line", ["one", "three"])):
        with pytest.raises(GrowkitError, match="byte 8 is 0xff"):
            list(open_inputs([path], cut=cut).read_documents())
        assert list(open_inputs([path], "skip", cut=cut).read_documents()) == rest


def test_code_and_json_lines_are_not_cut(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n\ny = 2\n")
    (tmp_path / "b.txt").write_text('{"text": "one\\n\\ntwo"}\n{"text": "three"}\n')
    inputs = open_inputs([tmp_path], cut="blank-line")
    assert list(inputs.read_documents()) == ["x = 1\n\ny = 2\n", "one\n\ntwo", "three"]
    assert not inputs.plain


def test_the_command_says_what_a_document_is(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    words = ["tokenize", str(path), "--train-bpe", "260", "--processes", "1", "--force"]

    def documents(*more: str) -> tuple[int, str]:
        assert run([*words, "--out", str(tmp_path / "t"), *more]) == 0
        manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
        assert manifest.get("documents_by") == (more[1] if more else None)
        return manifest["documents"], capsys.readouterr().err

    count, said = documents()
    assert (
        count == 1 and "note: a.txt was read as one document; with --documents blank-line" in said
    )
    for cut in ("line", "blank-line"):
        count, said = documents("--documents", cut)
        assert count == len(CUT[cut]) and "note:" not in said
    (tmp_path / "b.txt").write_text("five")
    words.insert(1, str(tmp_path / "b.txt"))
    assert "note: each plain text file was read as one document" in documents()[1]
    assert run([*words, "--out", "x", "--documents", "lines"]) == 2
    said = capsys.readouterr().err
    assert "--documents must be one of file, blank-line, line, got 'lines'; did you mean" in said
