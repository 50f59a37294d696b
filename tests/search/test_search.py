"""The loss that a search prints is that of the model which growth writes; the search finds better
maps, refuses what cannot work, and writes nothing.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SMALL, contents_of, save_checkpoint, save_directory, save_tensors
from golden.words import text, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.cli.checking import _mean_loss, load_function
from growkit.errors import GrowkitError, UsageError
from growkit.growth.depth import plan_depth
from growkit.models import read_config
from growkit.models.llama import LLAMA
from trainer.data.sample import Reader, Sample
from trainer.data.tokens import TokenWriter
from trainer.model import view
from trainer.search import search as searching
from trainer.search.maps import draw_step, list_known, write_map
from trainer.search.search import search_maps
from trainer.search.views import Views, cut_windows

sys.path.append(str(Path(__file__).parents[1] / "model"))
from decoders import DEFAULT, MODELS, QUICK, SIZES  # noqa: E402

IDS = np.random.default_rng(3).integers(0, 96, 400)
WINDOWS = cut_windows(Sample("ids", IDS.astype(np.int32)), 24, 3)
MODEL = LLAMA.model(layer=4, embed=32, kv=2, group=2, head_dim=8, mlp=48, vocab=272, context=32)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Models this small compile longer than they run."""
    monkeypatch.setattr(jax, "jit", partial(jax.jit, compiler_options=QUICK))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model of 4 layers, its tokenizer, a text and token files."""
    root = tmp_path_factory.mktemp("search")
    save_directory(root / "model", MODEL)
    (root / "model" / "tokenizer.json").write_text(tokenizer())
    (root / "text.txt").write_text(text(400))
    (root / "ids").mkdir()
    with TokenWriter(root / "ids", 96) as writer:
        writer.add(IDS)
    return root


def evaluate(path: Path, windows: np.ndarray = WINDOWS) -> float:
    """The loss of a model on disk by another way: all logits at once, summed in float64."""
    logits = load_function(open_source(str(path)))(windows[:, :-1])
    losses = []
    for row, window in zip(logits, windows, strict=True):
        padded = np.concatenate([row, row[-1:]])[None]
        losses.append(_mean_loss(padded, window[None]))
    return float(np.mean(losses))


# The loss of a view


SOME = [
    name if name == "gemma3" else pytest.param(name, marks=pytest.mark.slow)
    for name in (*DEFAULT, "gpt_neox-linear")
]


@pytest.mark.parametrize("name", SOME)
def test_the_loss_of_a_map_is_that_of_the_model_grown_by_it(name, tmp_path, monkeypatch):
    """The siblings: another map, and views that read the next layer."""
    kind, fields = MODELS[name]
    sizes = {} if kind == "gpt2" else SIZES
    model = read_config({"model_type": kind, **sizes, **fields})
    source = open_source(str(save_directory(tmp_path / "model", model)))
    views = Views(source, WINDOWS, batch=2)
    # Windows go by layer: two of a kind are exchanged, and one layer of each is there once more.
    index = (0, 1, 0, 3, 2, 1, 3)
    words = ["depth", "--map", write_map(index), str(source.path), str(tmp_path / "out")]
    assert run(words) == 0
    grown = evaluate(tmp_path / "out")
    assert views.score(index) == pytest.approx(grown, abs=1e-5)
    assert abs(views.score((3, 0, 1, 0, 2, 1, 3)) - grown) > 1e-3
    assert views._sum._cache_size() == 1
    right = view._take
    monkeypatch.setattr(view, "_take", lambda stacked, layer: right(stacked, layer + 1))
    assert abs(Views(source, WINDOWS, 2).score(index) - grown) > 1e-3


def test_a_view_of_many_layers_takes_no_more_memory(place):
    source = open_source(str(place / "model"))
    views = Views(source, WINDOWS, batch=3)
    tokens, mask = views.batches[0]

    def measure(layers):
        lowered = views._sum.lower(views.params, tokens, mask, np.zeros(layers, np.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    stack = sum(array.nbytes for array in jax.tree.leaves(views.params["layers"]))
    # Made, 400 layers would be a hundred times the stack of 4.
    assert abs(measure(400) - measure(5)) < stack


def test_the_loss_without_a_layer_is_that_of_the_model_without_it(place):
    source = open_source(str(place / "model"))
    short = MODEL.change(layer=3)
    kept = (0, 2, 3)
    path = save_directory(place / "without", short)
    arrays = {}
    for name, row, position in short.table.names(short.sizes):
        old = row.name_at((kept[position[0]],)) if position else name
        arrays[name] = source.tensors["params"][old].read()
    save_tensors(path / "model.safetensors", arrays)
    views = Views(source, WINDOWS, batch=4)
    assert views.score(kept) == pytest.approx(evaluate(path), abs=1e-5)
    assert abs(views.score((0, 1, 3)) - views.score(kept)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint", "trainer"])
def test_other_kinds_of_sources(kind, place, tmp_path, capsys):
    if kind == "checkpoint":
        source = save_checkpoint(tmp_path / "ck", SMALL)
    else:
        from trained import save_trained

        source = save_trained(tmp_path / "ck")
    words = ["--layers", "5", "--tokens", str(place / "ids"), "--candidates", "3", "--json"]
    assert run(["search", str(source), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert run(["depth", "--map", found["maps"][0]["map"], str(source), str(tmp_path / "o")]) == 0
    windows = cut_windows(Sample("ids", IDS.astype(np.int32)), 32, 8)
    assert found["maps"][0]["loss"] == pytest.approx(evaluate(tmp_path / "o", windows), abs=1e-5)


# The verb


def test_the_verb_prints_maps_that_depth_takes(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents_of(place / "model")
    words = ["search", str(place / "model"), "--layers", "6", "--tokens", str(place / "text.txt")]
    words += ["--candidates", "8", "--windows", "4", "--context", "16"]
    assert run([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert contents_of(place / "model") == before and not list(tmp_path.iterdir())
    assert len(found["maps"]) == len(err.splitlines()) == 8
    losses = [each["loss"] for each in found["maps"]]
    assert losses == sorted(losses) and len(set(losses)) == 8 and len(found["loss_without"]) == 4
    assert found["text"] == {
        "name": str(place / "text.txt"),
        "windows": 4,
        "context": 16,
        "tokens": 64,
    }
    best = found["maps"][0]["map"]
    assert run(["depth", "--map", best, str(place / "model"), "out"]) == 0
    capsys.readouterr()
    reader = Reader(open_source(str(place / "model")).files, "the model", 272)
    windows = cut_windows(reader.read(str(place / "text.txt"), 65), 16, 4)
    assert losses[0] == pytest.approx(evaluate(tmp_path / "out", windows), abs=1e-5)
    assert found["loss"] == pytest.approx(evaluate(place / "model", windows), abs=1e-5)


def test_the_table_has_what_the_document_has(place, capsys, monkeypatch):
    def score(self, index):
        return float(sum(place * layer for place, layer in enumerate(index)))

    def refuse(source, index):
        if index[0] == index[1]:
            raise UsageError("layers must keep their kind")

    monkeypatch.setattr(Views, "score", score)
    monkeypatch.setattr(searching, "check_map", refuse)
    source = str(place / "model")
    words = ["search", source, "--layers", "6", "--tokens", str(place / "ids")]
    assert run([*words, "--candidates", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"source      {source}, 4 layers",
        f"text        {place / 'ids'}, its first 256 tokens, in 8 windows of 32",
        "own loss    14.000000 nats a token, computed in float32",
    ]
    # 0-3,0,1: 0 1 4 9 0 5
    assert " 19.000000  +5.000000  0-3,0,1  (stack)" in lines
    assert "left out    replicate: layers must keep their kind" in lines
    # 0,1,3 without layer 2: 1 + 6
    assert "more   -6.0000  -6.0000  -7.0000  -9.0000" in lines
    assert lines[-1] == f"next        growkit depth --map 0-3,0,1 {source} OUT"


# Maps


def test_known_maps():
    assert list_known(4, 6) == {
        "replicate": (0, 0, 1, 2, 2, 3),
        "nearest": (0, 1, 1, 2, 3, 3),
        "stack": (0, 1, 2, 3, 0, 1),
        "middle": (0, 1, 1, 2, 2, 3),
        "overlap": (0, 1, 2, 1, 2, 3),
        "top": (0, 1, 2, 3, 2, 3),
    }
    solar = (*range(24), *range(8, 32))
    assert list_known(32, 48)["overlap"] == solar and write_map(solar) == "0-23,8-31"
    # Doubling: some are the same map.
    assert list(list_known(2, 4)) == ["replicate", "nearest", "stack"]
    assert "overlap" not in list_known(2, 5) and list_known(1, 3) == {"replicate": (0, 0, 0)}


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
def test_a_step_keeps_every_layer_and_is_a_map_that_depth_takes(source, more, seed):
    target = source + more
    draw = np.random.default_rng(seed)
    model = MODEL.change(layer=source)
    for index in list_known(source, target).values():
        for _ in range(3):
            index = draw_step(index, draw)
            assert len(index) == target and set(index) == set(range(source))
            planned = plan_depth(model, write_map(index)).maps["layer"].index
            assert tuple(planned.tolist()) == index


def weigh_places(index) -> float:
    """A loss that is low where low layers come last."""
    return float(sum(place * layer for place, layer in enumerate(index)))


def test_the_search_finds_better_maps_within_its_budget(place):
    source = open_source(str(place / "model"))
    found = search_maps(source, weigh_places, 7, 60, seed=1)
    known = [each for each in found.scored if "step" not in each.origin]
    assert len(found.scored) == 60 and len({each.index for each in found.scored}) == 60
    assert found.best.loss < min(each.loss for each in known)
    assert found.best.origin.endswith("steps") and found.own == 14
    again = search_maps(source, weigh_places, 7, 60, seed=1)
    assert again.scored == found.scored
    assert search_maps(source, weigh_places, 7, 60, seed=2).scored != found.scored
    few = search_maps(source, weigh_places, 7, 2)
    assert [each.origin for each in few.scored] == ["replicate", "nearest"]
    assert found.without == [8.0, 8.0, 7.0, 5.0]


def test_a_loss_that_is_no_number_is_the_worst(place):
    source = open_source(str(place / "model"))
    broken = search_maps(source, lambda m: np.nan if len(m) == 6 and m[1] else 1.0, 6, 4)
    assert broken.best.loss == 1.0 and np.isnan(broken.ranked[-1].loss)
    with pytest.raises(GrowkitError, match="itself is nan"):
        search_maps(source, lambda index: np.nan, 6, 4)


# Refusals


def refused(capsys, arguments: list[str], code: int, *said: str) -> None:
    """The command fails with this code and one sentence."""
    assert run(["search", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("growkit: ") and len(err.splitlines()) == 1, err
    assert all(words in err for words in said), err


@pytest.mark.parametrize(
    "words,said",
    {
        "--layers 3": "--layers 3 is not above the source's 4, and growkit only adds layers; the",
        "--layers 4": "the least is 5",
        "--layers 5000": "--layers 5000 is too many; growkit makes at most 4096",
        "--layers six": "--layers is a whole number above 0",
        "--layers 6 --candidates 0": "--candidates must be at least 1, got 0",
        "--layers 6 --seed -1": "--seed must be at least 0, got -1",
        "--layers 6 --windows 0": "--windows must be at least 1, got 0",
        "--layers 6 --context 33": "--context must lie between 1 and the model's 32, got 33",
        "--layers 6 --tokens short.txt": "short.txt has 2 tokens, too few for one window of 32; "
        "the largest --context that works is 1",
        "--layers 6 --tokens none.txt": "none.txt",
        "--layers 6 --tokens other": "other has the token 272, and the vocabulary of ",
    }.items(),
)
def test_what_cannot_be_searched_is_refused(words, said, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("ab")
    (tmp_path / "other").mkdir()
    with TokenWriter(tmp_path / "other", 400) as writer:
        writer.add(np.arange(200, 400))
    given_words = words.split()
    given_words += [] if "--tokens" in words else ["--tokens", str(place / "ids")]
    refused(capsys, [str(place / "model"), *given_words], 2, said)


def test_models_that_cannot_be_searched_are_refused(place, tmp_path, capsys):
    texts = ["--layers", "6", "--tokens", str(place / "text.txt")]
    config = {"model_type": "phi", "num_hidden_layers": 2, "hidden_size": 32}
    config |= {"num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 96}
    other = save_directory(tmp_path / "phi", read_config(config))
    said = "is a 'phi' model, which growkit grows but does not train"
    refused(capsys, [str(other), *texts], 2, said, "'llama'", "'gpt2'")
    bare = save_directory(tmp_path / "bare", MODEL)
    refused(capsys, [str(bare), *texts], 1, "the tokenizer.json of ", "is not a tokenizer")
    (bare / "tokenizer.json").unlink()
    refused(capsys, [str(bare), *texts], 1, "carries no tokenizer.json", "or give token files")
    small = save_directory(tmp_path / "small", MODEL.change(vocab=200))
    (small / "tokenizer.json").write_text(tokenizer())
    refused(capsys, [str(small), *texts], 1, "the text has the token", "ends at 199")
    listed = save_directory(tmp_path / "listed", MODEL, some_list=[1, 2, 3, 4])
    ids = ["--layers", "6", "--tokens", str(place / "ids")]
    refused(capsys, [str(listed), *ids], 2, "some_list in config.json has 4 entries")


# Texts


def test_windows_of_a_text():
    ids = np.arange(10, dtype=np.int32)
    assert cut_windows(Sample("", ids), 3, 9).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert cut_windows(Sample("", ids), 3, 2).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert cut_windows(Sample("", ids, 77), 5, 9).tolist() == [
        [77, 0, 1, 2, 3, 4],
        [77, 5, 6, 7, 8, 9],
    ]
    assert cut_windows(Sample("", ids[:3]), 3, 9).shape == (0, 4)


def test_documents_are_apart_and_texts_begin_as_the_tokenizer_says(tmp_path):
    content = json.loads(tokenizer())
    rows = [json.dumps({"text": words}) for words in ("ab", "", "cd")]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    stated = json.dumps({"eos_token": "<|endoftext|>"}).encode()

    def read(content, count=9, **files):
        files = {"tokenizer.json": json.dumps(content).encode(), **files}
        return Reader(files, "the model", 272).read(str(tmp_path / "texts.jsonl"), count)

    plain = read(content)
    apart = read(content, **{"tokenizer_config.json": stated})
    assert apart.ids.tolist() == [*plain.ids[:2], 0, *plain.ids[2:]] and plain.begin is None
    assert read(content, 3).ids.tolist() == plain.ids[:3].tolist()
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, piece],
        "pair": [begin, piece],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    begun = read(content)
    assert begun.begin == 0 and begun.ids.tolist() == plain.ids.tolist()
