"""The check: two functions on the same tokens, one table of tolerances, the CPU by choice."""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SMALL, save_checkpoint, save_directory
from golden import words
from tokenizers import Tokenizer, models, pre_tokenizers

from growkit.checkpoint.location import open_source
from growkit.cli import checking, run
from growkit.cli.checked_text import choose_text
from growkit.cli.checking import TOLERANCES, GrowthCheck, compare_functions
from growkit.cli.comparing import _format_model
from growkit.entries import Origin, Training
from growkit.models.tables import read_shipped
from trainer.data.tokens import TokenWriter

TOKENS = np.arange(12).reshape(3, 4) % 5


def one_hot(scale: float):
    """A function whose logits are `scale` for the token itself and 0 for all others."""
    return lambda tokens: np.eye(5, dtype=np.float32)[tokens] * np.float32(scale)


def shifted(by: float):
    return lambda tokens: one_hot(10.0)(tokens) + np.float32(by)


def test_figures_are_those_worked_out_by_hand():
    found = compare_functions(one_hot(0.0), one_hot(10.0), TOKENS)
    assert found.tokens == 12
    # Even odds for 5 tokens; then the token before is certain, and the next is another.
    assert found.loss_before == pytest.approx(math.log(5))
    assert found.loss_after == pytest.approx(10.0 + math.log(1 + 4 * math.exp(-10)))
    assert (found.largest_logit, found.largest_difference) == (0.0, 10.0)
    assert found.tolerance == TOLERANCES["float32"] and not found.negligible


def test_chunks_make_no_difference(monkeypatch):
    whole = compare_functions(one_hot(1.0), shifted(0.5), TOKENS)
    monkeypatch.setattr(checking, "CHUNK", 4)
    parts = compare_functions(one_hot(1.0), shifted(0.5), TOKENS)
    assert parts.loss_after == pytest.approx(whole.loss_after)
    assert parts.largest_difference == whole.largest_difference


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_difference_is_measured_against_the_rounding_of_the_weights(dtype):
    bound = TOLERANCES[dtype] * 10
    for part, negligible in ((0.9, True), (1.1, False)):
        found = compare_functions(one_hot(10.0), shifted(part * bound), TOKENS, rounded_to=dtype)
        assert found.negligible == negligible


def test_a_logit_that_is_no_number_is_never_negligible():
    found = compare_functions(one_hot(1.0), lambda tokens: one_hot(np.nan)(tokens), TOKENS)
    assert not found.negligible
    assert not compare_functions(one_hot(np.nan), one_hot(np.nan), TOKENS).negligible


@pytest.mark.parametrize(
    "dtype,verdict",
    [("float32", "PRESERVED;"), ("float16", "PRESERVED to the rounding of float16")],
)
def test_a_verdict_names_the_rounding_where_there_is_any(dtype, verdict):
    same = compare_functions(one_hot(1.0), one_hot(1.0), TOKENS, rounded_to=dtype)
    line = GrowthCheck(same, "random tokens", True, dtype).describe()
    assert verdict in line and line.endswith("(12 random tokens, computed on the CPU)")


def test_what_is_computed_in_jax_is_computed_on_the_cpu(tmp_path, monkeypatch):
    import jax

    chosen = []
    right = jax.default_device

    @contextmanager
    def noted(device):
        chosen.append(device)
        with right(device):
            yield

    monkeypatch.setattr(jax, "default_device", noted)
    source = open_source(str(save_directory(tmp_path / "hf")))
    logits = checking.load_function(source)(np.zeros((1, 3), np.int64))
    assert logits.shape == (1, 3, SMALL.vocab) and logits.dtype == np.float32
    assert [device.platform for device in chosen] == ["cpu"]


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_a_model_that_states_no_context_reads_sequences_of_a_length(kind):
    """ALiBi and recurrences have no limit; inspect leaves out what such a model has none of."""
    model = read_shipped(kind).read({"vocab_size": 50, "time_step_rank": 4})
    source = SimpleNamespace(model=model, files={})
    assert model.context == 0
    assert checking.select_tokens(source, 3000)[0].shape == (2, checking.LENGTH)
    assert checking.select_tokens(source, 60)[0].shape == (1, 60)
    words = _format_model(model)[0].split(", ")
    assert "vocab 50" in words and not {"context 0", "mlp 0", "0 heads of 0"} & set(words)


def test_the_text_is_not_cut_by_what_is_saved_with_the_tokenizer(tmp_path):
    """With a truncation to 4 tokens, a check of 60 would be of the same 4, over and over."""
    vocab = {"<unk>": 0, **{f"w{number}": number for number in range(1, 90)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    place = save_directory(tmp_path / "hf")
    tokenizer.save(str(place / "tokenizer.json"))
    whole, said = checking.select_tokens(open_source(str(place)), 60)
    assert said == "tokens of Python's documentation"
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9, pad_id=5)
    tokenizer.save(str(place / "tokenizer.json"))
    ids, said = checking.select_tokens(open_source(str(place)), 60)
    assert said == "tokens of Python's documentation" and (ids == whole).all()


def test_writing_leaves_the_choice_of_devices_to_others(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    checkpoint = save_checkpoint(tmp_path / "ck")
    out = str(tmp_path / "out")
    assert run(["width", "--mlp", "2x", "--check", "64", str(checkpoint), out]) == 0
    assert "JAX_PLATFORMS" not in os.environ


@pytest.mark.parametrize(
    "words",
    [["width", "--mlp", "2x", "--check"], ["export", "--check"]],
    ids=lambda words: words[0],
)
def test_a_check_without_a_cpu_is_refused_before_the_work(tmp_path, capsys, monkeypatch, words):
    if words[0] == "export":
        pytest.importorskip("transformers")
    source = save_checkpoint(tmp_path / "ck")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert run([*words, str(source), str(tmp_path / "out")]) == 2
    said = "--check computes on the CPU, and JAX_PLATFORMS is 'cuda'; set it to 'cuda,cpu'"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    checking.require_checkable(open_source(str(source)))


def test_json_names_the_device(tmp_path, capsys):
    import json

    source = save_directory(tmp_path / "hf")
    words = ["width", "--mlp", "2x", "--check", "64", "--json", str(source), str(tmp_path / "out")]
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["check"]["device"] == "cpu"


@pytest.fixture
def worded(tmp_path):
    """A model with the tokenizer of `golden.words`, which begins no text with a token."""
    place = save_directory(tmp_path / "hf", SMALL.change(vocab=272))
    (place / "tokenizer.json").write_text(words.tokenizer())
    return place


def check_by_words(capsys, *arguments):
    """The lines that a growth in width printed of its text and of its check, and the exit code."""
    code = run(["width", "--mlp", "2x", *map(str, arguments)])
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith(("text ", "check "))]
    return code, lines, err


def test_a_text_of_ones_own(worded, tmp_path, capsys):
    """It implies --check; --check says of how many tokens, at most those that there are."""
    file = tmp_path / "own.txt"
    file.write_text("the people who were first " * 6)
    ids = Tokenizer.from_str(words.tokenizer()).encode(file.read_text()).ids
    code, lines, _ = check_by_words(capsys, "--check-text", file, worded, tmp_path / "out")
    tokens = len(ids) // SMALL.context * SMALL.context
    assert 64 < tokens < 1024 and code == 0 and len(lines) == 1 and "PRESERVED" in lines[0]
    assert lines[0].endswith(f"({tokens} tokens of {file}, computed on the CPU)")
    source = open_source(str(worded))
    read = choose_text(source, 64, str(file))
    assert read.tokens.tolist() == np.reshape(ids[:64], (2, 32)).tolist() and not read.note
    assert choose_text(source, 20, str(file)).tokens.tolist() == [ids[:20]]


def test_token_files_are_a_text_too(tmp_path, capsys):
    """A model without a tokenizer can be given them."""
    place = save_directory(tmp_path / "hf")
    (tmp_path / "ids").mkdir()
    with TokenWriter(tmp_path / "ids", SMALL.vocab) as writer:
        writer.add(np.arange(70) % SMALL.vocab)
    chosen = choose_text(open_source(str(place)), 1024, str(tmp_path / "ids"))
    assert chosen.tokens.tolist() == (np.arange(64) % SMALL.vocab).reshape(2, 32).tolist()
    assert chosen.words == f"tokens of {tmp_path / 'ids'}"


def test_the_default_text_is_said_as_what_it_is(worded, tmp_path, capsys):
    code, lines, _ = check_by_words(capsys, "--check", "64", worded, tmp_path / "out")
    own = "--check-text takes a text of your own"
    assert code == 0 and lines[0] == (
        "text        tokens of Python's documentation, which comes with Python; the model may "
        f"never have seen such text; {own}"
    )
    assert lines[1].endswith("(64 tokens of Python's documentation, computed on the CPU)")
    (worded / "tokenizer.json").unlink()
    chosen = choose_text(open_source(str(worded)), 64)
    assert chosen.words == "random tokens"
    assert chosen.note.startswith(
        "no text, because no tokenizer of the model can be read: its loss"
    )


def test_the_data_of_a_model_that_the_trainer_made_are_named(worded):
    source = open_source(str(worded))
    config = {"schedule": {}, "data": {"train": {"/home/me/books": 1.0, "/home/me/code": 1.0}}}
    training = Training(multipliers=False, config=config)
    source.lineage.append(training.to_json())
    note = choose_text(source, 64).note
    assert "Python; the model was trained on other data: books, code; --check-text" in note
    # What came before is not known.
    origin = Origin("elsewhere", "huggingface", "0" * 64, {})
    source.lineage[0] = Training(multipliers=False, config=config, source=origin).to_json()
    assert "may never have seen such text" in choose_text(source, 64).note


@pytest.mark.parametrize(
    "content,code,said",
    [
        ("", 2, "own.txt has 0 tokens, and the loss of the next token takes at least 2"),
        (None, 2, "no such file or directory: "),
        ("\x00\x01", 1, "own.txt"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_before_the_work(
    content, code, said, worded, tmp_path, capsys
):
    file = tmp_path / "own.txt"
    if content is not None:
        file.write_text(content)
    found, lines, err = check_by_words(capsys, "--check-text", file, worded, tmp_path / "out")
    assert found == code and not lines and len(err.splitlines()) == 1 and said in err, err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_takes_no_text(worded, tmp_path, capsys):
    (worded / "tokenizer.json").unlink()
    (tmp_path / "own.txt").write_text("the people")
    arguments = ["--check-text", tmp_path / "own.txt", worded, tmp_path / "out"]
    code, _, err = check_by_words(capsys, *arguments)
    assert code == 1 and "carries no tokenizer.json" in err and len(err.splitlines()) == 1
    code, _, err = check_by_words(capsys, "--dry-run", *arguments)
    assert code == 2 and "--check runs the output, and --dry-run writes none" in err
