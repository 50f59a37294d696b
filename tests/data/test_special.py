"""A document ends with the token that the tokenizer's own files state, or that the user names.

What else is saved with a tokenizer, and is of somebody's training, is not obeyed.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from growkit.cli import run
from growkit.errors import GrowkitError, UsageError
from trainer.data.corpus import encode_alike
from trainer.data.tokenize import tokenize
from trainer.data.tokenizer import load_model_tokenizer, load_tokenizer, train_tokenizer
from trainer.data.tokens import TokenFile

TEXT = "the cat sat on the mat"
NAMES = ["<｜end▁of▁sentence｜>", "[EOS]", "|ENDOFTEXT|", "<EOS_TOKEN>", "<|im_end|>", "</s>"]


def make(special, **changes):
    """A tokenizer.json with special tokens of the ids 2, 3, ...; changes: of its JSON."""
    tokenizer = Tokenizer.from_str(train_tokenizer([TEXT], 300, "<unused>").json.decode())
    tokenizer.add_special_tokens(list(special))
    content = json.loads(tokenizer.to_str())
    for key, value in changes.items():
        content[key] = content[key] | value if key == "model" else value
    return json.dumps(content).encode()


def folder(tmp_path, special, **beside):
    """A directory with the tokenizer, and JSON files beside it."""
    path = tmp_path / "given"
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_bytes(make(special))
    for name, content in beside.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / f"{name}.json").write_text(text)
    return path


def refused(kind, path, *fragments, **options):
    with pytest.raises(GrowkitError) as caught:
        load_tokenizer(path, **options)
    assert caught.type is kind and "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("end", NAMES)
@pytest.mark.parametrize("stated", [lambda end: end, lambda end: {"content": end, "lstrip": False}])
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_the_end_of_text_is_the_one_stated(tmp_path, end, stated, file):
    special = ["<|endoftext|>", "<eos>", end]
    path = folder(tmp_path, special, **{file: {"eos_token": stated(end)}})
    for given in (path, path / "tokenizer.json"):
        assert load_tokenizer(given).end_of_text == end


def test_an_option_goes_before_what_is_stated(tmp_path):
    path = folder(tmp_path, ["</s>", "<b>"], tokenizer_config={"eos_token": "</s>"})
    assert load_tokenizer(path, "<b>").end_of_text == "<b>"
    refused(UsageError, path, "'<c>'", "special tokens are <unused>", end_of_text="<c>")


def test_a_tokenizer_of_another_name_has_nothing_beside_it(tmp_path):
    path = folder(tmp_path, ["</s>", "<b>"], tokenizer_config={"eos_token": "<b>"})
    (path / "tokenizer.json").rename(path / "mine.json")
    assert load_tokenizer(path / "mine.json").end_of_text == "</s>"


def test_what_is_not_clear_is_asked(tmp_path):
    path = folder(tmp_path, ["</s>", "<|endoftext|>"])
    refused(UsageError, path, "2 tokens that may end a text, <|endoftext|> and </s>")
    path = folder(tmp_path, ["</s>", "<|endoftext|>"], tokenizer_config={"eos_token": None})
    refused(UsageError, path, "name the one that does with --end-of-text")
    path = folder(tmp_path, ["<stop>"])
    refused(UsageError, path, "<|endoftext|>, </s>, <eos>", "its special tokens are", "<stop>")


def test_a_stated_token_that_is_not_there(tmp_path):
    path = folder(tmp_path, ["</s>"], tokenizer_config={"eos_token": "<gone>"})
    refused(UsageError, path, "tokenizer_config.json says that '<gone>' ends a text")
    assert load_tokenizer(path, "</s>").end_of_text == "</s>"


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_broken_files_beside_a_tokenizer(tmp_path, content):
    path = folder(tmp_path, ["</s>"], tokenizer_config=content)
    refused(GrowkitError, path, "tokenizer_config.json of")


def test_a_pointer_is_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")
    refused(GrowkitError, path, "a Git LFS pointer")


def test_the_output_carries_what_was_stated(tmp_path):
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": "</s>",
        "bos_token": "<b>",
        "chat_template": "{{ x }}",
        "add_bos_token": True,
    }
    path = folder(tmp_path, ["</s>", "<b>", "<|endoftext|>"], tokenizer_config=config)
    (tmp_path / "a.txt").write_text(TEXT)
    manifest = tokenize([tmp_path / "a.txt"], tmp_path / "out", path)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert manifest["end_of_text"] == load_tokenizer(path).end_of_text_id
    assert TokenFile.open(tmp_path / "out").tokens[-1] == manifest["end_of_text"]
    assert (written["eos_token"], written["bos_token"]) == ("</s>", "<b>")
    assert written["chat_template"] == "{{ x }}" and "unk_token" not in written
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    # The next tokenization with that directory ends documents alike.
    again = tokenize([tmp_path / "a.txt"], tmp_path / "again", tmp_path / "out")
    assert again["bin_sha256"] == manifest["bin_sha256"]


def test_a_tokenizer_is_trained_with_a_name_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    tokenize([tmp_path / "a.txt"], tmp_path / "out", train_bpe=300, end_of_text="<END>")
    assert load_tokenizer(tmp_path / "out").end_of_text == "<END>"


def test_the_option_reaches_the_files(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    path = folder(tmp_path, ["</s>", "<|endoftext|>"])
    words = ["tokenize", str(tmp_path / "a.txt"), "--tokenizer", str(path)]
    words += ["--out", str(tmp_path / "out"), "--processes", "1"]
    assert run(words) == 2
    assert run([*words, "--end-of-text", "</s>"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["end_of_text"] == load_tokenizer(path, "</s>").end_of_text_id


@pytest.mark.parametrize(
    ("config", "model", "end"),
    [
        ({}, {"eos_token_id": 2}, "</s>"),
        ({}, {"eos_token_id": [3, 2]}, "<|endoftext|>"),
        ({"eos_token": "<|endoftext|>"}, {"eos_token_id": 2}, "<|endoftext|>"),
    ],
)
def test_the_end_of_text_of_a_model(config, model, end):
    content = make([])
    tokenizer = Tokenizer.from_str(content.decode())
    first = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["</s>", "<|endoftext|>"])
    ids = {2: first, 3: first + 1}
    stated = model["eos_token_id"]
    renamed = [ids[each] for each in stated] if isinstance(stated, list) else ids[stated]
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    assert load_model_tokenizer(files, "it", {"eos_token_id": renamed}).end_of_text == end
    if not config:
        with pytest.raises(UsageError, match="state it as eos_token in a tokenizer_config.json"):
            load_model_tokenizer(files, "it", {"eos_token_id": None})


TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 20},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<unused>",
}
SAVED = {
    "truncation": {"truncation": TRUNCATION},
    "padding": {"padding": PADDING},
    "dropout of merges": {"model": {"dropout": 0.9}},
}


@pytest.mark.parametrize("setting", SAVED)
def test_settings_of_training_are_not_obeyed(tmp_path, setting):
    (tmp_path / "tokenizer.json").write_bytes(make(["</s>"], **SAVED[setting]))
    (tmp_path / "plain.json").write_bytes(make(["</s>"]))
    ids = load_tokenizer(tmp_path / "plain.json").encode([TEXT])[0]
    loaded = load_tokenizer(tmp_path)
    for _ in range(3):
        np.testing.assert_array_equal(loaded.encode([TEXT])[0], ids)
        assert loaded.encode_for_model(TEXT, True, 400, "it") == ids.tolist()
    # The library obeys them where it is not told otherwise.
    obeyed = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert any(obeyed.encode(TEXT).ids != ids.tolist() for _ in range(20))


def test_truncation_and_padding_make_no_other_tokenizer():
    plain = make(["</s>"])
    assert encode_alike(plain, make(["</s>"], truncation=TRUNCATION, padding=PADDING))
    assert not encode_alike(plain, make(["</s>"], model={"dropout": 0.9}))
    assert not encode_alike(plain, make(["</s>", "<b>"]))
    assert not encode_alike(plain, b"{")


def test_a_pattern_that_does_not_end_is_one_sentence(tmp_path, capfd):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated"}
    (tmp_path / "given.json").write_bytes(make(["</s>"], pre_tokenizer=split | {"invert": False}))
    (tmp_path / "a.txt").write_text("a" * 60)
    words = ["tokenize", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "given.json")]
    assert run([*words, "--out", str(tmp_path / "out"), "--processes", "1"]) == 1
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "reading 1 file (1 .txt)"
    assert said[1].startswith("growkit: encoding a text fails in the tokenizers library: ")
    assert len(said) == 2


def test_what_others_write_to_standard_error_is_kept(tmp_path, capfd):
    import os

    from trainer.data.panics import explain_panics

    with explain_panics("it"):
        os.write(2, b"one\n")
    with pytest.raises(ValueError), explain_panics("it"):
        os.write(2, b"two\n")
        raise ValueError
    os.write(2, b"three\n")
    assert capfd.readouterr().err == "one\ntwo\nthree\n"
