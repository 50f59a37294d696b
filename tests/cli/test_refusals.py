"""Bad input gets one sentence that names what is wrong, an exit code, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, contents_of, save_checkpoint, save_directory

from growkit.checkpoint.location import open_source
from growkit.cli import run

TWELVE = SMALL.change(layer=12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("shared") / "ck", TWELVE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory to stand in, with a model of 12 layers in it."""
    monkeypatch.chdir(tmp_path)
    save_directory(tmp_path / "model", TWELVE)
    return tmp_path


def tree(place: Path) -> tuple[dict[str, bytes], list[str]]:
    return contents_of(place), sorted(str(path) for path in place.rglob("*"))


def refused(capsys, place: Path, arguments: list[str], code: int, *said: str) -> None:
    """The command fails with this code and one sentence, and changes nothing on disk."""
    before = tree(place)
    assert run(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("growkit: ") and len(err.splitlines()) == 1, err
    assert all(words in err for words in said), err
    assert tree(place) == before


def depth(source="model", out="out", layers="12:16") -> list[str]:
    return ["depth", "--map", layers, source, out]


WIDTH = ["width", "--mlp", "2x", "model", "out"]
VERBS = {
    "depth": depth(),
    "width": WIDTH,
    "import": ["import", "model", "out"],
    "export": ["export", "model", "out"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_good_input_is_not_refused(place, verb):
    """The sibling of all that follows: the same arguments, unbroken, succeed."""
    assert run(VERBS[verb]) == 0
    assert open_source("out").model.layer in (12, 16)


# What is not a source


@pytest.mark.parametrize("verb", VERBS)
def test_no_such_directory(place, capsys, verb):
    arguments = [word.replace("model", "./modle") for word in VERBS[verb]]
    refused(
        capsys, place, arguments, 2, "there is no such directory: ./modle", "did you mean 'model'?"
    )


@pytest.mark.parametrize(
    "source,said",
    [
        ("/nowhere/at/all", "there is no such directory: /nowhere/at/all"),
        ("~nobody_of_that_name/model", "there is no such directory"),
        ("", "the source is an empty name"),
        (
            "model/config.json",
            "model/config.json is a file; name the directory that holds the model",
        ),
        ("model/nothing", "there is no such directory: model/nothing"),
        ("model@best", "there is no such directory: model@best; did you mean 'model'?"),
    ],
)
def test_names_that_are_no_directory(place, capsys, source, said):
    refused(capsys, place, depth(source), 2, said)


def test_a_directory_that_is_no_model(place, capsys):
    (place / "empty").mkdir()
    refused(
        capsys,
        place,
        depth("empty"),
        1,
        "empty is not a model",
        "config.json",
        "_CHECKPOINT_METADATA",
    )
    (place / "run" / "checkpoints").mkdir(parents=True)
    refused(capsys, place, depth("run"), 1, "the run run has no finished checkpoint yet")
    (place / "empty" / "config.json").write_text("{}")
    refused(capsys, place, depth("empty"), 1, "has a config.json but no .safetensors file")
    (place / "empty" / "tf_model.h5").write_text("")
    refused(
        capsys,
        place,
        depth("empty"),
        1,
        "it has tf_model.h5: save it from transformers as safetensors",
    )


def test_token_files_are_no_model(place, capsys):
    (place / "tokens").mkdir()
    (place / "tokens" / "tokens.idx").touch()
    said = "tokens holds token files and no model; a run trains on them by data.train=tokens"
    refused(capsys, place, ["inspect", "tokens"], 1, said)


def write_config_field(place: Path, **fields) -> None:
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "fields,said",
    [
        (
            {"model_type": "t5"},
            ["model: the architecture is 't5'", "growkit knows 'gpt_neox', 'llama'"],
        ),
        ({"num_hidden_layers": 11}, ["'gpt_neox.layers.11.", "num_hidden_layers = 11"]),
        (
            {"num_hidden_layers": 13},
            ["'gpt_neox.layers.12.", "is missing", "num_hidden_layers = 13"],
        ),
        (
            {"vocab_size": 97},
            ["'gpt_neox.embed_in.weight'", "[96, 32]", "vocab_size = 97", "[97, 32]"],
        ),
        ({"hidden_size": 64}, ["contradicts the parameter", "hidden_size = 64"]),
        ({"intermediate_size": 65}, ["dense_h_to_4h.", "intermediate_size = 65", "[65"]),
        ({"num_attention_heads": 5}, ["got 32 and 5", "30 and 35"]),
        ({"hidden_size": "32"}, ["hidden_size must be a whole number, got '32'"]),
        ({"tie_word_embeddings": "yes", "rotary_emb_base": []}, ["wrong kind"]),
    ],
)
def test_configurations_that_contradict(place, capsys, verb, fields, said):
    if "rotary_emb_base" in fields:
        fields = fields | {"rope_parameters": None}
    write_config_field(place, **fields)
    refused(capsys, place, VERBS[verb], 1, *said)


@pytest.mark.parametrize(
    "change,said",
    [
        (
            lambda content: content[:1000],
            ["model.safetensors is not a safetensors file or is cut off", "1000"],
        ),
        (lambda content: content[:-100], ["model.safetensors is cut off: the tensor"]),
        (lambda content: b"", ["model.safetensors", "the file has 0"]),
        (
            lambda content: b"\x10" + bytes(7) + b"garbage " * 9,
            ["garbled safetensors header: 16 bytes"],
        ),
        (lambda content: b"<html>not found</html>" * 9, ["not a safetensors file or is cut off"]),
    ],
)
@pytest.mark.parametrize("verb", VERBS)
def test_weights_that_are_broken(place, capsys, verb, change, said):
    path = place / "model" / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    refused(capsys, place, VERBS[verb], 1, *said)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01", '{"a":' * 5000])
def test_configurations_that_are_no_json(place, capsys, content):
    (place / "model" / "config.json").write_text(content)
    refused(capsys, place, depth(), 1, "config.json is not")


def test_a_lineage_that_is_none(place, capsys):
    (place / "model" / "lineage.json").write_text('{"a": 1}')
    refused(capsys, place, depth(), 1, "the lineage is not a list")


@pytest.mark.parametrize(
    "layers,said",
    [
        ("24:18", ["24:18", "goes from 24 layers to 18", "12:13"]),
        ("18:24", ["18:24", "a model of 18 layers", "the source has 12", "12:16"]),
        ("16:12", ["did you mean 12:16?"]),
        ("18", ["SOURCE:TARGET", "'18'"]),
        ("a:b", ["SOURCE:TARGET", "'a:b'"]),
        ("12:", ["SOURCE:TARGET", "'12:'"]),
        ("-12:16", ["-12:16", "the source has 12"]),
        ("12:-16", ["12:-16", "growkit only adds layers"]),
        ("12:999999999999", ["12:999999999999", "at most 4096"]),
        ("0-12", ["names layer 12", "0 to 11"]),
        ("0,1,2", ["lists 3", "the source has 12", "0-11"]),
        ("5-3,0-11", ["'5-3'", "write 3-5"]),
    ],
)
@pytest.mark.parametrize("kind", ["directory", "checkpoint"])
def test_maps_that_cannot_be(place, capsys, checkpoint, kind, layers, said):
    source = "model" if kind == "directory" else str(checkpoint)
    refused(capsys, place, depth(source, layers=layers), 2, *said)


# What is not an output


@pytest.mark.parametrize("verb", VERBS)
def test_an_output_that_exists(place, capsys, verb):
    save_directory(place / "out")
    refused(capsys, place, VERBS[verb], 2, "the output exists: out", "--force")
    assert run([*VERBS[verb], "--force"]) == 0
    assert open_source("out").model.layer in (12, 16)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("out", ["model", "./model/", "link", "other/../model"])
def test_an_output_that_is_the_source(place, capsys, verb, force, out):
    (place / "link").symlink_to("model")
    (place / "other").mkdir()
    refused(
        capsys, place, [*VERBS[verb][:-1], out, *force], 2, f"the output is the source: {Path(out)}"
    )


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("out", ["model/out", "link/a/out", ".", "deep"])
def test_an_output_within_the_source_or_around_it(place, capsys, verb, force, out):
    (place / "link").symlink_to("model")
    save_directory(place / "deep" / "model", TWELVE)
    source = "deep/model" if out == "deep" else "model"
    arguments = [word.replace("model", source) for word in VERBS[verb][:-1]]
    refused(
        capsys,
        place,
        [*arguments, out, *force],
        2,
        f"the output {out} and the source",
        "within the other",
    )


def test_an_output_that_holds_what_the_source_links_to(place, capsys):
    # As in the Hub's cache.
    links = place / "models--a--b" / "snapshots" / "c0ffee"
    links.mkdir(parents=True)
    blobs = shutil.copytree(place / "model", place / "models--a--b" / "blobs")
    for name in ("config.json", "model.safetensors"):
        (links / name).symlink_to(blobs / name)
    source = str(links.relative_to(place))
    refused(
        capsys,
        place,
        [*depth(source, "models--a--b/blobs"), "--force"],
        2,
        "output models--a--b/blobs and the source",
        "within",
    )
    assert run(depth(source)) == 0


def test_a_source_whose_weights_lie_elsewhere(place, capsys):
    (place / "links").mkdir()
    shutil.copy(place / "model" / "config.json", place / "links")
    (place / "links" / "model.safetensors").symlink_to(place / "model" / "model.safetensors")
    said = ("links/model.safetensors is not read", "outside the directory", "put the file itself")
    refused(capsys, place, depth("links"), 1, *said)


@pytest.mark.parametrize("out", ["file", "full", "link", "dangling"])
def test_force_replaces_only_what_is_a_model_or_empty(place, capsys, out):
    (place / "file").write_text("mine")
    (place / "full").mkdir()
    (place / "full" / "letter.txt").write_text("mine")
    save_directory(place / "aside")
    (place / "link").symlink_to("aside")
    (place / "dangling").symlink_to("nowhere")
    refused(capsys, place, depth(out=out), 2, f"the output exists: {out}")
    said = "neither empty nor a model" if out == "full" else "--force replaces directories only"
    refused(capsys, place, [*depth(out=out), "--force"], 2, said, out)
    (place / "empty").mkdir()
    assert run([*depth(out="empty"), "--force"]) == 0


def test_an_output_below_a_file(place, capsys):
    refused(capsys, place, depth(out="model/config.json/out"), 2, "within the other")
    (place / "file").write_text("")
    refused_after_plan(
        capsys, place, depth(out="file/a/out"), "cannot write file/a/out: Not a directory"
    )


# What the machine refuses


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk(place, capsys, verb, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = tree(place)
    assert run(VERBS[verb]) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and err.startswith("growkit: cannot write "), err
    assert "No space left on device" in err and "MB are free; nothing is left behind" in err
    assert tree(place) == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_is_really_full(place, capsys, verb):
    small = place / "small"
    small.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if not mount or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        assert run([*VERBS[verb][:-1], "small/out"]) == 1
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "No space left on device" in err, err
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("verb", VERBS)
def test_a_target_that_may_not_be_written(place, capsys, verb, monkeypatch):
    mkdir = os.mkdir

    def forbidden(path, *arguments, **options):
        if str(path).endswith(".partial"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return mkdir(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", forbidden)
    refused_after_plan(
        capsys, place, [*VERBS[verb][:-1], "new/out"], "cannot write new/out: Permission denied"
    )


def refused_after_plan(capsys, place, arguments, *said):
    """As `refused`, for what is found out only after the plan was printed."""
    before = tree(place)
    assert run(arguments) == 1
    err = capsys.readouterr().err
    assert (
        err.startswith("growkit: ")
        and len(err.splitlines()) == 1
        and all(words in err for words in said)
    ), err
    assert tree(place) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(place, capsys):
    (place / "locked").mkdir(mode=0o500)
    refused_after_plan(
        capsys, place, depth(out="locked/out"), "cannot write locked/out: Permission denied"
    )


def test_a_hub_id_without_network(place, capsys, monkeypatch):
    import huggingface_hub

    def unreachable(name, revision=None, **_):
        assert (name, revision) == ("EleutherAI/pythia-14m", "main")
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    said = (
        "there is no directory 'EleutherAI/pythia-14m'",
        "Hugging Face Hub (ConnectionError: no route)",
    )
    refused(capsys, place, depth("EleutherAI/pythia-14m@main"), 1, *said)


def test_a_hub_id_is_downloaded_and_never_written_to(place, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: str(place / "model")
    )
    before = contents_of(place / "model")
    assert run(depth("someone/model")) == 0
    assert open_source("out").model.layer == 16 and contents_of(place / "model") == before


# The command line itself


def process(place: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "growkit", *arguments]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | variables
    return subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True)


def test_real_processes(place):
    before = tree(place)
    for arguments, code, said in (
        (depth("modle"), 2, "did you mean 'model'?"),
        (depth(layers="12:8"), 2, "12:8"),
        (depth("no-one/of-this-name"), 1, "could not be had from the Hugging Face Hub"),
    ):
        done = process(place, *arguments, HF_HUB_OFFLINE="1", HF_HOME=str(place.parent / "hub"))
        assert done.returncode == code and done.stdout == ""
        assert (
            done.stderr.startswith("growkit: ")
            and len(done.stderr.splitlines()) == 1
            and said in done.stderr
        )
    assert tree(place) == before
    done = process(place, *depth())
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["dept"], "there is no verb 'dept'; did you mean 'depth'?"),
        (["zzzzz"], "there is no verb 'zzzzz'"),
        (["depth", "--frce", "--map", "12:16", "model", "out"], "--frce"),
        (["depth", "model", "out"], "--map"),
        (["depth", "--map", "12:16", "model"], "OUT"),
        (["depth", "--map", "12:16", "model", "out", "more"], "more"),
        (["export", "model", "out", "--dtype"], "--dtype"),
    ],
)
def test_usage(place, capsys, arguments, said):
    before = tree(place)
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and "Traceback" not in err
    assert tree(place) == before


@pytest.mark.parametrize(
    "options,said",
    [
        (
            ["--dtype", "bf16"],
            ["--dtype is one of float64, float32, float16, bfloat16, got 'bf16'"],
        ),
        (["--dtype", "int8"], ["--dtype is one of", "got 'int8'"]),
        (["--max-shard-size", "5 apples"], ["--max-shard-size is a number", "got '5 apples'"]),
        (["--max-shard-size", "0"], ["got '0'"]),
        (["--max-shard-size", "-1GB"], ["got '-1GB'"]),
    ],
)
def test_options_of_export(place, capsys, options, said):
    refused(capsys, place, ["export", "model", "out", *options], 2, *said)


def test_import_of_a_checkpoint(place, capsys, checkpoint):
    said = "is a trainer checkpoint already; import takes a Hugging Face directory"
    refused(capsys, place, ["import", str(checkpoint), "out"], 2, said)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_json_is_one_document(place, capsys, dry):
    assert run([*depth(), "--json", *dry]) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert err == "" and plan["maps"]["layer"]["index"] == [layer * 12 // 16 for layer in range(16)]
    assert plan["dry_run"] == bool(dry) and (place / "out").exists() == (not dry)
    assert plan["parameters"]["before"] == TWELVE.parameters < plan["parameters"]["after"]
    assert run(["inspect", "model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["layer"] == 12


def test_a_dry_run_writes_nothing_and_refuses_the_same(place, capsys):
    before = tree(place)
    assert run([*depth(out="new/out"), "--dry-run"]) == 0
    assert "12 -> 16" in capsys.readouterr().out and tree(place) == before
    save_directory(place / "out")
    refused(capsys, place, [*depth(), "--dry-run"], 2, "the output exists: out")
    refused(capsys, place, [*depth(layers="12:8"), "--dry-run"], 2, "12:8")
