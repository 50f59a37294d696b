"""One bad character: refused with its place, replaced or left out, and counted."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from growkit.errors import GrowkitError, UsageError
from trainer.data.text import Shard, open_inputs
from trainer.data.tokenize import tokenize
from trainer.data.tokenizer import train_tokenizer
from trainer.data.tokens import TokenFile

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

# What is wrong with a line, and what `replace` makes of it; None where it is left broken.
FAULTS = {
    "bytes": (b'{"text": "a\xff\xfeb"}', "a\ufffd\ufffdb"),
    "surrogate": (b'{"text": "a\\ud800b"}', "a\ufffdb"),
    "control": (b'{"text": "a\tb"}', "a\tb"),
    "JSON": (b"{oops", None),
    "no text": (b'{"body": "b"}', None),
    "number": (b'{"text": 3}', None),
}
FINE = '{"text": "fine — \ufffd"}\n'.encode()


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "given.json"
    path.write_bytes(train_tokenizer(["fine text, and more of it"], 300).json)
    return path


def read(path, policy):
    return list(open_inputs([path], policy).read_documents())


@pytest.fixture(params=FAULTS)
def fault(request, tmp_path):
    line, replaced = FAULTS[request.param]
    path = tmp_path / "a.jsonl"
    path.write_bytes(FINE + line + b"\n" + FINE)
    return path, replaced


def test_strict_names_the_place_and_the_ways_on(fault):
    path, _ = fault
    with pytest.raises(GrowkitError) as caught:
        read(path, "strict")
    words = str(caught.value)
    assert str(path) in words and "\n" not in words
    assert words.count("--errors skip leaves such documents out") == 1
    bad = "UTF-8" in words or "surrogate" in words
    assert ("--errors replace puts U+FFFD in its place" in words) == bad


def test_skip_leaves_the_document_out(fault):
    assert read(fault[0], "skip") == ["fine — \ufffd"] * 2


def test_replace_keeps_the_rest_of_the_document(fault):
    path, replaced = fault
    if replaced is None:
        with pytest.raises(GrowkitError, match="line 2"):
            read(path, "replace")
    else:
        assert read(path, "replace") == ["fine — \ufffd", replaced, "fine — \ufffd"]


def all_faults(tmp_path):
    """A directory of every kind of file, each with one fault that can be replaced."""
    place = tmp_path / "texts"
    place.mkdir()
    lines = [line for line, replaced in FAULTS.values() if replaced]
    (place / "a.jsonl").write_bytes(b"".join(FINE + line + b"\n" for line in lines))
    (place / "b.txt").write_bytes(b"the \xff cat")
    (place / "c.txt").write_text("the dog")
    texts = pyarrow.array([b"fine", b"not \xe9", None], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), place / "d.parquet")
    return place


@pytest.mark.parametrize("processes", [1, 2])
def test_what_was_done_is_counted(tmp_path, tokenizer_json, processes):
    place = all_faults(tmp_path)
    counts = {}
    for policy in ("skip", "replace"):
        manifest = tokenize(
            [place], tmp_path / policy, tokenizer_json, processes=processes, errors=policy
        )
        assert manifest == json.loads((tmp_path / policy / "manifest.json").read_text())
        assert manifest["errors"] == policy
        keys = ("documents", "skipped_documents", "replaced_characters", "empty_documents")
        counts[policy] = tuple(manifest[key] for key in keys)
    # Three lines, a text and a row are at fault; a tab is kept where it is not left out.
    assert counts == {"skip": (5, 5, 0, 1), "replace": (10, 0, 5, 1)}


def test_strict_would_stop_at_each(tmp_path, tokenizer_json):
    for path in all_faults(tmp_path).iterdir():
        if path.name != "c.txt":
            with pytest.raises(GrowkitError, match=path.name):
                tokenize([path], tmp_path / "out", tokenizer_json)


def test_shards_count_every_fault_once(tmp_path, tokenizer_json):
    place = all_faults(tmp_path)
    manifests = [
        tokenize([place], tmp_path / f"{n}", tokenizer_json, shard=Shard(n, 2), errors="skip")
        for n in (1, 2)
    ]
    assert sum(each["skipped_documents"] for each in manifests) == 5
    assert sum(each["documents"] for each in manifests) == 5


def test_the_character_is_in_the_tokens(tmp_path, tokenizer_json):
    (tmp_path / "b.txt").write_bytes(b"fine \xff")
    tokenize([tmp_path / "b.txt"], tmp_path / "out", tokenizer_json, errors="replace")
    decoder = Tokenizer.from_file(str(tokenizer_json))
    assert decoder.decode(TokenFile.open(tmp_path / "out").tokens[:-1].tolist()) == "fine \ufffd"


def test_a_policy_that_is_none(tmp_path, tokenizer_json):
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(UsageError, match="strict, replace, skip, got 'ignore'"):
        tokenize([tmp_path / "b.txt"], tmp_path / "out", tokenizer_json, errors="ignore")


def test_an_input_of_which_nothing_is_left_is_named(tmp_path, tokenizer_json):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.jsonl").touch()
    for name in ("b.txt", "c.jsonl"):
        texts = [tmp_path / "a.txt", tmp_path / name, tmp_path / "a.txt"]
        with pytest.raises(UsageError, match=f"{name} holds no text"):
            tokenize(texts, tmp_path / "out", tokenizer_json, errors="skip")
