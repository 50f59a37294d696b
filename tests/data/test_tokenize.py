"""Tokenizing: what lands on disk is the text and nothing else, and bad input is refused by name."""

from __future__ import annotations

import gzip
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import trainer.data.text as text_module
import trainer.data.tokenizer as module
from growkit.errors import GrowkitError, UsageError
from trainer.data.checked import verify
from trainer.data.text import has_text
from trainer.data.tokenize import tokenize, tokenize_documents
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.data.tokens import TokenFile

TEXT = "The cat sat on the mat.\r\nThe dog, too; 日本 sat on 12 mats.\n" * 20


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([TEXT], 300)


@pytest.fixture
def tokenizer_json(tmp_path, bpe):
    path = tmp_path / "given.json"
    path.write_bytes(bpe.json)
    return path


def text_file(tmp_path, content=TEXT, name="text.txt"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def decoded(out):
    """The documents of an output, decoded, without their end of text."""
    file, tokenizer = TokenFile.open(out), Tokenizer.from_file(str(out / "tokenizer.json"))
    bounds = file.documents
    documents = [file.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
    assert all(document[-1] == file.manifest["end_of_text"] for document in documents)
    return [tokenizer.decode(document[:-1], skip_special_tokens=False) for document in documents]


def refused(kind, *fragments, texts, out, **options):
    """Tokenizing raises exactly this kind of error, with these fragments, and leaves nothing."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(GrowkitError) as caught:
        tokenize(texts, out, **options)
    assert (caught.type, caught.value.exit_code) == (kind, 2 if kind is UsageError else 1)
    for fragment in fragments:
        assert str(fragment) in str(caught.value)
    assert sorted(out.parent.rglob("*")) == before


def test_text_survives_and_the_manifest_counts_it(tmp_path):
    path, out = text_file(tmp_path), tmp_path / "out"
    manifest = tokenize([path], out, train_bpe=280)
    file = TokenFile.open(out)
    verify(file)
    assert decoded(out) == [TEXT]
    assert manifest == json.loads((out / "manifest.json").read_text()) == file.manifest
    assert manifest["tokens"] == len(file) < manifest["bytes"] == len(TEXT.encode())
    assert manifest["documents"] == 1
    assert manifest["vocab_size"] == 280
    assert manifest["dtype"] == "uint16"
    assert manifest["sources"] == ["text.txt"]
    assert (
        manifest["tokenizer_sha256"]
        == hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest()
    )
    assert manifest["bin_sha256"] == hashlib.sha256((out / "tokens.bin").read_bytes()).hexdigest()
    names = {"tokens.bin", "tokens.idx", "manifest.json", "tokenizer.json", "tokenizer_config.json"}
    assert {each.name for each in out.iterdir()} == names


def test_a_given_tokenizer_is_copied_byte_for_byte(tmp_path, tokenizer_json):
    tokenizer_json.write_bytes(tokenizer_json.read_bytes() + b"\n\n")
    tokenize([text_file(tmp_path)], tmp_path / "out", tokenizer=tokenizer_json)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == tokenizer_json.read_bytes()
    tokenize([text_file(tmp_path)], tmp_path / "again", tokenizer=tmp_path / "out")
    assert (tmp_path / "again/tokens.bin").read_bytes() == (
        tmp_path / "out/tokens.bin"
    ).read_bytes()


def test_truncation_and_padding_are_switched_off(tmp_path, bpe):
    short = Tokenizer.from_str(bpe.json.decode())
    short.enable_truncation(4)
    short.enable_padding(length=8)
    short.save(str(tmp_path / "short.json"))
    documents = text_file(tmp_path, json_lines(TEXT, "a"), "texts.jsonl")
    tokenize([documents], tmp_path / "out", tokenizer=tmp_path / "short.json")
    assert decoded(tmp_path / "out") == [TEXT, "a"]


def test_training_is_deterministic(tmp_path):
    path = text_file(tmp_path)
    for name in ("one", "two"):
        tokenize([path], tmp_path / name, train_bpe=300)
    for file in ("tokenizer.json", "tokens.bin", "tokens.idx", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_trained_tokenizer_covers_all_bytes(bpe):
    tokenizer = bpe.tokenizer
    assert (tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|padding|>")) == (0, 1)
    smallest = train_tokenizer([TEXT], 258)
    assert smallest.vocab_size == 258
    for text in ("\0\x7f ñ 😀\n\n\t x", " lead", ""):
        assert smallest.tokenizer.decode(smallest.encode([text])[0].tolist()) == text


@given(st.lists(st.text().filter(has_text), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30)
def test_any_documents_survive(tmp_path_factory, bpe, documents):
    out = tmp_path_factory.mktemp("any") / "out"
    manifest = tokenize_documents(iter(documents), out, bpe)
    assert decoded(out) == documents
    assert manifest["bytes"] == sum(len(document.encode()) for document in documents)


def test_the_forms_of_text(tmp_path, tokenizer_json):
    inputs = [
        text_file(tmp_path, "one\r\n two", "a.txt"),
        text_file(tmp_path, json_lines("three", "four"), "b.jsonl"),
        text_file(tmp_path, gzip.compress(json_lines("five").encode()), "c.jsonl.gz"),
        text_file(tmp_path, gzip.compress(b"six"), "d.txt.gz"),
        text_file(tmp_path, "seven = 7", "e.rs"),
    ]
    manifest = tokenize(inputs, tmp_path / "out", tokenizer=tokenizer_json)
    assert decoded(tmp_path / "out") == ["one\r\n two", "three", "four", "five", "six", "seven = 7"]
    assert manifest["sources"] == ["a.txt", "b.jsonl", "c.jsonl.gz", "d.txt.gz", "e.rs"]


def test_a_directory_means_its_text_files_sorted(tmp_path, tokenizer_json):
    for name in ("b.md", "a/z.py", "a/b.txt", "c.rst", "skipped.bin", "a/skipped.json", "d.txt.gz"):
        text_file(
            tmp_path / "texts", gzip.compress(b"d.txt.gz") if name.endswith("gz") else name, name
        )
    text_file(tmp_path / "texts", "", "a/empty.py")
    manifest = tokenize([tmp_path / "texts"], tmp_path / "out", tokenizer=tokenizer_json)
    assert decoded(tmp_path / "out") == ["a/b.txt", "a/z.py", "b.md", "c.rst", "d.txt.gz"]
    assert (manifest["documents"], manifest["empty_documents"], manifest["sources"]) == (
        5,
        1,
        ["texts"],
    )


def test_a_file_given_twice_is_read_twice(tmp_path, tokenizer_json):
    path = text_file(tmp_path, "again")
    tokenize([path, path], tmp_path / "out", tokenizer=tokenizer_json)
    assert decoded(tmp_path / "out") == ["again", "again"]


def test_empty_documents_are_skipped_and_counted(tmp_path, tokenizer_json):
    path = text_file(tmp_path, json_lines("one", "", " \n", "two") + "\n", "texts.jsonl")
    manifest = tokenize([path], tmp_path / "out", tokenizer=tokenizer_json)
    assert decoded(tmp_path / "out") == ["one", "two"]
    assert (manifest["documents"], manifest["empty_documents"]) == (2, 2)


def test_progress_is_told(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(text_module, "BLOCK_SIZE", 700)
    calls = []
    documents = ["one two"] * 250
    manifest = tokenize_documents(
        documents, tmp_path / "out", bpe, progress=lambda *done: calls.append(done)
    )
    assert [call[0] for call in calls] == [100, 200, 250]
    assert calls[-1] == (250, manifest["tokens"], manifest["bytes"])


def metaspace_tokenizer(tmp_path, end_of_text="</s>"):
    """A SentencePiece-like tokenizer, which writes a space before every text it encodes."""
    words = ["<unk>", "▁", *"Thecatsonm.dg,;12日本\r\n", "▁the", "▁cat"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
            pre_tokenizers.Split("", "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(end_of_text, special=True)])
    tokenizer.save(str(tmp_path / "metaspace.json"))
    return tmp_path / "metaspace.json"


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
def test_long_documents_in_pieces_encode_as_a_whole(tmp_path, bpe, monkeypatch, kind):
    chosen = bpe if kind == "byte level" else load_tokenizer(metaspace_tokenizer(tmp_path))
    whole = tokenize_documents([TEXT, TEXT * 2], tmp_path / "whole", chosen)
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 5)
    monkeypatch.setattr(text_module, "BLOCK_SIZE", 5)
    assert len(module._cut_pieces(TEXT, lambda left, right: True)) > 10
    assert tokenize_documents([TEXT, TEXT * 2], tmp_path / "pieces", chosen) == whole


def test_unchecked_cuts_would_change_the_encoding(tmp_path, monkeypatch):
    """The sibling of the test above: what it holds is not true of cuts at any white space."""
    chosen = load_tokenizer(metaspace_tokenizer(tmp_path))
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 5)
    pieces = module._cut_pieces(TEXT, lambda left, right: True)
    assert not np.array_equal(np.concatenate(chosen.encode(pieces)), chosen.encode([TEXT])[0])


@pytest.mark.parametrize("end_of_text", ["</s>", "<eos>", "<|endoftext|>"])
def test_the_end_of_text_is_found_and_can_be_the_highest_id(tmp_path, end_of_text):
    tokenizer = metaspace_tokenizer(tmp_path, end_of_text)
    manifest = tokenize([text_file(tmp_path)], tmp_path / "out", tokenizer=tokenizer)
    file = TokenFile.open(tmp_path / "out")
    assert file.tokens[-1] == manifest["end_of_text"] == manifest["vocab_size"] - 1
    assert np.count_nonzero(file.tokens == file.tokens[-1]) == 1


def test_ids_with_holes_need_the_highest_id(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"cat": 7, "</s>": 2, "<unk>": 0}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "holes.json"))
    assert tokenizer.get_vocab_size() == 3
    assert load_tokenizer(tmp_path / "holes.json").vocab_size == 8


def test_transformers_loads_the_output_and_agrees(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = text_file(tmp_path)
    tokenize([path], tmp_path / "out", train_bpe=300)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    encoded = theirs(TEXT)
    assert encoded["input_ids"] == TokenFile.open(tmp_path / "out").tokens[:-1].tolist()
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)
    assert theirs.decode(encoded["input_ids"]) == TEXT


def test_exactly_one_tokenizer_is_asked_for(tmp_path, tokenizer_json):
    path, out = text_file(tmp_path), tmp_path / "out"
    refused(UsageError, "either a tokenizer", texts=[path], out=out)
    refused(
        UsageError,
        "either a tokenizer",
        texts=[path],
        out=out,
        tokenizer=tokenizer_json,
        train_bpe=300,
    )


def test_inputs_that_are_not_there(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "bare").mkdir()
    missing = tmp_path / "missing.txt"
    refused(UsageError, "no such file", missing, texts=[missing], out=out, train_bpe=300)
    refused(
        UsageError, "no text files under", "bare", texts=[tmp_path / "bare"], out=out, train_bpe=300
    )
    refused(UsageError, "at least one text", texts=[], out=out, train_bpe=300)


@pytest.mark.parametrize(
    ("name", "content"), [("empty.txt", ""), ("white.txt", " \n"), ("empty.jsonl", json_lines(""))]
)
@pytest.mark.parametrize("train", [True, False])
def test_an_input_without_text_is_named(tmp_path, tokenizer_json, name, content, train):
    texts = [text_file(tmp_path), text_file(tmp_path, content, name)]
    options = {"train_bpe": 300} if train else {"tokenizer": tokenizer_json}
    refused(UsageError, name, "no text", texts=texts, out=tmp_path / "out", **options)


def test_no_documents_at_all(tmp_path, bpe):
    with pytest.raises(UsageError, match="no text to tokenize"):
        tokenize_documents(iter([]), tmp_path / "out", bpe)
    assert not list(tmp_path.iterdir())


def test_text_that_is_not_utf8_is_placed(tmp_path):
    path = text_file(tmp_path, b"abc\xffdef", "latin.txt")
    refused(GrowkitError, path, "byte 3 is 0xff", texts=[path], out=tmp_path / "out", train_bpe=300)
    path = text_file(tmp_path, json_lines("x").encode() + b'{"text": "\xe9"}\n', "latin.jsonl")
    refused(
        GrowkitError, path, "byte 24 is 0xe9", texts=[path], out=tmp_path / "out", train_bpe=300
    )


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("{oops", "not JSON"),
        ('{"body": "x"}', 'string under "text"'),
        ('{"text": 3}', 'string under "text"'),
        ('["text"]', 'string under "text"'),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_json_line_is_placed(tmp_path, tokenizer_json, line, fragment):
    path = text_file(tmp_path, json_lines("fine", "fine") + line + "\n", "bad.jsonl")
    options = {"texts": [path], "out": tmp_path / "out", "tokenizer": tokenizer_json}
    refused(GrowkitError, f"{path}, line 3", fragment, **options)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b"plain", lambda b: b[:12] + b"\xff" * 9 + b[21:]]
)
def test_a_broken_gzip_file_is_named(tmp_path, damage):
    path = text_file(tmp_path, damage(gzip.compress(TEXT.encode())), "text.txt.gz")
    refused(GrowkitError, path, "gzip", texts=[path], out=tmp_path / "out", train_bpe=300)


def test_an_existing_output_is_replaced_only_by_force(tmp_path):
    path, out = text_file(tmp_path), tmp_path / "out"
    tokenize([path], out, train_bpe=280)
    refused(UsageError, out, texts=[path], out=out, train_bpe=270)
    assert TokenFile.open(out).manifest["vocab_size"] == 280
    tokenize([path], out, train_bpe=270, force=True)
    assert TokenFile.open(out).manifest["vocab_size"] == 270


def test_force_keeps_the_old_output_when_the_new_one_fails(tmp_path):
    path, out = text_file(tmp_path), tmp_path / "out"
    tokenize([path], out, train_bpe=300)
    bad = text_file(tmp_path, "{", "bad.jsonl")
    refused(GrowkitError, "bad.jsonl", texts=[path, bad], out=out, tokenizer=out, force=True)
    verify(TokenFile.open(out))


def test_force_spares_directories_that_are_not_ours(tmp_path):
    path = text_file(tmp_path, name="home/letters.txt")
    refused(UsageError, "home", texts=[path], out=tmp_path / "home", train_bpe=300, force=True)


def test_a_bucket_cannot_be_the_output(tmp_path):
    with pytest.raises(UsageError, match="local disk"):
        tokenize([text_file(tmp_path)], "gs://bucket/out", train_bpe=300)


@pytest.mark.parametrize("size", [257, 0, -1])
def test_a_vocabulary_smaller_than_the_bytes(tmp_path, size):
    refused(
        UsageError, "258", size, texts=[text_file(tmp_path)], out=tmp_path / "out", train_bpe=size
    )


def test_tokenizers_that_cannot_be_used(tmp_path):
    texts, out = [text_file(tmp_path)], tmp_path / "out"
    for content in (b"{}", b"not json", b"\xff\xfe"):
        path = text_file(tmp_path, content, "garbage.json")
        refused(GrowkitError, path, texts=texts, out=out, tokenizer=path)
    refused(UsageError, "none.json", texts=texts, out=out, tokenizer=tmp_path / "none.json")
    refused(UsageError, "tokenizer.json", texts=texts, out=out, tokenizer=tmp_path)
    endless = metaspace_tokenizer(tmp_path, "<stop>")
    refused(UsageError, "<|endoftext|>, </s>, <eos>", texts=texts, out=out, tokenizer=endless)
