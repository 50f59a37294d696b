"""Model directories are data from strangers: what is read of them, carried along, and shown."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct

import pytest
from conftest import BESIDE, save_checkpoint, save_directory

from growkit.checkpoint.carried import is_carried_name
from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.cli.terminal import clean
from growkit.errors import GrowkitError
from growkit.models import read_config
from growkit.models.layer_fields import follow_layers


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_directory(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def depth(source: str = "model", out: str = "out") -> list[str]:
    return ["depth", "--map", "3:4", source, out]


def refused(capsys, words: list[str], *said: str) -> None:
    assert run(words) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and all(each in err for each in said), err


def names(path) -> set[str]:
    return {each.name for each in path.iterdir()} - {"config.json", "lineage.json", "README.md"}


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "qwen.tiktoken",
        "generation_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "LICENSE",
        "LICENSE.md",
        "NOTICE.txt",
        "USE_POLICY.md",
        "README.md",
    ],
)
def test_kinds_that_are_carried(name):
    assert is_carried_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "config.json",
        "pre_processor_config.json.py",
        "lineage.json",
        "modeling_x.py",
        "vectors.npy",
        "trainer_state.json",
        "training_args.bin",
        "notes.txt",
        ".bashrc",
        "../tokenizer.json",
        "a/tokenizer.json",
        "LICENSE.py",
        "tokenizer.json.pkl",
        "README.sh",
        "",
        "model.safetensors.index.json",
    ],
)
def test_kinds_that_are_not(name):
    assert not is_carried_name(name)


def test_links_that_leave_the_directory_are_left_behind_and_said(place, capsys):
    (place / "secret.key").write_text("SECRET")
    for name, target in (
        ("LICENSE.txt", place / "secret.key"),
        ("merges.txt", "/proc/self/environ"),
        ("vocab.txt", "/dev/zero"),
    ):
        (place / "model" / name).symlink_to(target)
    (place / "model" / "NOTICE").symlink_to("LICENSE")
    os.mkfifo(place / "model" / "vocab.json")
    assert run(depth()) == 0
    out = capsys.readouterr().out
    assert "LICENSE.txt is left behind" in out and "vocab.json is left behind" in out
    assert names(place / "out") == {*BESIDE, "NOTICE", "model.safetensors"}


def test_a_snapshot_of_the_hubs_cache_is_known(place, capsys):
    repository = place / "hub" / "models--a--b"
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in (place / "model").iterdir():
        shutil.copy(file, repository / "blobs" / f"blob-{file.name}")
        link = repository / "snapshots" / "c0ffee" / file.name
        link.symlink_to(f"../../blobs/blob-{file.name}")
    snapshot = "hub/models--a--b/snapshots/c0ffee"
    assert run(depth(snapshot)) == 0
    assert names(place / "out") == {*BESIDE, "model.safetensors"}
    assert run(["export", snapshot, "share"]) == 0
    entry = json.loads((place / "share" / "lineage.json").read_text())[-1]
    assert entry["source"]["path"] == "a/b@c0ffee"
    # Another repository's blobs are none of it.
    other = place / "hub" / "models--a--c" / "snapshots" / "1"
    other.mkdir(parents=True)
    for file in (place / "model").iterdir():
        (other / file.name).symlink_to(repository / "blobs" / f"blob-{file.name}")
    refused(capsys, depth(str(other), "other"), "outside the directory")


@pytest.mark.parametrize("shard", ["../aside.safetensors", "/{place}/aside.safetensors", "link"])
def test_an_index_stays_in_its_directory(place, capsys, shard):
    shutil.move(place / "model" / "model.safetensors", place / "aside.safetensors")
    (place / "model" / "link").symlink_to(place / "aside.safetensors")
    weight_map = {"gpt_neox.embed_in.weight": shard.format(place=place)}
    index = place / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(capsys, depth(), "aside.safetensors", "outside the directory")


@pytest.mark.parametrize("name", ["model.safetensors", "lineage.json"])
def test_pipes_are_no_files(place, capsys, name):
    (place / "model" / name).unlink(missing_ok=True)
    os.mkfifo(place / "model" / name)
    refused(capsys, depth(), name, "it is a pipe, not a plain file")


@pytest.mark.parametrize(
    "name", ["meta/metadata", "files/metadata", "state/mu.embed_in.weight/0.0"]
)
def test_pipes_in_a_checkpoint(place, capsys, name):
    save_checkpoint(place / "ck")
    (place / "ck" / name).unlink()
    os.mkfifo(place / "ck" / name)
    refused(capsys, depth("ck"), name, "it is a pipe")


def test_code_and_pickles_do_not_pass(place, capsys):
    config = place / "model" / "config.json"
    stated = json.loads(config.read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}
    config.write_text(json.dumps(stated))
    (place / "model" / "evil.py").write_text("print()")
    (place / "model" / "vocab.txt").write_bytes(pickle.dumps([1]))
    (place / "model" / "tokenizer.model").write_bytes(b"PK\x03\x04")
    settings = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "model_max_length": 7}
    (place / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert run(depth()) == 0
    out = capsys.readouterr().out
    assert "auto_map of config.json left out" in out and "evil.py" in out
    assert run(["import", "out", "ck"]) == 0 and run(["export", "ck", "share"]) == 0
    for path in (place / "out", place / "share"):
        kept = {*BESIDE, "tokenizer_config.json", "model.safetensors"}
        assert names(path) - {"generation_config.json"} == kept
        assert "auto_map" not in json.loads((path / "config.json").read_text())
        assert json.loads((path / "tokenizer_config.json").read_text()) == {"model_max_length": 7}


def test_files_of_a_checkpoint_replace_nothing(place):
    save_checkpoint(place / "ck")
    files = place / "ck" / "files" / "metadata"
    strange = ("model.safetensors", "config.json", "lineage.json", ".bashrc", "pytorch_model.bin")
    strange += ("model.safetensors.index.json", "evil.py")
    stored = json.loads(files.read_text()) | {name: {"text": "x"} for name in strange}
    files.write_text(json.dumps(stored))
    assert run(["export", "ck", "out"]) == 0 and run(["diff", "ck", "out"]) == 1
    assert names(place / "out") == {*BESIDE, "model.safetensors", "generation_config.json"}
    assert open_source("out").config["model_type"] == "gpt_neox"


def rewrite(path, change) -> None:
    """Change the header of a safetensors file; `change` gives the new header's text."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    text = change(json.loads(raw[8 : 8 + size])).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


FIRST, LAST = (f"gpt_neox.layers.{layer}.attention.dense.weight" for layer in (0, 1))


def overlap(header):
    header[LAST]["data_offsets"] = header[FIRST]["data_offsets"]
    return json.dumps(header)


def twice(header):
    return f'{json.dumps(header)[:-1]}, "{FIRST}": {json.dumps(header[LAST])}}}'


def gap(header):
    for entry in header.values():
        entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    return json.dumps(header)


def true(header):
    header["x"] = {"dtype": "F32", "shape": [True, 0], "data_offsets": [0, 0]}
    return json.dumps(header)


def metadata(header):
    return json.dumps({"__metadata__": {"step": 3}} | header)


@pytest.mark.parametrize("change", [overlap, twice, gap, true, metadata])
def test_headers_that_the_safetensors_library_refuses(place, capsys, change):
    safetensors = pytest.importorskip("safetensors")
    path = place / "model" / "model.safetensors"
    rewrite(path, change)
    if change is gap:
        path.write_bytes(path.read_bytes() + bytes(8))
    with pytest.raises(Exception):  # noqa: B017 (the library's own class has moved)
        safetensors.safe_open(path, "np")
    refused(capsys, depth(), "model.safetensors")


def test_bytes_after_the_last_tensor(place, capsys):
    with open(place / "model" / "model.safetensors", "ab") as file:
        file.write(b"X" * 1000)
    refused(capsys, depth(), "no tensor covers the last 1000 bytes")


@pytest.mark.parametrize("layers", [10**6, 10**9, 10**30])
@pytest.mark.parametrize("kind", ["directory", "checkpoint"])
def test_a_number_of_layers_is_no_loop(place, capsys, layers, kind):
    if kind == "directory":
        path = place / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
        refused(capsys, depth(), f"num_hidden_layers = {layers:,}", "the files hold 40 tensors")
        return
    path = save_checkpoint(place / "ck") / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["config"]["num_hidden_layers"] = layers
    path.write_text(json.dumps(meta))
    refused(capsys, depth("ck"), f"num_hidden_layers = {layers:,}", "the files hold 40 tensors")


@pytest.mark.parametrize(
    "record,said",
    [
        ([1], "record must be an object"),
        ("text", "record must be an object"),
        ({"count": 2**40}, "count must be a whole number"),
        ({"step": "7"}, "step must be a whole number"),
        ({"tokens": "x"}, "tokens must be a whole number from 0"),
        ({"tokens": -1}, "tokens must be a whole number from 0"),
        ({"flops": float("inf")}, "flops must be a finite number"),
        ({"reduction": [1]}, "reduction must be a finite number"),
        ({"stream": 5}, "stream must be an object"),
        ({"validation_loss": "3"}, "validation_loss must be a number"),
    ],
)
def test_a_record_that_is_none(place, capsys, record, said):
    path = save_checkpoint(place / "ck") / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"record": record}))
    refused(capsys, depth("ck"), f"metadata holds no position: {said}")


@pytest.mark.parametrize("shape", [[2] * 20_000, [2] * 200_000, [1] * 70 + [8, 8]])
def test_more_dimensions_than_arrays_have(place, capsys, shape):
    def change(header):
        header[FIRST]["shape"] = shape
        return json.dumps(header)

    rewrite(place / "model" / "model.safetensors", change)
    refused(capsys, ["inspect", "model"], f"garbled safetensors header at the tensor '{FIRST}'")


@pytest.mark.parametrize("name", ["loop.txt", "tokenizer.json", "LICENSE", "optimizer.pt"])
def test_a_link_to_itself_is_left_behind(place, name):
    (place / "model" / name).unlink(missing_ok=True)
    (place / "model" / name).symlink_to(name)
    assert run(depth()) == 0
    assert name not in names(place / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "lineage.json"])
def test_a_link_to_itself_in_the_place_of_what_is_needed(place, capsys, name):
    (place / "model" / name).unlink(missing_ok=True)
    (place / "model" / name).symlink_to(name)
    refused(capsys, depth(), f"{name} is not read", "symbolic links")


def test_an_output_that_leads_to_itself(place, capsys):
    (place / "out").symlink_to("out")
    for words in (["--force"], []):
        assert run([*depth(), *words]) == 2
    assert run(depth(out="out/below")) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "field,value", [("initializer_range", float("inf")), ("layer_norm_eps", float("nan"))]
)
def test_numbers_of_a_configuration_are_finite(place, capsys, field, value):
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    refused(capsys, depth(), f"{field} must be a finite number")


def test_numbers_that_growth_does_not_know_are_kept_and_said(place, capsys):
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"limit": [0.0, float("inf")]}))
    assert run(depth()) == 0
    assert "limit of config.json: NaN or infinity, kept as it is" in capsys.readouterr().out
    assert open_source("out").config["limit"] == [0.0, float("inf")]


def test_a_flag_of_a_configuration_is_no_text(place, capsys):
    path = place / "model" / "config.json"
    changed = json.loads(path.read_text()) | {"tie_word_embeddings": "false"}
    path.write_text(json.dumps(changed))
    refused(capsys, depth(), "tie_word_embeddings must be true or false, got 'false'")


@pytest.mark.parametrize(
    "change",
    [
        {"method": 1.5},
        {"sizes": {"before": "x", "after": {}}},
        {"sizes": {"before": {}, "after": {"layer": 4}}},
        {"noise": "x"},
        {"seed": None},
        {"source": {"path": 5}},
        {"operation": "\ud800"},
    ],
)
def test_an_entry_of_other_kinds_is_shown_and_carried(place, change):
    assert run(depth()) == 0
    path = place / "out" / "lineage.json"
    lineage = json.loads(path.read_text())
    lineage[-1] |= change
    path.write_text(json.dumps(lineage))
    assert run(["inspect", "out"]) == 0
    assert run(["import", "out", "ck"]) == 0 and run(["export", "ck", "again"]) == 0


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 2471645608\n"


def test_pointers_of_git_lfs(place, capsys):
    (place / "model" / "tokenizer.json").write_text(POINTER)
    assert run(depth()) == 0
    assert "Git LFS pointer" in capsys.readouterr().out
    assert "tokenizer.json" not in names(place / "out")
    (place / "model" / "model.safetensors").write_text(POINTER)
    refused(capsys, depth(out="other"), "model.safetensors is a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("name", ["optimizer.bin", "global_step500/"])
def test_what_belongs_to_another_training_stays_and_its_optimizer_is_named(place, capsys, name):
    for each in ("trainer_state.json", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (place / "model" / each).write_text("{}")
    if name.endswith("/"):
        (place / "model" / name).mkdir()
    else:
        (place / "model" / name).write_text("x")
    assert run(depth()) == 0
    out = capsys.readouterr().out
    name = name.rstrip("/")
    assert f"{name} holds an optimizer's state of another trainer" in out
    assert f"optimizer   {name} in the source, which growkit does not read yet" in out
    assert names(place / "out") == {*BESIDE, "model.safetensors"}
    assert run(["import", "model", "ck"]) == 0
    assert name in capsys.readouterr().out and names(place / "ck")


def test_words_from_a_models_files_are_shown_harmless(place, capsys):
    lineage = [{"operation": "\x1b]0;owned\x07\x1b[2J\u202e\ud800"}] * 300
    (place / "model" / "lineage.json").write_text(json.dumps(lineage))
    assert run(["inspect", "model"]) == 0
    out = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07\\x1b[2J\\u202e\\ud800" in out and "\x1b" not in out
    assert "200 earlier entries" in out and "lineage 300 " in out
    config = place / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "x" * 10**6}))
    assert run(["inspect", "model"]) == 1
    err = capsys.readouterr().err
    assert len(err) < 2500 and "characters more" in err


def test_plain_text_is_shown_as_it_is():
    assert clean("a\tb\nü → 日本 😀") == "a\tb\nü → 日本 😀"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_pointers_in_the_place_of_json(place, capsys, name):
    if name != "config.json":
        (place / "model" / "model.safetensors").rename(place / "model" / "a.safetensors")
    (place / "model" / name).write_text(POINTER)
    refused(capsys, depth(), f"{name} is a Git LFS pointer")


def test_a_pointer_in_the_place_of_an_array(place, capsys):
    chunk = save_checkpoint(place / "ck") / "state" / "mu.embed_in.weight" / "0.0"
    chunk.write_text(POINTER)
    refused(capsys, depth("ck"), "mu.embed_in.weight/0.0 is a Git LFS pointer")


@pytest.mark.parametrize("dtype", ["|O", "|S4", "<M8[s]", "9" * 5000, "f4,f4", "float128"])
def test_arrays_of_no_numbers(place, capsys, dtype):
    header = save_checkpoint(place / "ck") / "state" / "mu.embed_in.weight" / ".zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"dtype": dtype}))
    refused(capsys, depth("ck"), "not one of growkit's trainer")


@pytest.mark.parametrize(
    "change",
    [
        {"pads": {"embed": 10**12}},
        {"maps": {"layer": {"index": [0] * 10**6, "share": [1.0] * 10**6}}},
        {"maps": {"layer": {"index": [10**30] * 4, "share": [1.0] * 4}}},
        {"maps": {"layer": {"index": [7] * 4, "share": [1.0] * 4}}},
    ],
)
def test_a_plan_in_a_lineage_is_no_loop(place, capsys, change):
    assert run(depth()) == 0
    path = place / "out" / "lineage.json"
    lineage = json.loads(path.read_text())
    lineage[-1] |= change
    path.write_text(json.dumps(lineage))
    capsys.readouterr()
    refused(capsys, ["verify", "model", "out"], "out", "plan")


@pytest.mark.parametrize("chunks", [[1 << 31, 32], [1 << 40, 32], [96, 64]])
def test_chunks_that_no_memory_holds_are_refused_before_they_are_read(place, capsys, chunks):
    header = save_checkpoint(place / "ck") / "state" / "mu.embed_in.weight" / ".zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"chunks": chunks}))
    refused(capsys, depth("ck"), "'mu.embed_in.weight'", "its chunks of", "the shape [96, 32]")


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("gpt_neox", "rotary_pct", 1e308),
        ("gpt_neox", "rope_parameters", {"partial_rotary_factor": -0.5}),
        ("gemma3_text", "rope_parameters", 3),
        ("gemma3_text", "rope_scaling", "x"),
        ("gemma3_text", "rope_parameters", {"full_attention": 3}),
        ("gemma2", "rope_scaling", True),
        ("gemma2", "rope_theta", []),
        ("gemma2", "sliding_window", "x"),
        ("gemma2", "num_hidden_layers", 10**30),
        ("qwen3", "num_hidden_layers", 10**9),
    ],
)
def test_a_configuration_of_another_kind_is_refused_at_once(kind, field, value):
    with pytest.raises(GrowkitError, match=r"^config\.json holds a value of the wrong kind"):
        read_config({"model_type": kind, field: value})


@pytest.mark.parametrize("value", [float("inf"), {"a": 1}, "3", -1, True])
def test_a_count_of_leading_layers_is_a_whole_number(value):
    config = {"model_type": "deepseek_v3", "first_k_dense_replace": value}
    family = read_config({"model_type": "deepseek_v3"}).family
    with pytest.raises(GrowkitError, match="first_k_dense_replace in config.json must be a whole"):
        follow_layers(config, config, family, [0, 0, 1])
