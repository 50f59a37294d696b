"""Files on disk, to the bit: others read growkit's, growkit reads others'; outputs are atomic."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import (
    BESIDE,
    SMALL,
    contents_of,
    random_tensors,
    save_checkpoint,
    save_directory,
    save_tensors,
    save_transformers_model,
)

from growkit.checkpoint import orbax
from growkit.checkpoint.huggingface import INDEX, read_header
from growkit.checkpoint.location import open_source, write_output
from growkit.checkpoint.lock import describe_self
from growkit.checkpoint.output import MARK, commit_output
from growkit.checkpoint.tensor import Contents, copy_tensor
from growkit.cli import run
from growkit.errors import GrowkitError, UsageError
from growkit.growth.depth import plan_depth
from growkit.models.gpt_neox import GPT_NEOX
from growkit.surgery.grow import prepare_growth

DTYPES = ["float32", "float64", "float16", "bfloat16"]


def same_tensors(source, tensors, slot="params") -> bool:
    """Whether a slot holds exactly these arrays: names, dtypes and bytes."""
    found = {name: tensor.read() for name, tensor in source.tensors[slot].items()}
    return found.keys() == tensors.keys() and all(
        found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()
        for name, array in tensors.items()
    )


def copied(source, config=None) -> Contents:
    """The contents of an output that is the source again."""
    recipes = {
        slot: {name: copy_tensor(tensor) for name, tensor in tensors.items()}
        for slot, tensors in source.tensors.items()
    }
    return Contents(config or source.config, recipes, [], source.record, source.files)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_directory_goes_through_bit_for_bit(tmp_path, dtype):
    source = open_source(str(save_directory(tmp_path / "hf", dtype=dtype)))
    tensors = random_tensors(SMALL, dtype)
    assert same_tensors(source, tensors) and source.dtype == tensors["embed_out.weight"].dtype
    write_output(tmp_path / "out", "huggingface", copied(source), [source])
    again = open_source(str(tmp_path / "out"))
    assert same_tensors(again, tensors)
    assert again.config == source.config
    tensors["embed_out.weight"].view(np.uint8)[0, 0] ^= 1
    assert not same_tensors(again, tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_are_read_by_safetensors_and_transformers(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors")
    source = open_source(str(save_directory(tmp_path / "hf", dtype=dtype)))
    write_output(tmp_path / "out", "huggingface", copied(source), [source], shard=12_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files == sorted(
        file.name for file in (tmp_path / "out").glob("*.safetensors")
    )
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == source.size
    wanted = random_tensors(SMALL, dtype)
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / "out" / file, "pt") as shard:
            assert torch.equal(
                shard.get_tensor(name).double(), torch.from_numpy(wanted[name].astype(np.float64))
            )
            assert str(shard.get_tensor(name).dtype) == f"torch.{dtype}"
    network, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert str(network.dtype) == f"torch.{dtype}"
    weight = network.gpt_neox.layers[2].mlp.dense_4h_to_h.weight.detach().double().numpy()
    assert np.array_equal(
        weight, wanted["gpt_neox.layers.2.mlp.dense_4h_to_h.weight"].astype(np.float64)
    )
    assert same_tensors(open_source(str(tmp_path / "out")), wanted)


def test_shards_that_transformers_wrote_are_read(tmp_path):
    source = open_source(str(save_transformers_model(tmp_path / "one", SMALL)))
    transformers = pytest.importorskip("transformers")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    network.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / INDEX).exists()
    tensors = {name: tensor.read() for name, tensor in source.tensors["params"].items()}
    assert same_tensors(open_source(str(tmp_path / "many")), tensors)


def test_buffers_of_old_checkpoints_are_passed_over(tmp_path):
    buffers = {}
    for layer in range(SMALL.layer):
        prefix = f"gpt_neox.layers.{layer}.attention."
        buffers[prefix + "bias"] = np.tril(np.ones((1, 1, 32, 32), bool))
        buffers[prefix + "masked_bias"] = np.array(-1e9, np.float32)
        buffers[prefix + "rotary_emb.inv_freq"] = np.ones(1, np.float32)
    path = save_directory(tmp_path / "hf")
    save_tensors(path / "model.safetensors", random_tensors(SMALL) | buffers)
    assert same_tensors(open_source(str(path)), random_tensors(SMALL))
    save_tensors(
        path / "model.safetensors",
        random_tensors(SMALL) | {"gpt_neox.layers.0.attention.mask": np.ones(1)},
    )
    with pytest.raises(
        GrowkitError, match=r"covers the parameter 'gpt_neox.layers.0.attention.mask'"
    ):
        open_source(str(path))


def test_a_tied_model_with_a_stray_head(tmp_path):
    tied = SMALL.change(tied=True)
    path = save_directory(tmp_path / "hf", tied)
    tensors = random_tensors(tied)
    save_tensors(
        path / "model.safetensors",
        tensors | {"embed_out.weight": tensors["gpt_neox.embed_in.weight"]},
    )
    assert same_tensors(open_source(str(path)), tensors)
    assert run(["depth", "--map", "3:4", str(path), str(tmp_path / "out")]) == 0
    assert "embed_out.weight" not in read_header(tmp_path / "out" / "model.safetensors")


def test_the_whole_file_is_read_before_an_index_as_transformers_does(tmp_path):
    path = save_directory(tmp_path / "hf")
    save_tensors(path / "model.fp16.safetensors", random_tensors(SMALL, "float16"))
    (path / INDEX).write_text(json.dumps({"weight_map": {"x": "model.fp16.safetensors"}}))
    assert same_tensors(open_source(str(path)), random_tensors(SMALL))
    (path / INDEX).unlink()
    (path / "model.safetensors").rename(path / "other.safetensors")
    with pytest.raises(
        GrowkitError, match="'embed_out.weight' twice, the second time in other.safetensors"
    ):
        open_source(str(path))


def rewrite_header(path: Path, change) -> None:
    """Put what `change` makes of a safetensors file's header in its place: bytes, or JSON."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    changed = change(json.loads(content[8 : 8 + length]))
    text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def head(**fields):
    """A change of the head's entry; None removes a field."""

    def change(header: dict) -> dict:
        entry = header["embed_out.weight"] | fields
        stated = {key: value for key, value in entry.items() if value is not None}
        return header | {"embed_out.weight": stated}

    return change


BROKEN_HEADERS = {
    "no json": (lambda header: b"x" * 20, "garbled safetensors header: 20 bytes"),
    "nested without end": (lambda header: b"[" * 200_000, "garbled safetensors header"),
    "a list": (lambda header: [1], "not a JSON object"),
    "an entry that is none": (
        lambda header: {"w": 3},
        "garbled safetensors header at the tensor 'w'",
    ),
    "no offsets": (head(data_offsets=None), "at the tensor 'embed_out.weight'"),
    "offsets as text": (head(data_offsets=["a", "b"]), "at the tensor 'embed_out.weight'"),
    "negative shape": (head(shape=[-96, -32]), "at the tensor 'embed_out.weight'"),
    "offsets too short": (
        head(data_offsets=[0, 8]),
        r"\[96, 32\] and dtype F32 takes 12288 bytes, .* says 8",
    ),
    "offsets past the end": (
        head(data_offsets=[10**9, 10**9 + 12288]),
        "cut off: the tensor 'embed_out.weight'",
    ),
    "unknown dtype": (
        head(dtype="C64"),
        "has dtype C64, and growkit reads F64, F32, F16, BF16",
    ),
    "a dtype that is none": (head(dtype=["F32"]), r"has dtype \['F32'\], and growkit reads"),
    "a parameter of integers": (head(dtype="I32"), "'embed_out.weight' has dtype I32"),
    "wrong shape": (
        head(shape=[32, 96]),
        r"contradicts the parameter 'embed_out.weight'.*\[32, 96\].*\[96, 32\]",
    ),
}


@pytest.mark.parametrize("broken", BROKEN_HEADERS)
def test_headers_that_do_not_add_up(tmp_path, broken):
    change, said = BROKEN_HEADERS[broken]
    path = save_directory(tmp_path / "hf")
    rewrite_header(path / "model.safetensors", change)
    with pytest.raises(GrowkitError, match=said) as refusal:
        open_source(str(path))
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1])
def test_files_cut_off_anywhere(tmp_path, length):
    path = save_directory(tmp_path / "hf")
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(
        GrowkitError, match=r"model\.safetensors is (cut off|not a safetensors file or is cut off)"
    ):
        open_source(str(path))


@pytest.mark.parametrize(
    "index,said",
    [
        ("[]", "has no weight_map"),
        ('{"weight_map": {"a": 5}}', "has no weight_map"),
        ("{", "is not valid JSON"),
        (
            '{"weight_map": {"a": "b.safetensors"}}',
            "names the shard 'b.safetensors', which is not there",
        ),
        (
            '{"weight_map": {"a": "other.safetensors"}}',
            "names the tensor 'a', which no shard holds",
        ),
    ],
)
def test_indices_that_do_not_fit(tmp_path, index, said):
    path = save_directory(tmp_path / "hf")
    (path / "model.safetensors").rename(path / "other.safetensors")
    (path / INDEX).write_text(index)
    with pytest.raises(GrowkitError, match=said):
        open_source(str(path))


# Orbax


def tree_of(path: Path):
    """The arrays of a checkpoint's state, by stock Orbax."""
    ocp = pytest.importorskip("orbax.checkpoint")
    return ocp.PyTreeCheckpointer().restore((path / "state").resolve())


def test_stock_orbax_restores_what_is_written(tmp_path):
    path = save_checkpoint(tmp_path / "ck")
    source, tree = open_source(str(path)), tree_of(path)
    for slot in ("params", "mu", "nu"):
        wanted = source.stack(slot)
        for row in SMALL.table.rows:
            ours, theirs = wanted, tree[slot]
            for key in row.path:
                ours, theirs = ours[key], theirs[key]
            assert np.array_equal(ours, np.asarray(theirs)), row.name
    assert [int(tree[name]) for name in ("count", "step", "schedule_step")] == [70, 70, 70]
    assert same_tensors(source, random_tensors(SMALL))
    assert same_tensors(source, random_tensors(SMALL, seed=1), "mu")
    assert source.record == {"count": 70, "step": 70, "schedule_step": 70, "tokens": 9000}
    assert source.files == BESIDE


def save_with_orbax(path: Path, plain: Path, **stored) -> Path:
    """The checkpoint at `plain`, written by stock Orbax. stored: options of its tree handler."""
    import orbax.checkpoint as ocp

    items = {"state": ocp.args.PyTreeSave(tree_of(plain))}
    handlers = {"state": ocp.PyTreeCheckpointHandler(**stored)}
    for item in ("meta", "files"):
        items[item] = ocp.args.JsonSave(json.loads((plain / item / "metadata").read_text()))
        handlers[item] = ocp.JsonCheckpointHandler()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        checkpointer.save(path.resolve(), ocp.args.Composite(**items))
    return path


def as_orbax_has_it(path: Path) -> dict[str, object]:
    """Every file of a checkpoint: JSON decoded, without times and the words of a commit."""

    def content(file: Path):
        if file.name == "commit_success.txt":
            return True
        if file.parent.parent.name == "state" and file.name != ".zarray":
            return file.read_bytes()
        decoded = json.loads(file.read_text())
        return {
            key: value for key, value in decoded.items() if not key.endswith("_timestamp_nsecs")
        }

    return {
        str(file.relative_to(path)): content(file) for file in path.rglob("*") if file.is_file()
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_what_stock_orbax_writes(tmp_path, dtype):
    ours = save_checkpoint(tmp_path / "ours", dtype=dtype)
    theirs = save_with_orbax(tmp_path / "theirs", ours, use_ocdbt=False, use_compression=False)
    written, wanted = as_orbax_has_it(ours), as_orbax_has_it(theirs)
    # Orbax writes these markers from 0.12 on; before, only in buckets.
    markers = {
        name for name in written.keys() - wanted.keys() if name.endswith("commit_success.txt")
    }
    assert {name: value for name, value in written.items() if name not in markers} == wanted


BENT = {
    "an array's header": ("describe_array", lambda made: made | {"order": "F"}),
    "the tree": ("describe_tree", lambda made: made | {"use_zarr3": True}),
    "a chunk's name": ("name_chunk", lambda made: f"c/{made}".replace("/", "")),
}


@pytest.mark.parametrize("bent", BENT)
def test_a_checkpoint_written_otherwise_is_told_from_orbaxs(tmp_path, monkeypatch, bent):
    theirs = save_with_orbax(
        tmp_path / "theirs",
        save_checkpoint(tmp_path / "ours"),
        use_ocdbt=False,
        use_compression=False,
    )
    name, change = BENT[bent]
    right = getattr(orbax, name)
    monkeypatch.setattr(orbax, name, lambda *given: change(right(*given)))
    assert as_orbax_has_it(save_checkpoint(tmp_path / "bent")) != as_orbax_has_it(theirs)


def test_a_checkpoint_is_grown_without_jax_and_orbax(tmp_path, checkpoint):
    code = (
        "import sys; from growkit.cli import run; assert run(sys.argv[1:]) == 0; "
        "print(*sys.modules, file=sys.stderr)"
    )
    words = ["depth", "--map", "3:4", str(checkpoint), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "numpy" in loaded and not loaded & {
        "jax",
        "orbax",
        "tensorstore",
        "torch",
        "transformers",
        "matplotlib",
    }


def save_as_others_do(path: Path, how: str) -> Path:
    """The checkpoint of `save_checkpoint`, stored otherwise."""
    import tensorstore

    plain = save_checkpoint(path.parent / "plain")
    if how == "in chunks":
        plain.rename(path)
        for header in path.glob("state/*/.zarray"):
            array = tree_leaf(header.parent)
            chunks = [max(1, -(-length // 2)) for length in array.shape]
            for file in header.parent.iterdir():
                file.unlink()
            spec = {
                "driver": "zarr",
                "kvstore": f"file://{header.parent}/",
                "metadata": {"chunks": chunks},
            }
            tensorstore.open(
                spec, create=True, dtype=array.dtype, shape=array.shape
            ).result().write(array).result()
        return path
    return save_with_orbax(path, plain, use_ocdbt=how != "compressed", use_zarr3=how == "zarr3")


def tree_leaf(directory: Path) -> np.ndarray:
    header = json.loads((directory / ".zarray").read_text())
    file = next(file for file in directory.iterdir() if file.name != ".zarray")
    raw = file.read_bytes()
    if header["compressor"]:
        import tensorstore

        return (
            tensorstore.open({"driver": "zarr", "kvstore": f"file://{directory}/"})
            .result()
            .read()
            .result()
        )
    return np.frombuffer(raw, header["dtype"]).reshape(header["shape"])


@pytest.mark.parametrize("how", ["compressed", "ocdbt", "zarr3", "in chunks"])
def test_checkpoints_stored_otherwise_hold_the_same(tmp_path, how):
    path = save_as_others_do(tmp_path / "ck", how)
    source = open_source(str(path))
    assert not any(tensor.span for tensor in source.tensors["mu"].values())
    assert same_tensors(source, random_tensors(SMALL))
    assert same_tensors(source, random_tensors(SMALL, seed=1), "mu")
    assert source.record["count"] == 70 and source.files == BESIDE
    assert run(["depth", "--map", "3:4", str(path), str(tmp_path / "out")]) == 0
    plain = next(iter(tmp_path.glob("plain")), None) or save_checkpoint(tmp_path / "plain")
    assert run(["depth", "--map", "3:4", str(plain), str(tmp_path / "expected")]) == 0
    ours, theirs = (open_source(str(tmp_path / name)) for name in ("out", "expected"))
    for slot in ("params", "mu", "nu"):
        assert same_tensors(
            ours, {name: tensor.read() for name, tensor in theirs.tensors[slot].items()}, slot
        )


def test_a_layer_of_a_chunked_array_is_read_alone(tmp_path):
    path = save_as_others_do(tmp_path / "ck", "in chunks")
    # The second half of the layers is damaged: a layer of the first half does not notice.
    name = "params.layers.mlp.dense_4h_to_h.bias"
    for chunk in (path / "state" / name).glob("1.*"):
        chunk.write_bytes(b"damaged")
    source = open_source(str(path))
    tensors = source.tensors["params"]
    wanted = random_tensors(SMALL)["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"]
    assert np.array_equal(tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"].read(), wanted)
    with pytest.raises(GrowkitError, match="cannot read an array of the checkpoint"):
        tensors["gpt_neox.layers.2.mlp.dense_4h_to_h.bias"].read()


def test_moments_of_zero_are_read(tmp_path):
    """Zarr may leave out a chunk that holds the fill value only."""
    ocp = pytest.importorskip("orbax.checkpoint")
    path = save_checkpoint(tmp_path / "ck")
    tree = tree_of(path)
    tree["mu"], tree["count"] = jax_zeros(tree["mu"]), np.zeros((), np.int32)
    for use_ocdbt, name in ((False, "raw"), (True, "ocdbt")):
        out = save_checkpoint(tmp_path / name)
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_compression=use_ocdbt)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save((out / "state").resolve(), args=ocp.args.PyTreeSave(tree), force=True)
        source = open_source(str(out))
        assert source.record["count"] == 0
        assert not any(tensor.read().any() for tensor in source.tensors["mu"].values())
        assert same_tensors(source, random_tensors(SMALL))


def jax_zeros(tree):
    import jax

    return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), tree)


BROKEN_CHECKPOINTS = {
    "array cut off": (
        "state/params.embed_in.weight/0.0",
        lambda content: content[:-4],
        r"0\.0 is cut off: an array of \[96, 32\] float32 takes 12288 bytes, the file has 12284",
    ),
    "array header": (
        "state/mu.embed_in.weight/.zarray",
        lambda content: b"{}",
        "not one of growkit's trainer",
    ),
    "tree": ("state/_METADATA", lambda content: b"[]", "not one of growkit's trainer"),
    "tree cut off": (
        "state/_METADATA",
        lambda content: content[:50],
        "_METADATA is not valid JSON",
    ),
    "meta": ("meta/metadata", lambda content: b"[1]", "not one of growkit's trainer"),
    "config": (
        "meta/metadata",
        lambda content: content.replace(b'"hidden_size": 32', b'"hidden_size": 33'),
        "hidden_size must be a multiple of num_attention_heads, got 33 and 4",
    ),
    "layers": (
        "meta/metadata",
        lambda content: content.replace(b'"num_hidden_layers": 3', b'"num_hidden_layers": 2'),
        "belongs to layer 2, but the configuration says num_hidden_layers = 2",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("shared") / "ck")


@pytest.mark.parametrize("broken", BROKEN_CHECKPOINTS)
def test_checkpoints_that_are_broken(tmp_path, checkpoint, broken):
    name, change, said = BROKEN_CHECKPOINTS[broken]
    path = copy_directory(checkpoint, tmp_path / "ck")
    content = (path / name).read_bytes()
    assert change(content) != content
    (path / name).write_bytes(change(content))
    with pytest.raises(GrowkitError, match=said):
        open_source(str(path))


def copy_directory(source: Path, out: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, out))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", "a/b", ""])
def test_a_carried_file_stays_in_its_directory(tmp_path, checkpoint, name):
    path = copy_directory(checkpoint, tmp_path / "in" / "ck")
    (path / "files" / "metadata").write_text(json.dumps({name: {"text": "x"}}))
    before = contents_of(tmp_path)
    assert run(["export", str(path), str(tmp_path / "in" / "out")]) == 1
    assert contents_of(tmp_path) == before


def test_layers_of_two_dtypes_are_refused_as_one_array_and_go_on_as_files(tmp_path, capsys):
    tensors = random_tensors(SMALL)
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    path = save_directory(tmp_path / "hf")
    save_tensors(path / "model.safetensors", tensors)
    assert run(["import", str(path), str(tmp_path / "ck")]) == 1
    assert "dtypes bfloat16 and float32" in capsys.readouterr().err
    assert not (tmp_path / "ck").exists()
    source = open_source(str(path))
    assert source.stack()["layers"]["mlp"]["dense_4h_to_h"]["bias"].dtype == np.float32
    assert run(["depth", "--map", "3:4", str(path), str(tmp_path / "out")]) == 0
    assert run(["export", str(path), str(tmp_path / "copy")]) == 0
    assert same_tensors(open_source(str(tmp_path / "copy")), tensors)


# Outputs: whole, or not there


def test_a_failing_body_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), commit_output(tmp_path / "a" / "b" / "out") as new:
        new.mkdir()
        (new / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_force_keeps_the_old_output_when_the_new_one_fails(tmp_path):
    out = save_directory(tmp_path / "out")
    before = contents_of(tmp_path)
    with pytest.raises(ZeroDivisionError), commit_output(out, force=True) as new:
        new.mkdir()
        raise ZeroDivisionError
    with pytest.raises(GrowkitError, match="No such file"), commit_output(out, force=True):
        pass  # makes nothing, so that the second rename fails
    assert contents_of(tmp_path) == before
    with commit_output(out, force=True) as new:
        new.mkdir()
    assert contents_of(tmp_path) == {}


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    with (
        pytest.raises(UsageError, match="the output exists"),
        commit_output(tmp_path / "out") as new,
    ):
        new.mkdir()
        save_directory(tmp_path / "out")
    assert open_source(str(tmp_path / "out")).model == SMALL
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    save_directory(tmp_path / ".out.partial" / "old")
    save_directory(tmp_path / ".out.partial" / "new", seed=1)
    (tmp_path / ".out.partial" / MARK).write_text(describe_self())
    with pytest.raises(UsageError, match="the output exists"), commit_output(tmp_path / "out"):
        pass
    assert same_tensors(open_source(str(tmp_path / "out")), random_tensors(SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_at_once_are_refused(tmp_path):
    with commit_output(tmp_path / "out") as new:
        with (
            pytest.raises(UsageError, match="another process is writing this output"),
            commit_output(tmp_path / "out"),
        ):
            pass
        new.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


SLOWLY = """
import sys, time
from contextlib import contextmanager
import growkit.cli.terminal as terminal
from growkit.cli import run

@contextmanager
def slow(what, total):
    def advance(done):
        print("writing", flush=True)
        time.sleep(0.2)
    yield advance

terminal.show_progress = slow
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "number,code", [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_killed_command_leaves_no_output(tmp_path, number, code):
    path = save_directory(tmp_path / "hf")
    before = contents_of(tmp_path)
    command = ["depth", "--map", "3:4", str(path), str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.stdout.readline() != "writing\n":
            assert process.poll() is None
        process.send_signal(number)
        process.stdout.read()
        said = process.stderr.read()
    assert process.returncode == code
    assert not (tmp_path / "out").exists()
    if number != signal.SIGKILL:
        assert contents_of(tmp_path) == before and len(said.strip().splitlines()) == 1, said
        return
    assert (tmp_path / ".out.partial").exists()
    assert run(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    assert open_source(str(tmp_path / "out")).model.layer == 4


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path):
    path = save_directory(tmp_path / "hf")
    source = open_source(str(path))
    os.utime(path / "model.safetensors", (1, 1))
    with pytest.raises(GrowkitError, match="the source changed while it was being read"):
        write_output(
            tmp_path / "out",
            "huggingface",
            prepare_growth(source, plan_depth(source.model, "3:4")),
            [source],
        )
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_no_verb_writes_to_its_source(tmp_path, checkpoint):
    hf = save_directory(tmp_path / "hf")
    ck = copy_directory(checkpoint, tmp_path / "ck")
    before = {path: (contents_of(path), stamps(path)) for path in (hf, ck)}
    commands = [
        ["depth", "--map", "3:4", str(hf)],
        ["depth", "--map", "3:4", str(ck)],
        ["import", str(hf)],
        ["export", str(ck)],
        ["export", str(hf), "--dtype", "float16"],
    ]
    for number, words in enumerate(commands):
        assert run([*words, str(tmp_path / f"out{number}")]) == 0
    assert run(["inspect", str(hf)]) == run(["inspect", str(ck)]) == 0
    assert {path: (contents_of(path), stamps(path)) for path in (hf, ck)} == before


def stamps(path: Path) -> list[tuple[str, int]]:
    return sorted((str(file), file.stat().st_mtime_ns) for file in [path, *path.rglob("*")])


def test_modes_follow_the_umask(tmp_path, checkpoint):
    hf = save_directory(tmp_path / "hf")
    old = os.umask(0o027)
    try:
        for name, source in (("out", hf), ("ck", checkpoint)):
            assert run(["depth", "--map", "3:4", str(source), str(tmp_path / name)]) == 0
    finally:
        os.umask(old)
    for name in ("out", "ck"):
        for path in [tmp_path / name, *(tmp_path / name).rglob("*")]:
            assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


MEASURED = """
import re, sys
from growkit.checkpoint.location import open_source
from growkit.cli import run

def peak():
    # Not getrusage: its peak is inherited from the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024

small, large, out, *words = sys.argv[1:]
assert run([*words, small, out + "small"]) == 0
began = peak()
assert run([*words, large, out]) == 0
assert run(["verify", large, out]) == 0 and run(["diff", out, out]) == 0
grown = peak()
open_source(large).stack()
print(began, grown, peak(), file=sys.stderr)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc"
)
@pytest.mark.parametrize(
    "words", [["depth", "--map", "3:4"], ["width", "--embed", "2x"], ["width", "--embed", "1536"]]
)
def test_growth_takes_little_memory(tmp_path, words):
    model = SMALL.change(embed=1024, head=8, mlp=4096, vocab=30000, context=32)
    large = save_directory(tmp_path / "large", SMALL.change(vocab=8))
    tensors = {
        name: np.broadcast_to(np.float32(0), row.shape(model.sizes))
        for name, row, _ in model.table.names(model.sizes)
    }
    write_sparse(large / "model.safetensors", tensors)
    config = json.loads((large / "config.json").read_text())
    sizes = {
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "intermediate_size": 4096,
        "vocab_size": 30000,
    }
    (large / "config.json").write_text(json.dumps(config | sizes))
    megabytes = model.parameters * 4 // 10**6
    assert megabytes > 300
    small = save_directory(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(small), str(large), str(tmp_path / "out"), *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    began, after, whole = map(int, done.stderr.split())
    assert after < began + 100
    # The measure would see a model held in memory.
    assert whole > began + 250


def write_sparse(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file whose zeros take no place on disk."""
    header, offset = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": array.shape,
            "data_offsets": [offset, offset + array.size * 4],
        }
        offset += array.size * 4
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def test_the_fields_a_configuration_may_leave_out_are_transformers_defaults():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig().to_dict()
    rope = config["rope_parameters"]
    known = config | {
        "rotary_pct": rope["partial_rotary_factor"],
        "rotary_emb_base": rope["rope_theta"],
    }
    defaults = GPT_NEOX.defaults
    assert {field: known[field] for field in defaults} == defaults
