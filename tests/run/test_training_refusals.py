"""What train and generate refuse: one sentence, the right exit code, and nothing written."""

from __future__ import annotations

import json

import numpy as np
import pytest

from growkit.checkpoint.location import open_source, write_output
from growkit.checkpoint.tensor import Contents, copy_tensor, wrap_array
from growkit.cli import run
from growkit.models.gpt_neox import GPT_NEOX
from trainer.data.tokens import TokenWriter

TINY = GPT_NEOX.model(layer=1, embed=16, head=2, mlp=32, vocab=64, context=16, rotary_pct=0.5)
MODEL = "model={layer: 1, embed: 16, head: 2, mlp: 32, vocab: 64, context: 16, rotary_pct: 0.5}"
# A tokenizer with one token for each of four letters.
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"String": ""},
        "behavior": "Isolated",
        "invert": False,
    },
    "post_processor": None,
    "decoder": {"type": "Fuse"},
    "model": {
        "type": "WordLevel",
        "vocab": {letter: number for number, letter in enumerate("abcd")},
        "unk_token": "a",
    },
}


def token_directory(path, count=400, vocab=64, **manifest):
    path.mkdir()
    with TokenWriter(path, vocab) as writer:
        writer.add(np.random.default_rng(0).integers(0, vocab, count))
    content = {**writer.summary(), "vocab_size": vocab, "end_of_text": 0, **manifest}
    (path / "manifest.json").write_text(json.dumps(content))
    return path


def model_directory(path, files=(), **sizes):
    """A Hugging Face directory of small random numbers, with files beside it."""
    model = TINY.change(**sizes)
    random = np.random.default_rng(0)

    def recipe(row):
        shape = row.shape(model.sizes)
        return copy_tensor(wrap_array(random.normal(size=shape).astype(np.float32)))

    recipes = {name: recipe(row) for name, row, _ in model.table.names(model.sizes)}
    contents = Contents(model.config(), {"params": recipes}, [], files=dict(files))
    write_output(path, "huggingface", contents)
    return path


@pytest.fixture
def refused(capsys, tmp_path):
    """Check that a command ends with this code and one line of these words, and begins no run."""

    def check(arguments, code, *fragments):
        assert run([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("growkit: ")
        for fragment in fragments:
            assert fragment in lines[0]
        assert not (tmp_path / "run" / "metrics.csv").exists()

    return check


def train(tmp_path, *arguments):
    return ["train", *arguments, "--out", tmp_path / "run"]


def test_no_data(refused, tmp_path):
    refused(train(tmp_path, "tiny"), 2, "no data: set data.train=DIR")
    assert not (tmp_path / "run").exists()


def test_data_that_are_none(refused, tmp_path):
    refused(
        train(tmp_path, "tiny", f"data.train={tmp_path / 'nowhere'}"),
        2,
        "no token data at",
        "nowhere",
    )
    (tmp_path / "empty").mkdir()
    refused(
        train(tmp_path, "tiny", f"data.train={tmp_path / 'empty'}"),
        2,
        "empty is a directory without tokens.bin",
    )
    assert not (tmp_path / "run").exists()


def test_ids_beyond_the_vocabulary(refused, tmp_path):
    data = token_directory(tmp_path / "data", vocab=100)
    refused(
        train(tmp_path, "tiny", MODEL, f"data.train={data}"),
        2,
        "need a vocabulary of 100, and the model has 64",
    )


def test_a_text_too_short_for_the_context(refused, tmp_path):
    data = token_directory(tmp_path / "data", count=21)
    refused(
        train(tmp_path, "tiny", MODEL, f"data.train={data}"),
        2,
        "has 21 tokens",
        "largest context that would work is 10",
    )


def test_another_tokenizer_than_the_sources(refused, tmp_path):
    source = model_directory(tmp_path / "source", {"tokenizer.json": b"{}"})
    data = token_directory(tmp_path / "data", tokenizer_sha256="0" * 64)
    arguments = train(tmp_path, "recipe", f"data.train={data}", "--from", source)
    refused(
        arguments, 2, "was tokenized with another tokenizer than the one", "--tokenizer from there"
    )


def test_another_model_than_the_sources(refused, tmp_path):
    source, data = model_directory(tmp_path / "source"), token_directory(tmp_path / "data")
    arguments = train(tmp_path, "recipe", "model.layer=2", f"data.train={data}", "--from", source)
    refused(arguments, 2, "is for another model than", "layer is 2 in the one and 1 in the other")


@pytest.mark.parametrize(
    "arguments,fragments",
    [
        (
            ["tinny"],
            [
                "no configuration file 'tinny' and no preset",
                "recipe, small, tiny",
                "did you mean 'tiny'",
            ],
        ),
        (["tiny", "batch.sequence=4"], ["unknown key batch.sequence", "did you mean 'sequences'"]),
        (["tiny", "batch.sequences=four"], ["batch.sequences must be a whole number, got 'four'"]),
        (["tiny", "batch"], ["an override is key=value"]),
        (
            ["tiny", "model.head=5"],
            ["the model section", "multiple of num_attention_heads, got 128 and 5"],
        ),
    ],
)
def test_configurations(arguments, fragments, refused, tmp_path):
    refused(train(tmp_path, *arguments), 2, *fragments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content,fragment",
    [
        (b"optimizer: [1, 2", "is not valid YAML"),
        (b"- 1\n- 2\n", "must hold `section: values`, got list"),
        (b"\xff\xfe\x00\x01", "is not a YAML file: it is not text"),
        (b"optimizer:\n\tclip: 1\n", "is not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(content, fragment, refused, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    refused(train(tmp_path, str(path)), 2, fragment, str(path))


def test_a_precision_that_jax_would_not_keep(refused, tmp_path):
    data = token_directory(tmp_path / "data")
    refused(
        train(tmp_path, "tiny", MODEL, f"data.train={data}", "precision.compute=float64"),
        2,
        "JAX_ENABLE_X64=1",
    )


def test_a_run_that_is_none(refused, tmp_path):
    data = token_directory(tmp_path / "data")
    arguments = train(tmp_path, "tiny", MODEL, f"data.train={data}")
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    refused(arguments, 2, "run exists and is not a run; name another --out")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "content",
    ["a: [", "a: 1\n", "3\n", "from: null\nconfig: {sead: 1}\n", "from:\nconfig: 3\n", "[" * 5000],
)
def test_a_run_with_another_programs_configuration(content, refused, tmp_path):
    data = token_directory(tmp_path / "data")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(content)
    arguments = train(tmp_path, "tiny", MODEL, f"data.train={data}")
    refused(arguments, 2, "config.yaml is not the configuration of a run")
    assert (tmp_path / "run" / "config.yaml").read_text() == content


def test_a_run_that_is_a_file(refused, tmp_path):
    (tmp_path / "run").write_text("precious")
    refused(train(tmp_path, "tiny", "data.train=x"), 2, "run exists and is not a run")


def test_nothing_to_begin_with(refused, tmp_path):
    data = token_directory(tmp_path / "data")
    (tmp_path / "grown").mkdir()
    arguments = train(tmp_path, "recipe", f"data.train={data}")
    refused(
        [*arguments, "--from", tmp_path / "grwn"],
        2,
        "there is no such directory",
        "did you mean",
        "grown",
    )
    refused([*arguments, "--from", tmp_path / "grown"], 1, "grown is not a model")
    assert not (tmp_path / "run").exists()


def test_generating_without_a_tokenizer(refused, tmp_path):
    source = model_directory(tmp_path / "source")
    refused(["generate", source, "--prompt", "a"], 1, "carries no tokenizer.json")


def test_generating_with_a_broken_tokenizer(refused, tmp_path):
    source = model_directory(tmp_path / "source", {"tokenizer.json": b"{}"})
    refused(["generate", source, "--prompt", "a"], 1, "the tokenizer.json of", "that can be read")


@pytest.fixture
def source(tmp_path):
    return model_directory(tmp_path / "source", {"tokenizer.json": json.dumps(TOKENIZER).encode()})


@pytest.mark.parametrize(
    "options,fragment",
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--tokens", "0"], "--tokens must be at least 1, got 0"),
        (
            ["--prompt", "a", "--temperature", "-1"],
            "--temperature must be a number of at least 0, got -1.0",
        ),
        (
            ["--prompt", "a", "--temperature", "nan"],
            "--temperature must be a number of at least 0, got nan",
        ),
        (["--prompt", "a", "--seed", "-1"], "--seed must lie between 0 and 2147483647, got -1"),
        (["--prompt", "a", "--seed", str(2**70)], "--seed must lie between 0 and 2147483647"),
    ],
)
def test_generating(options, fragment, source, refused):
    refused(["generate", source, *options], 2, fragment)


def test_generating_with_ids_beyond_the_vocabulary(refused, tmp_path):
    wide = TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": {"a": 0, "b": 99}}}
    source = model_directory(tmp_path / "source", {"tokenizer.json": json.dumps(wide).encode()})
    refused(
        ["generate", source, "--prompt", "ab"],
        2,
        "the token 'b' with the id 99, and the model's vocabulary ends at 63",
    )


def test_generating_from_nothing(refused, tmp_path):
    refused(["generate", tmp_path / "nothing", "--prompt", "a"], 2, "there is no such directory")


@pytest.mark.parametrize(
    ("stated", "beside", "shorter"),
    [
        (None, {}, False),
        (63, {}, False),
        (1, {}, True),
        ([63, 1], {}, True),
        (None, {"eos_token": "b"}, True),
        (63, {"eos_token": {"content": "b"}}, True),
    ],
)
def test_generating_ends_with_the_text(monkeypatch, stated, beside, shorter, tmp_path, capsys):
    """The ids of the configuration end it, one or a list, and the token of the tokenizer's own."""
    from trainer.evaluate import generate

    monkeypatch.setattr(generate.Generator, "draw", lambda *given: iter([2, 3, 1, 2]))
    files = {
        "tokenizer.json": json.dumps(TOKENIZER).encode(),
        "tokenizer_config.json": json.dumps(beside).encode(),
    }
    source = model_directory(tmp_path / "source", files)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": stated}))
    words = ["generate", str(source), "--prompt", "a", "--tokens", "4"]
    assert run(words) == 0
    assert capsys.readouterr().out.strip() == ("acd" if shorter else "acdbc")


def test_what_is_not_refused_generates(source, capsys):
    assert (
        run(["generate", str(source), "--prompt", "abc", "--tokens", "3", "--temperature", "0"])
        == 0
    )
    assert capsys.readouterr().out.startswith("abc")
    assert open_source(str(source)).model == TINY
