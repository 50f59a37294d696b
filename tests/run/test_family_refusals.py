"""What the verbs of training refuse of a family, and of its rotary positions and grouped heads: one
sentence, the right exit code, and no run begun.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import pytest
from conftest import save_checkpoint, save_directory
from test_training_refusals import token_directory

from growkit.cli import run
from growkit.models import list_trained, read_config
from growkit.models.llama import LLAMA
from trainer.config.model import build_architecture, build_section, check_context

sys.path.append(str(Path(__file__).parents[1] / "devices"))
from test_sharding import make_devices  # noqa: E402

PHI = {
    "model_type": "phi",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 64,
    "max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 8}
GROUPED = LLAMA.model(layer=2, embed=32, kv=2, group=4, head_dim=4, mlp=32, vocab=64, context=32)
SECTION = (
    "model={kind: llama, layer: 2, embed: 32, head: 8, kv: 2, mlp: 32, vocab: 64, context: 16}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and tokens of 64 ids."""
    root = tmp_path_factory.mktemp("place")
    phi = read_config(PHI)
    save_directory(root / "phi", phi)
    save_checkpoint(root / "phi-ck", phi)
    save_directory(root / "llama", GROUPED)
    config = GROUPED.config() | {"rope_parameters": YARN}
    save_directory(root / "yarn", read_config(config))
    positions = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16}
    save_directory(root / "gpt2", read_config(positions | {"vocab_size": 64}))
    token_directory(root / "ids")
    return root


@pytest.fixture
def refused(capsys, tmp_path, place, monkeypatch):
    """Check that a command ends with this code and one line of these words, and begins no run."""
    monkeypatch.chdir(place)

    def check(words, code, *fragments):
        assert run([*words.split(";"), *find_out(words, tmp_path)]) == code
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and err.startswith("growkit: "), err
        assert all(fragment in err for fragment in fragments), err
        assert not (tmp_path / "run").exists()

    return check


def find_out(words, tmp_path):
    """The arguments that name the output of a verb that has one."""
    named = {"train": ["--out"], "study": ["--out"], "import": [], "export": []}
    verb = words.split(";")[0]
    return [*named[verb], str(tmp_path / "run")] if verb in named else []


VERBS = {
    "train;recipe;--from;phi;data.train=ids": 2,
    "train;recipe;--from;phi-ck;data.train=ids": 2,
    "import;phi": 2,
    "export;phi-ck": 2,
    "generate;phi;--prompt;a": 2,
    "search;phi;--layers;3;--tokens;ids": 2,
}


@pytest.mark.parametrize("words", VERBS)
def test_a_family_that_grows_but_is_not_trained_is_named(words, refused):
    known = ", ".join(repr(kind) for kind in list_trained())
    said = "is a 'phi' model, which growkit grows but does not train: training, import, export, "
    refused(words, VERBS[words], said, f"generate and search take {known}")


def test_a_checkpoint_of_it_is_not_evaluated(refused):
    pytest.importorskip("lm_eval", reason="growkit[eval] is not installed")
    refused("evaluate;phi-ck", 2, "is a 'phi' model, which growkit grows but does not train")


def test_it_grows_all_the_same(place, tmp_path):
    """The sibling: what is refused is the training alone."""
    assert run(["depth", "--map", "2:3", str(place / "phi"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("verb", ["train;tiny", "plan;tiny;--topology;cpu", "study;study.json"])
def test_a_model_section_of_it_is_refused(verb, refused, place):
    study = {"sources": {"half": {"share": 0.2, "model": {"layer": 1}}}}
    study["arms"] = {"grown": {"from": "half", "grow": {"map": "1:2"}}}
    section = {"kind": "phi", "layer": 2}
    (place / "study.json").write_text(json.dumps({"model": section, "study": study}))
    words = verb if "study" in verb else f"{verb};model.kind=phi"
    known = ", ".join(list_trained())
    refused(words, 2, f"model.kind 'phi' is no family that the trainer trains: {known}")


def test_a_sequence_longer_than_rotary_scaling_allows(refused, place):
    words = "train;recipe;--from;yarn;data.train=ids;model.context="
    said = "model.context 33 is longer than the rotary scaling of yarn allows: 4 x 8 tokens, so at"
    refused(f"{words}33", 2, said, "most 32")
    model = build_architecture(
        build_section(read_config(json.loads((place / "yarn" / "config.json").read_text())))
    )
    check_context(model, 32, "yarn")
    check_context(GROUPED, 33, "llama")
    said = "gpt2 learned 16 positions one by one, so model.context stays 16, got 17"
    refused("train;recipe;--from;gpt2;data.train=ids;model.context=17", 2, said)


@pytest.mark.parametrize("begin", [f"train;recipe;{SECTION}", "train;recipe;--from;llama"])
def test_a_grouped_count_that_does_not_divide_the_mesh(begin, refused, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *given: make_devices())
    words = "kv 2 does not divide over mesh.tensor = 4; it may be 1 or 2"
    refused(f"{begin};data.train=ids;mesh.tensor=4", 2, words)
    # The sibling: 2 divides, and the next thing is refused.
    words = "batch.sequences / batch.accumulation = 3 sequences do not divide"
    more = "mesh.tensor=2;batch.sequences=3;batch.accumulation=1"
    refused(f"{begin};data.train=ids;{more}", 2, words)


def test_growth_on_the_way_to_a_count_that_does_not_divide(refused, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *given: make_devices())
    words = f"train;recipe;{SECTION};data.train=ids;mesh.tensor=2;grow.at=2;grow.mlp=33"
    refused(words, 2, "mlp 33 does not divide over mesh.tensor = 2; it may be 1, 3, 11 or 33")
