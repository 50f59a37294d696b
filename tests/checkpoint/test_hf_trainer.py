"""Checkpoints of transformers' Trainer: read and written without torch, and what is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from conftest import BESIDE, SMALL, contents_of
from trained import ADAM, STEPS, in_groups, load_state, make_state, save_trained

from growkit.checkpoint import fill, torch_zip
from growkit.checkpoint import optimizer as optimizer_module
from growkit.checkpoint.location import open_source
from growkit.checkpoint.torch_pickle import KNOWN, Foreign, read_pickle, write_pickle
from growkit.cli import run
from growkit.errors import GrowkitError

torch = pytest.importorskip("torch")
TRAINING = ("scheduler.pt", "trainer_state.json", "rng_state.pth", "training_args.bin")
DEEPER = SMALL.change(layer=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save_trained(tmp_path_factory.mktemp("trained") / "checkpoint-20")


def depth(source, out, *more):
    return ["depth", "--map", "3:4", str(source), str(out), *more]


def by_name(state, groups):
    """name -> entry of a state dict."""
    names = [name for group in groups for name in group]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    return dict(zip(names, (state["state"][number] for number in numbers), strict=True))


def old_name(name):
    """The parameter of 3 layers that one of 4 layers copies."""
    words = name.split(".")
    if "layers" in words:
        place = words.index("layers") + 1
        words[place] = str(int(words[place]) * 3 // 4)
    return ".".join(words)


def test_it_is_opened_with_its_moments(trained):
    source = open_source(str(trained))
    assert source.kind == "hf_trainer" and list(source.tensors) == ["params", "mu", "nu"]
    # The trainer's update after 19 others takes the rate of step 20, as transformers' next one.
    assert source.record == {"step": 20, "schedule_step": 19, "count": 20}
    entries = by_name(load_state(trained), in_groups(SMALL))
    for name, entry in entries.items():
        assert np.array_equal(source.tensors["mu"][name].read(), entry["exp_avg"].numpy())
        assert np.array_equal(source.tensors["nu"][name].read(), entry["exp_avg_sq"].numpy())
    assert set(source.files) == {*BESIDE, *TRAINING} and not source.notes


def test_inspect_names_its_kind_in_words(trained, capsys):
    assert run(["inspect", str(trained)]) == 0
    assert f"{trained} (checkpoint of transformers' Trainer)" in capsys.readouterr().out


def test_depth_writes_what_torch_reads(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(depth(trained, out)) == 0
    said = capsys.readouterr().out
    assert "checkpoint of transformers' Trainer" in said and "count kept (20)" in said
    old = by_name(load_state(trained), in_groups(SMALL))
    state = load_state(out)
    for name, entry in by_name(state, in_groups(DEEPER)).items():
        source = old[old_name(name)]
        assert list(entry) == ["step", "exp_avg", "exp_avg_sq"] and entry["step"] == STEPS
        assert torch.equal(entry["exp_avg_sq"], source["exp_avg_sq"])
        # Copies change the function, so mu begins again.
        assert entry["exp_avg"].shape == source["exp_avg"].shape and not entry["exp_avg"].any()
    before = load_state(trained)["param_groups"]
    for group, earlier in zip(state["param_groups"], before, strict=True):
        assert group | {"params": 0} == earlier | {"params": 0}
    for name in TRAINING:
        assert (out / name).read_bytes() == (trained / name).read_bytes()
    assert run(["verify", str(trained), str(out)]) == 0
    assert run(["diff", str(trained), str(out)]) == 1


def test_what_is_written_is_a_whole_zip_file_of_torchs_layout(trained, tmp_path):
    assert run(depth(trained, tmp_path / "out", "--moments", "copy")) == 0
    with zipfile.ZipFile(tmp_path / "out" / "optimizer.pt") as ours:
        assert ours.testzip() is None
        names = {info.filename for info in ours.infolist()}
        found = torch_zip.open_torch_file(tmp_path / "out" / "optimizer.pt")
        assert all(span.offset % 64 == 0 for span in found.members.values())
    with zipfile.ZipFile(trained / "optimizer.pt") as theirs:
        fixed = {info.filename for info in theirs.infolist() if "/data/" not in info.filename}
    assert fixed - names == {"optimizer/.data/serialization_id"}
    mapped = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True, mmap=True)
    assert torch.equal(mapped["state"][0]["exp_avg"], load_state(trained)["state"][0]["exp_avg"])


@pytest.mark.parametrize("moments", ["map", "reset"])
def test_large_files_have_wide_records(trained, tmp_path, monkeypatch, moments):
    monkeypatch.setattr(torch_zip, "WIDE", 1000)
    assert run(depth(trained, tmp_path / "out", "--moments", moments)) == 0
    wide = load_state(tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / "optimizer.pt") as file:
        assert file.testzip() is None
    monkeypatch.undo()
    assert run(depth(trained, tmp_path / "narrow", "--moments", moments)) == 0
    assert str(wide) == str(load_state(tmp_path / "narrow"))
    count = {float(entry["step"]) for entry in wide["state"].values()}
    assert count == {0.0 if moments == "reset" else STEPS}


def test_neither_torch_nor_transformers_is_imported(trained, tmp_path):
    code = (
        "import sys; from growkit.cli import run\n"
        f"assert run({depth(trained, tmp_path / 'out')!r}) == 0\n"
        "assert not {'torch', 'transformers', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "entries,slots",
    [
        (("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), ["mu", "nu", "nu_max"]),
        (("exp_avg",), ["mu"]),
        (("momentum_buffer",), ["mu"]),
        (("state1", "state2"), ["mu", "nu"]),
    ],
)
def test_other_optimizers_grow_by_the_same_rules(tmp_path, entries, slots, capsys):
    path = save_trained(tmp_path / "ck", entries=entries)
    assert list(open_source(str(path)).tensors) == ["params", *slots]
    assert run(["width", "--embed", "2x", str(path), str(tmp_path / "out")]) == 0
    old = by_name(load_state(path), in_groups(SMALL))
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    new = by_name(load_state(tmp_path / "out"), in_groups(SMALL))[name]
    for entry in entries:
        # It writes mlp, of which each unit is copied twice.
        factor = 0.25 if "sq" in entry or "2" in entry else 0.5
        assert torch.equal(new[entry][:64, :32], old[name][entry] * factor)
        assert torch.equal(new[entry][64:, 32:], old[name][entry] * factor)
    assert run(["verify", str(path), str(tmp_path / "out")]) == 0


def wrap(entry):
    """As newer versions of bitsandbytes do: the moments within one entry."""
    moments = {f"state{n}": entry.pop(key) for n, key in enumerate(ADAM, 1)}
    entry["__bnb_optimizer_quant_state__"] = moments


def test_moments_within_one_entry(trained, tmp_path):
    path = save_trained(tmp_path / "ck", state=change_entries(wrap))
    assert run(depth(path, tmp_path / "out", "--moments", "copy")) == 0
    assert run(depth(trained, tmp_path / "plain", "--moments", "copy")) == 0
    plain = load_state(tmp_path / "plain")["state"]
    for number, entry in load_state(tmp_path / "out")["state"].items():
        assert set(entry) == {"step", "__bnb_optimizer_quant_state__"}
        moments = entry["__bnb_optimizer_quant_state__"]
        assert torch.equal(moments["state1"], plain[number]["exp_avg"])
        assert torch.equal(moments["state2"], plain[number]["exp_avg_sq"])


def to_wrapped_eight_bits(entry):
    to_eight_bits(entry)
    inner = {key: entry.pop(key) for key in list(entry) if key != "step"}
    entry["__bnb_optimizer_quant_state__"] = inner


def test_moments_in_bfloat16_stay_so(tmp_path):
    path = save_trained(tmp_path / "ck", dtype="bfloat16")
    assert open_source(str(path)).tensors["mu"]["embed_out.weight"].dtype == ml_dtypes.bfloat16
    assert run(depth(path, tmp_path / "out")) == 0
    state = load_state(tmp_path / "out")["state"]
    assert {each["exp_avg_sq"].dtype for each in state.values()} == {torch.bfloat16}


def test_steps_may_be_plain_numbers_and_rates_tensors(tmp_path):
    state = make_state()
    for entry in state["state"].values():
        entry["step"] = STEPS
    for group in state["param_groups"]:
        group["lr"] = torch.tensor(1e-3)
    path = save_trained(tmp_path / "ck", state=state)
    assert open_source(str(path)).record["count"] == STEPS
    assert run(["width", "--embed", "2x", "--groups", "split", str(path), str(tmp_path / "o")]) == 0
    grown = load_state(tmp_path / "o")
    assert grown["state"][0]["step"] == STEPS
    rates = {round(float(group["lr"]), 7) for group in grown["param_groups"]}
    assert rates == {1e-3, 5e-4} and torch.is_tensor(grown["param_groups"][0]["lr"])


def test_new_tokens_have_moments(trained, tmp_path):
    assert run(["width", "--vocab", "128", str(trained), str(tmp_path / "out")]) == 0
    old = by_name(load_state(trained), in_groups(SMALL))["embed_out.weight"]
    new = by_name(load_state(tmp_path / "out"), in_groups(SMALL))["embed_out.weight"]
    assert new["exp_avg"].shape == (128, 32)
    assert torch.equal(new["exp_avg_sq"][:96], old["exp_avg_sq"])
    assert run(["verify", str(trained), str(tmp_path / "out")]) == 0


def test_an_average_keeps_the_last_ones_optimizer(trained, tmp_path):
    out = tmp_path / "mean"
    other = save_trained(tmp_path / "ck")
    assert run(["average", str(other), str(trained), "--out", str(out)]) == 0
    assert str(load_state(out)) == str(load_state(trained))
    assert open_source(str(out)).kind == "hf_trainer"


def test_damage_is_found_by_the_hashes(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(depth(trained, out)) == 0
    found = open_source(str(out))
    span = found.tensors["nu"]["embed_out.weight"].span
    with open(out / "optimizer.pt", "r+b") as file:
        file.seek(span.offset + 5)
        file.write(b"\x7f")
    with pytest.raises(GrowkitError, match=r"damaged: the bytes of 'nu.embed_out.weight'"):
        open_source(str(out)).require_whole()
    assert run(["verify", str(trained), str(out)]) == 1


def test_growth_without_room_leaves_nothing(trained, tmp_path, monkeypatch, capsys):
    """Room for the model and none for the optimizer, whose file is made last."""
    reserve = fill._reserve
    sizes = []

    def no_room(file, size):
        sizes.append(size)
        if len(sizes) == 2:
            raise OSError(28, "No space left on device")
        reserve(file, size)

    monkeypatch.setattr(fill, "_reserve", no_room)
    assert run(depth(trained, tmp_path / "out")) == 1
    assert "cannot write optimizer.pt of 0.4 MB: No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_on_the_way_leaves_nothing(trained, tmp_path, monkeypatch, capsys):
    """Where blocks cannot be reserved, the disk may be full at any write."""
    write = os.pwrite
    for last in (1, 5, 60, 130):
        count = 0

        def pwrite(file, data, offset, last=last):
            nonlocal count
            count += 1
            if count > last:
                raise OSError(28, "No space left on device")
            return write(file, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        assert run(depth(trained, tmp_path / "out")) == 1, count
        monkeypatch.setattr(os, "pwrite", write)
        assert "No space left" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["one", "named"])
def test_other_groups_that_are_known(tmp_path, layout):
    decayed, others = in_groups(SMALL)
    names = decayed + others
    groups = {
        "one": [[each for each in in_definition_order(names)]],
        # torch writes names where it was given some, and then any order will do.
        "named": [others[:3], decayed, others[3:]],
    }[layout]
    state = make_state(groups=groups)
    if layout == "named":
        for group, listed in zip(state["param_groups"], groups, strict=True):
            group["param_names"] = [each.replace("embed_out", "lm_head") for each in listed]
    path = save_trained(tmp_path / "ck", state=state)
    source = open_source(str(path))
    for name, entry in by_name(state, groups).items():
        assert np.array_equal(source.tensors["mu"][name].read(), entry["exp_avg"].numpy())


def in_definition_order(names):
    order = [name for name, _, _ in SMALL.table.names(SMALL.sizes) if "final" not in name]
    order = [name for name in order if name != "embed_out.weight"]
    return [*order, *(name for name in names if "final" in name), "embed_out.weight"]


# What is refused: one sentence, nothing written, and the model is still there for other verbs.


def refused(path, tmp_path, capsys, *said):
    capsys.readouterr()
    before = contents_of(path)
    assert run(depth(path, tmp_path / "out")) == 1
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1, err
    assert all(each in err for each in said), err
    assert "move optimizer.pt elsewhere" in err
    assert not (tmp_path / "out").exists() and contents_of(path) == before
    source = open_source(str(path))
    assert source.kind == "huggingface" and source.refusal and "mu" not in source.tensors
    assert run(["average", str(path), str(path.parent / path.name), "--out", "x"]) in (1, 2)
    assert run(["inspect", str(path)]) == 0
    # Moved elsewhere, the model grows alone.
    (path / "optimizer.pt").rename(tmp_path / "moved.pt")
    assert run(depth(path, tmp_path / "out")) == 0


def change_entries(change):
    state = make_state()
    for entry in state["state"].values():
        change(entry)
    return state


def to_adafactor(entry):
    entry["exp_avg_sq_row"] = entry.pop("exp_avg")
    entry["exp_avg_sq_col"] = entry.pop("exp_avg_sq")


def to_eight_bits(entry):
    for number, key in enumerate(ADAM, 1):
        entry[f"state{number}"] = entry.pop(key).to(torch.uint8)
        entry[f"absmax{number}"] = torch.zeros(3)
        entry[f"qmap{number}"] = torch.zeros(256)


def to_adagrad(entry):
    entry["sum"] = entry.pop("exp_avg_sq")
    del entry["exp_avg"]


def to_integers(entry):
    entry["exp_avg"] = entry["exp_avg"].to(torch.int32)


def to_strides(entry):
    if entry["exp_avg"].ndim == 2:
        entry["exp_avg"] = entry["exp_avg"].T.contiguous().T


def to_steps(entry):
    entry["step"] = torch.zeros(3)


@pytest.mark.parametrize(
    "change,said",
    [
        (to_adafactor, "Adafactor keeps sums over rows and columns"),
        (to_eight_bits, "its moments have 8 bits"),
        (to_wrapped_eight_bits, "its moments have 8 bits"),
        (to_adagrad, "an optimizer that growkit does not know, which keeps sum"),
        (to_integers, "exp_avg of parameter 0 is int32"),
        (to_strides, "has the strides"),
        (to_steps, "the step of gpt_neox.embed_in.weight is no number"),
        (dict.clear, "which keeps nothing"),
    ],
)
def test_optimizers_that_cannot_grow(tmp_path, capsys, change, said):
    path = save_trained(tmp_path / "ck", state=change_entries(change))
    refused(path, tmp_path, capsys, said)


def test_sgd_without_momentum_has_nothing_to_grow(tmp_path, capsys):
    state = make_state() | {"state": {}}
    refused(save_trained(tmp_path / "ck", state=state), tmp_path, capsys, "holds no state")


def test_the_optimizer_of_another_model(tmp_path, capsys):
    path = save_trained(tmp_path / "ck")
    torch.save(make_state(DEEPER), path / "optimizer.pt")
    refused(path, tmp_path, capsys, "the moments of 52 parameters, and the model has 40")


def test_shapes_of_another_model(tmp_path, capsys):
    path = save_trained(tmp_path / "ck")
    torch.save(make_state(SMALL.change(mlp=80)), path / "optimizer.pt")
    refused(path, tmp_path, capsys, "no known order fits")


def test_a_group_order_that_nobody_writes(tmp_path, capsys):
    decayed, others = in_groups(SMALL)
    state = make_state(groups=[decayed[:5] + others[:3], decayed[5:], others[3:]])
    refused(save_trained(tmp_path / "ck", state=state), tmp_path, capsys, "no known order fits")


def test_two_orders_that_fit_are_a_doubt(trained, monkeypatch):
    """Biases of one shape, two of them swapped."""
    one, other = (f"gpt_neox.layers.{n}.attention.dense.bias" for n in (0, 1))
    swapped = {one: other, other: one}

    def list_two(model, defined, groups):
        names = in_groups(SMALL)
        yield names
        yield [[swapped.get(name, name) for name in group] for group in names]

    monkeypatch.setattr(optimizer_module, "_list_layouts", list_two)
    assert "more than one order of parameters fits" in open_source(str(trained)).refusal


def test_a_scheduler_of_another_count_of_groups(tmp_path, capsys):
    path = save_trained(tmp_path / "ck")
    torch.save({"base_lrs": [1e-3] * 3, "last_epoch": 20}, path / "scheduler.pt")
    refused(path, tmp_path, capsys, "learning rates for 3 groups", "optimizer.pt has 2")


def test_flat_moments_of_fsdp(tmp_path, capsys):
    moments = {"exp_avg": torch.zeros(9000), "exp_avg_sq": torch.zeros(9000)}
    state = {number: {"step": torch.tensor(2.0), **moments} for number in range(3)}
    flat = {"state": state, "param_groups": [{"lr": 1e-3, "params": [0, 1, 2]}]}
    path = save_trained(tmp_path / "ck")
    torch.save(flat, path / "optimizer.pt")
    (path / "scheduler.pt").unlink()
    refused(path, tmp_path, capsys, "has flat moments", "as FSDP 1 keeps them")


def test_parameters_by_name_of_fsdp(tmp_path, capsys):
    names = [name for group in in_groups(SMALL) for name in group]
    state = make_state()
    named = {name: state["state"][number] for number, name in enumerate(names)}
    full = {"state": named, "param_groups": [{"lr": 1e-3, "params": names}]}
    path = save_trained(tmp_path / "ck")
    torch.save(full, path / "optimizer.pt")
    refused(path, tmp_path, capsys, "keys parameters by name", "rekey_optim_state_dict")


def test_a_missing_shard_of_the_model(trained, tmp_path, capsys):
    many = tmp_path / "many"
    assert run(depth(trained, many, "--max-shard-size", "60KB")) == 0
    shard = sorted(many.glob("model-*.safetensors"))[1]
    shard.unlink()
    capsys.readouterr()
    for words in (["depth", "--map", "4:5"], ["import"]):
        assert run([*words, str(many), str(tmp_path / "out")]) == 1
        err = capsys.readouterr().err
        assert f"names the shard {shard.name!r}, which is not there" in err
        assert len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


class Opener:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_of_a_pickle_is_run(tmp_path, capsys):
    trap = tmp_path / "trap"
    path = save_trained(tmp_path / "ck")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save(make_state() | {"x": Opener(trap)}, path / name)
    torch.load(path / "optimizer.pt", weights_only=False)
    trap.rmdir()
    refused(path, tmp_path, capsys, "posix.mkdir", "nothing of it was run")
    assert not trap.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"(S'true'\nios\nsystem\n.",
        b"ctorch\nload\n.",
        b"ctorch.serialization\nload\n.",
    ],
)
def test_names_that_no_state_dict_has(data):
    with pytest.raises(Foreign):
        read_pickle(data)


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"nonsense", b"\x80\x02K\x01", b"(" * 9000])
def test_bytes_that_are_no_pickle(data):
    with pytest.raises(GrowkitError, match="cannot be read"):
        read_pickle(data)


def test_a_pickle_changes_nothing_that_stays():
    """What stands for a class is one object for all pickles that are read."""
    data = b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeX\x01\x00\x00\x00xsb."
    with pytest.raises(GrowkitError, match="cannot be read"):
        read_pickle(data)
    assert KNOWN["torch", "FloatStorage"].dtype == np.float32


def test_values_that_hold_themselves_are_refused():
    own = {"a": ({"b": []},)}
    own["a"][0]["b"].append(own)
    deep = []
    for _ in range(200):
        deep = [deep]
    for value in (own, deep):
        with pytest.raises(GrowkitError, match="cannot be read"):
            read_pickle(pickle.dumps(value))
    shared = [1]
    assert read_pickle(pickle.dumps([shared] * 3)) == [[1]] * 3


def test_plain_values_survive_a_pickle():
    value = {
        "a": [1, -1, 255, 256, 1 << 40, -(1 << 70), 0.1, float("inf")],
        "b": (None, True, False, "é\n", (), [], {}),
        3: {"nested": {"deep": (1,)}},
    }
    assert read_pickle(write_pickle(value)) == value
    with pytest.raises(GrowkitError, match="a state dict holds a set"):
        write_pickle({"a": {1}})


def test_files_that_are_cut_off_or_of_another_kind(tmp_path, capsys):
    path = save_trained(tmp_path / "ck")
    whole = (path / "optimizer.pt").read_bytes()
    for number, content in enumerate((bytes(500), whole[:-100], whole[: len(whole) // 2], b"")):
        (path / "optimizer.pt").write_bytes(content)
        assert "is no file of torch.save, or is cut off" in open_source(str(path)).refusal, number
    refused(path, tmp_path, capsys, "is no file of torch.save")


def test_a_file_that_is_not_of_torch_is_left_behind_with_its_training(tmp_path, capsys):
    path = save_trained(tmp_path / "ck")
    (path / "optimizer.pt").write_bytes(b"x")
    assert run(depth(path, tmp_path / "out")) == 0
    assert "optimizer.pt is no file of torch.save: the model is taken" in capsys.readouterr().out
    assert open_source(str(tmp_path / "out")).kind == "huggingface"
    for left in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
        assert (path / left).exists() and not (tmp_path / "out" / left).exists()


def test_files_of_torch_before_1_6_grow_too(trained, tmp_path):
    path = save_trained(tmp_path / "ck")
    torch.save(load_state(path), path / "optimizer.pt", _use_new_zipfile_serialization=False)
    assert run(depth(path, tmp_path / "out")) == run(depth(trained, tmp_path / "new")) == 0
    assert str(load_state(tmp_path / "out")) == str(load_state(tmp_path / "new"))


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """The zip file with its members changed by `change(name, content)`, None to drop one."""
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            changed = change(name, content)
            if changed is not None:
                file.writestr(name, changed)


@pytest.mark.parametrize(
    "name,content,said",
    [
        ("optimizer/data/1", None, "the storage '1' of exp_avg of gpt_neox.embed_in.weight is not"),
        ("optimizer/data/1", b"1234", "has 4 bytes, and 3,072 numbers of float32 take 12,288"),
        ("optimizer/byteorder", b"big", "the other byte order"),
        ("optimizer/data.pkl", None, "not one of torch.save"),
        ("optimizer/data.pkl", b"\x80\x02}.", "no optimizer's state dict"),
    ],
)
def test_zip_files_whose_parts_do_not_fit(tmp_path, capsys, name, content, said):
    path = save_trained(tmp_path / "ck")
    change = {name: content}
    rewrite(path / "optimizer.pt", lambda member, old: change.get(member, old))
    refused(path, tmp_path, capsys, said)


def test_compressed_members_are_refused(tmp_path, capsys):
    path = save_trained(tmp_path / "ck")
    rewrite(path / "optimizer.pt", lambda name, old: old, zipfile.ZIP_DEFLATED)
    refused(path, tmp_path, capsys, "is compressed")


def test_wrong_checksums_of_a_source_are_not_passed_on(tmp_path):
    path = save_trained(tmp_path / "ck")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(make_state(), path / "optimizer.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path / "optimizer.pt") as file, pytest.raises(zipfile.BadZipFile):
        file.read("optimizer/data.pkl")
    assert run(depth(path, tmp_path / "out")) == 0
    with zipfile.ZipFile(tmp_path / "out" / "optimizer.pt") as file:
        assert file.testzip() is None


def test_a_link_that_leads_elsewhere_is_refused(tmp_path, capsys):
    path = save_trained(tmp_path / "ck")
    (path / "optimizer.pt").rename(tmp_path / "other.pt")
    (path / "optimizer.pt").symlink_to(tmp_path / "other.pt")
    (path / "rng_state.pth").unlink()
    (path / "rng_state.pth").symlink_to("/etc/hostname")
    assert "outside the directory" in open_source(str(path)).refusal
    (path / "optimizer.pt").unlink()
    (tmp_path / "other.pt").rename(path / "optimizer.pt")
    assert run(depth(path, tmp_path / "out")) == 0
    assert not (tmp_path / "out" / "rng_state.pth").exists()


# Split groups.


def split(source, out, *more):
    return ["width", "--embed", "2x", "--groups", "split", str(source), str(out), *more]


def test_split_groups_state_what_the_optimizer_needs(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(split(trained, out)) == 0
    assert "growkit.torch.param_groups(model, OUT)" in capsys.readouterr().out
    groups = load_state(out)["param_groups"]
    found = {name: group for group in groups for name in group["param_names"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == 40
    matrix = found["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"]
    assert (matrix["lr"], matrix["initial_lr"]) == (5e-4, 1e-3)
    assert (matrix["eps"], matrix["weight_decay"]) == (5e-9, 0.2)
    assert (matrix["growkit_rate"], matrix["growkit_clip"]) == (0.5, 1.0)
    embedding = found["gpt_neox.embed_in.weight"]
    assert (embedding["lr"], embedding["eps"], embedding["growkit_clip"]) == (1e-3, 5e-9, 2.0)
    assert found["gpt_neox.layers.0.mlp.dense_4h_to_h.bias"]["weight_decay"] == 0.0
    schedule = torch.load(out / "scheduler.pt", weights_only=True)
    assert schedule["base_lrs"] == [group["initial_lr"] for group in groups]
    assert len(schedule["lr_lambdas"]) == len(groups) and schedule["last_epoch"] == 20
    assert run(["verify", str(trained), str(out)]) == 0
    assert run(["inspect", str(out)]) == 0


def test_split_groups_split_again(trained, tmp_path):
    assert run(split(trained, tmp_path / "a")) == 0
    assert run(split(tmp_path / "a", tmp_path / "b")) == 0
    groups = load_state(tmp_path / "b")["param_groups"]
    assert {group["growkit_rate"] for group in groups} == {1.0, 0.25}
    kept = depth(tmp_path / "b", tmp_path / "c")
    assert run(kept) == 0
    after = load_state(tmp_path / "c")["param_groups"]
    assert [group["lr"] for group in after] == [group["lr"] for group in groups]
    assert sum(len(group["param_names"]) for group in after) == 52


def test_split_groups_tell_new_layers_from_old(trained, tmp_path):
    assert run(depth(trained, tmp_path / "out", "--groups", "split", "--method", "identity")) == 0
    groups = load_state(tmp_path / "out")["param_groups"]
    new = {name for group in groups if group["growkit_new"] for name in group["param_names"]}
    assert {name.split(".")[2] for name in new} == {"1"} and len(new) == 12
    assert {group["growkit_grown_at"] for group in groups} == {STEPS}


@pytest.mark.parametrize(
    "words,said",
    [
        (["--groups", "spilt"], "--groups is one of keep, split, got 'spilt'; did you mean"),
        (["--groups", "split", "--spread", "0.5"], "have one learning rate"),
    ],
)
def test_groups_that_cannot_be_split(trained, tmp_path, capsys, words, said):
    command = ["width", "--mlp", "2x", "--embed", "2x", str(trained), str(tmp_path / "out")]
    assert run([*command, *words]) != 0
    err = capsys.readouterr().err
    assert said.replace("have", "has") in err and not (tmp_path / "out").exists()


def test_split_is_for_what_it_is_exact_for(trained, tmp_path, capsys):
    hf = tmp_path / "hf"
    save_trained(hf)
    (hf / "optimizer.pt").unlink()
    assert run(split(hf, tmp_path / "out")) == 2
    assert "holds no optimizer.pt" in capsys.readouterr().err
    lion = save_trained(tmp_path / "lion", entries=("exp_avg",))
    assert run(split(lion, tmp_path / "out")) == 1
    assert "is for Adam and AdamW" in capsys.readouterr().err
    state = make_state()
    for group in state["param_groups"]:
        group["decoupled_weight_decay"] = False
    adam = save_trained(tmp_path / "adam", state=state)
    assert run(split(adam, tmp_path / "out")) == 1
    assert "divides AdamW's weight decay" in capsys.readouterr().err
    padded = ["width", "--head-dim", "12", "--mlp", "64", "--groups", "split"]
    assert run([*padded, str(trained), str(tmp_path / "out")]) == 2
    assert "has neither" in capsys.readouterr().err
    other = save_trained(tmp_path / "other")
    torch.save({"base_lrs": [1.0, 1.0], "_schedulers": [1, 2]}, other / "scheduler.pt")
    assert run(split(other, tmp_path / "out")) == 1
    assert "the list '_schedulers'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_step_is_read_from_what_is_there(tmp_path):
    path = save_trained(tmp_path / "ck")
    for content, step in (('{"global_step": 7}', 7), ('{"global_step": "x"}', 20), ("[]", 20)):
        (path / "trainer_state.json").write_text(content)
        assert open_source(str(path)).record["step"] == step
    (path / "trainer_state.json").write_text("{")
    assert "is not valid JSON" in open_source(str(path)).refusal


def test_equal_optimizers_are_equal(trained):
    found = open_source(str(trained)).torch_optimizer
    assert found == open_source(str(trained)).torch_optimizer
    assert found != replace(found, entries={"mu": "other"})
