"""A tokenizer is found as a directory, a file, a vocab.json with merges.txt, a SentencePiece model
and a Hub id; and each encodes as the library that it is of.
"""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from growkit.cli import run
from growkit.errors import GrowkitError, UsageError
from trainer.data.tokenizer import load_tokenizer, train_tokenizer

TEXT = "the cat sat on the mat, and the dog on the log\n"
PROBES = [
    "the cat",
    "  two  spaces ",
    "a line\nand another",
    "naïve 🙂 3.14",
    "",
    "<|endoftext|> x",
]


@pytest.fixture(scope="module")
def bpe():
    return json.loads(train_tokenizer([TEXT * 3], 300).json)


def save_pair(folder, bpe, prefix=""):
    """A vocab.json and a merges.txt, as GPT-2's."""
    folder.mkdir(exist_ok=True)
    (folder / f"{prefix}vocab.json").write_text(json.dumps(bpe["model"]["vocab"]))
    merges = [" ".join(pair) for pair in bpe["model"]["merges"]]
    (folder / f"{prefix}merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def encode(tokenizer, texts=PROBES):
    return [ids.tolist() for ids in tokenizer.encode(texts)]


def refused(kind, path, *fragments):
    with pytest.raises(GrowkitError) as caught:
        load_tokenizer(path)
    assert caught.type is kind and "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_vocabulary_and_its_merges_are_a_tokenizer(tmp_path, bpe):
    folder = save_pair(tmp_path / "given", bpe)
    (tmp_path / "whole.json").write_text(json.dumps(bpe))
    expected = encode(load_tokenizer(tmp_path / "whole.json"))
    for given in (folder, folder / "vocab.json", folder / "merges.txt"):
        loaded = load_tokenizer(given)
        assert encode(loaded) == expected and loaded.end_of_text == "<|endoftext|>"
    named = save_pair(tmp_path / "named", bpe, "gpt2-")
    assert encode(load_tokenizer(named / "gpt2-vocab.json")) == expected
    # A tokenizer.json goes before what it was made of.
    (folder / "tokenizer.json").write_text(json.dumps(bpe))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert encode(load_tokenizer(folder)) == expected


def test_what_lies_beside_a_vocabulary_is_read(tmp_path, bpe):
    folder = save_pair(tmp_path / "given", bpe)
    free = len(bpe["model"]["vocab"])
    (folder / "added_tokens.json").write_text(json.dumps({"<b>": free + 1, "<a>": free}))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<b>", "add_prefix_space": true}')
    loaded = load_tokenizer(folder)
    assert loaded.end_of_text == "<b>" and loaded.end_of_text_id == free + 1
    assert loaded.encode(["cat"])[0].tolist() == loaded.encode([" cat"])[0].tolist()
    (folder / "tokenizer_config.json").unlink()
    plain = load_tokenizer(folder, "<a>")
    assert plain.end_of_text_id == free
    assert plain.encode(["cat"])[0].tolist() != plain.encode([" cat"])[0].tolist()
    (folder / "added_tokens.json").write_text(json.dumps({"<b>": free + 1}))
    refused(GrowkitError, folder, f"gives '<b>' the id {free + 1}, and the next free one is {free}")


def test_half_a_tokenizer_and_what_is_none_are_refused(tmp_path, bpe):
    forms = ("a vocab.json with a merges.txt beside it", "SentencePiece", "a Hub id")
    refused(UsageError, tmp_path, "no tokenizer at", *forms)
    refused(UsageError, tmp_path / "none", "no tokenizer at", *forms)
    folder = save_pair(tmp_path / "given", bpe)
    (folder / "merges.txt").unlink()
    refused(UsageError, folder, "no tokenizer at")
    refused(UsageError, folder / "vocab.json", "half of a tokenizer", "merges.txt is missing")
    (folder / "merges.txt").write_text("q z\n")
    refused(GrowkitError, folder, "vocab.json and merges.txt are not of one BPE")
    (folder / "vocab.json").write_text('{"a": 0, "b": 1}')
    refused(GrowkitError, folder, "not of a byte-level BPE: it lacks 254 of the 256 bytes")
    (folder / "vocab.json").write_text('["a"]')
    refused(GrowkitError, folder, "must hold an object of tokens and their ids")
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(b"")
    refused(UsageError, tmp_path, "holds a.model, b.model; name the one")


@pytest.mark.slow
def test_a_vocabulary_encodes_as_in_transformers(tmp_path, bpe):
    transformers = pytest.importorskip("transformers")
    folder = save_pair(tmp_path / "given", bpe)
    theirs = transformers.GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    loaded = load_tokenizer(folder)
    assert encode(loaded) == [theirs(text, add_special_tokens=False).input_ids for text in PROBES]
    # A class that does more than its files say is made by transformers.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    texts = [*PROBES, "e\u0301 is composed"]
    ours = encode(load_tokenizer(folder), texts)
    assert ours == [theirs(text, add_special_tokens=False).input_ids for text in texts]
    assert ours != encode(loaded, texts)


# ---------------------------------------------------------------- the Hub


def test_a_tokenizer_is_had_from_the_hub(tmp_path, bpe, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "tokenizer.json").write_text(json.dumps(bpe))
    asked = []

    def download(name, revision=None, allow_patterns=()):
        asked.append((name, revision))
        assert "tokenizer.json" in allow_patterns and "*.safetensors" not in allow_patterns
        if name == "someone/absent":
            raise ConnectionError("no route\nto host")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_tokenizer("someone/model@main").json == (snapshot / "tokenizer.json").read_bytes()
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["tokenize", "text.txt", "--processes", "1", "--out", "out", "--tokenizer"]
    assert run([*command, "someone/model"]) == 0
    assert asked == [("someone/model", "main"), ("someone/model", None)]
    refused(
        GrowkitError, "someone/absent", "could not be had from the Hugging Face Hub", "a Hub id"
    )
    # A directory of the owner's name is here: the path was meant to lie in it.
    (tmp_path / "someone").mkdir()
    refused(UsageError, "someone/model", "no tokenizer at someone/model")
    assert len(asked) == 3


# ---------------------------------------------------------------- SentencePiece

CORPUS = [
    TEXT,
    "naïve café 日本語 и русский 🙂",
    "3.14159 1,000,000",
    "  two  spaces  at each place ",
]
TRAINED = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 380},
    "unigram": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 360},
    "as it stands": {
        "model_type": "bpe",
        "byte_fallback": True,
        "vocab_size": 380,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<u>"],
    },
    "without bytes": {"model_type": "unigram", "vocab_size": 90},
}


def train_sentencepiece(path, **options):
    """A small SentencePiece model at a path."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_prefix=str(path.with_suffix("")),
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_sentencepiece_model_encodes_as_sentencepiece(tmp_path, name):
    pytest.importorskip("transformers")
    file = tmp_path / "tokenizer.model"
    original = train_sentencepiece(file, **TRAINED[name])
    texts = [*CORPUS, "unseen: ß ﬁ Ａ\u200b\t.", "", " ", "the  cat \n\n sat", "a<u>b"]
    for given in (file, tmp_path):
        loaded = load_tokenizer(given)
        assert encode(loaded, texts) == [original.encode(text) for text in texts]
        assert loaded.end_of_text == "</s>" and loaded.vocab_size == original.vocab_size()
    if name == "bpe":
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        named = load_tokenizer(tmp_path, "</s>")
        assert encode(named, ["the cat"]) == [original.encode("the cat")]
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoTokenizer"}')
        refused(GrowkitError, tmp_path, "names the class NoTokenizer, and transformers makes a")
    plain = Tokenizer.from_str(loaded.json.decode())
    assert plain.decode(loaded.encode([TEXT.strip()])[0].tolist()) == TEXT.strip()


@pytest.mark.slow
def test_a_model_that_would_encode_otherwise_is_refused(tmp_path):
    """A space is put before a text, and tokenizers would put one after each symbol too."""
    pytest.importorskip("transformers")
    file = tmp_path / "tokenizer.model"
    train_sentencepiece(file, model_type="unigram", vocab_size=90, user_defined_symbols=["<u>"])
    refused(GrowkitError, file, "encodes 'a<u>b <u> c' otherwise than its tokenizer.json would")


def test_what_is_no_sentencepiece_model_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(GrowkitError, file, "is a Git LFS pointer")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    file.write_bytes(b"\x00\x01")
    refused(UsageError, file, "needs the package sentencepiece: pip install 'growkit[hf]'")
