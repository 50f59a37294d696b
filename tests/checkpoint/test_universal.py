"""Universal checkpoints of DeepSpeed: read, grown, and written as DeepSpeed's loader reads them.

The directories are written with torch as ds_to_universal of DeepSpeed 0.19 writes them, and read as
its load_hp_checkpoint_state does. A slow test runs DeepSpeed itself, where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import pytest
from conftest import BESIDE, SMALL, contents_of, random_tensors, save_directory
from neoxes import deepspeed_classes

from growkit.checkpoint import universal_output
from growkit.checkpoint.location import open_source
from growkit.cli import checking, run
from growkit.cli.description import is_loaded_by_transformers
from growkit.errors import GrowkitError, UsageError

torch = pytest.importorskip("torch")
SLOTS = ("fp32", "exp_avg", "exp_avg_sq")
TAG = "global_step20_universal"
STEPS = 20


def make_slots(model=SMALL):
    """slot -> name in files -> tensor."""
    slots = {slot: random_tensors(model, "float32", n) for n, slot in enumerate(SLOTS, 5)}
    slots["exp_avg_sq"] = {name: np.square(a) for name, a in slots["exp_avg_sq"].items()}
    return {
        slot: {name: torch.from_numpy(array) for name, array in tensors.items()}
        for slot, tensors in slots.items()
    }


@dataclass
class Universal:
    """How a directory is written."""

    dtype: str = "float32"
    tied: bool = False
    step: object = field(default_factory=lambda: torch.tensor(float(STEPS)))
    form: dict = field(default_factory=dict)
    model: object = SMALL


def save_universal(path, layout=None):
    """The directory that engine.load_checkpoint is given."""
    layout = layout or Universal()
    model = layout.model.change(tied=layout.tied)
    save_directory(path, model)
    (path / "model.safetensors").unlink()
    (path / "latest_universal").write_text(TAG)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": STEPS}))
    home = path / TAG
    slots = make_slots(model)
    module = OrderedDict()
    exempt, decayed = {}, {}
    for name, tensor in slots["fp32"].items():
        called = name.replace("embed_out", "lm_head")
        directory = home / "zero" / called
        directory.mkdir(parents=True)
        for slot in SLOTS:
            file = {"cat_dim": 0, "param": slots[slot][name], **layout.form}
            torch.save(file, directory / f"{slot}.pt")
        if layout.step is not None:
            torch.save(layout.step, directory / "step.pt")
        module[called] = tensor.to(getattr(torch, layout.dtype))
        (decayed if tensor.ndim > 1 else exempt)[called] = tensor.shape
    if layout.tied:
        module["lm_head.weight"] = module["gpt_neox.embed_in.weight"]
    with deepspeed_classes() as (scaler, stage, _):
        options = {
            "loss_scaler": scaler(),
            "zero_stage": stage.optimizer_states,
            "ds_version": "0.19.8",
            "param_groups": [{"lr": 1e-3, "step": STEPS, "params": [n]} for n in range(2)],
        }
        torch.save(options, home / "zero" / "optimizer_state.pt")
        states = {
            "module": module,
            "buffer_names": [],
            "param_shapes": [OrderedDict(decayed), OrderedDict(exempt)],
            "frozen_param_shapes": None,
            "lr_scheduler": {"base_lrs": [1e-3] * 2, "lr_lambdas": [None, None]},
            "skipped_steps": 0,
            "global_steps": STEPS,
            "dp_world_size": 4,
            "mp_world_size": 1,
            "ds_config": {"bf16": {"enabled": True}, "betas": (0.9, 0.95)},
            "held": scaler(),
            "ds_version": "0.19.8",
        }
        torch.save(states, home / "mp_rank_00_model_states.pt")
    return path


def load(file):
    return torch.load(file, weights_only=False)


def load_parameter(path, name, shape):
    """What DeepSpeed's load_hp_checkpoint_state finds for a parameter, and its step."""
    found = {}
    step = None
    for file in sorted((path / TAG / "zero" / name).iterdir()):
        value = load(file)
        if file.stem == "step":
            step = value
            continue
        full = value["param"]
        assert full.shape == shape and set(value) == {"cat_dim", "param"} and value["cat_dim"] == 0
        found[file.stem] = full
    assert set(found) == set(SLOTS)
    return found, step


def load_all(path):
    """name -> (slots, step) of every parameter of the file of states."""
    states = torch.load(path / TAG / "mp_rank_00_model_states.pt", weights_only=True)
    shapes = {name: shape for group in states["param_shapes"] for name, shape in group.items()}
    listed = {each.name for each in (path / TAG / "zero").iterdir() if each.is_dir()}
    assert listed == set(shapes)
    return states, {n: load_parameter(path, n, torch.Size(s)) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_universal(tmp_path_factory.mktemp("universal") / "checkpoint-20")


def depth(source, out, *more):
    return ["depth", "--map", "3:4", str(source), str(out), *more]


def test_it_is_opened_with_its_moments(plain):
    source = open_source(str(plain))
    assert source.kind == "universal" and list(source.tensors) == ["params", "mu", "nu"]
    assert source.record == {"step": STEPS, "schedule_step": STEPS, "count": STEPS}
    for slot, name in zip(source.tensors, SLOTS, strict=True):
        for each, tensor in make_slots()[name].items():
            assert np.array_equal(source.tensors[slot][each].read(), tensor.numpy())
    assert set(source.files) == {*BESIDE, "trainer_state.json"}
    assert source.notes == (
        "mp_rank_00_model_states.pt: held left behind, which hold objects of other programs",
    )


def test_depth_writes_what_deepspeed_reads(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(universal_output, "BATCH", 7)
    out = tmp_path / "out"
    assert run(depth(plain, out, "--moments", "copy")) == 0
    assert "universal checkpoint of DeepSpeed" in capsys.readouterr().out
    states, found = load_all(out)
    old = make_slots()
    for name, (slots, step) in found.items():
        words = name.replace("lm_head", "embed_out").split(".")
        if "layers" in words:
            words[2] = str(int(words[2]) * 3 // 4)
        for slot, tensor in slots.items():
            assert torch.equal(tensor, old[slot][".".join(words)]), (name, slot)
        assert torch.is_tensor(step) and step.shape == () and step == STEPS
        assert torch.equal(states["module"][name], slots["fp32"])
    assert [len(group) for group in states["param_shapes"]] == [18, 34]
    before = load_before(plain)
    for key in before.keys() - {"module", "param_shapes", "held"}:
        assert states[key] == before[key], key
    for name in ("latest_universal", "trainer_state.json", f"{TAG}/zero/optimizer_state.pt"):
        assert (out / name).read_bytes() == (plain / name).read_bytes()
    assert run(["verify", str(plain), str(out)]) == 0
    assert run(["diff", str(plain), str(out)]) == 1
    assert not list(out.glob("*.safetensors"))


def load_before(path):
    with deepspeed_classes():
        return load(path / TAG / "mp_rank_00_model_states.pt")


def test_width_grows_the_head_under_its_own_name(plain, tmp_path):
    assert run(["width", "--embed", "2x", str(plain), str(tmp_path / "out")]) == 0
    _, found = load_all(tmp_path / "out")
    assert found["lm_head.weight"][0]["exp_avg"].shape == (96, 64)
    assert open_source(str(tmp_path / "out")).model.embed == 64


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_rounded_to_the_dtype_that_it_was_used_in(tmp_path, tied):
    path = save_universal(tmp_path / "ck", Universal(dtype="bfloat16", tied=tied))
    assert open_source(str(path)).dtype == np.float32
    # Weights beside it, as the Trainer saves them, are written too.
    (path / "model.safetensors").write_bytes(b"")
    out = tmp_path / "out"
    assert run(depth(path, out)) == 0
    states, found = load_all(out)
    module = states["module"]
    for name, (slots, _) in found.items():
        assert torch.equal(module[name], slots["fp32"].bfloat16())
    if tied:
        assert torch.equal(module["lm_head.weight"], module["gpt_neox.embed_in.weight"])
        assert "lm_head.weight" not in found
    from safetensors.torch import load_file

    weights = load_file(out / "model.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, module[name.replace("embed_out", "lm_head")])
    assert len(weights) == len(found)


@pytest.mark.parametrize("step", [torch.tensor(float(STEPS)), STEPS])
def test_moments_that_begin_again(tmp_path, step):
    path = save_universal(tmp_path / "ck", Universal(step=step))
    assert run(depth(path, tmp_path / "out", "--moments", "reset")) == 0
    for slots, found in load_all(tmp_path / "out")[1].values():
        assert found == 0 and type(found) is type(step) and not slots["exp_avg_sq"].any()


def test_steps_may_be_in_the_options_alone(tmp_path, capsys):
    path = save_universal(tmp_path / "ck", Universal(step=None))
    assert open_source(str(path)).record["count"] == STEPS
    assert run(depth(path, tmp_path / "out")) == 0
    assert {step for _, step in load_all(tmp_path / "out")[1].values()} == {None}
    refused(path, tmp_path, capsys, "moments cannot be reset", more=["--moments", "reset"])


def test_damage_is_found_by_the_hashes(plain, tmp_path):
    out = tmp_path / "out"
    assert run(depth(plain, out)) == 0
    span = open_source(str(out)).tensors["nu"]["embed_out.weight"].span
    with open(span.path, "r+b") as file:
        file.seek(span.offset + 5)
        file.write(b"\x7f")
    with pytest.raises(GrowkitError, match=r"damaged: the bytes of 'nu.embed_out.weight'"):
        open_source(str(out)).require_whole()


def test_an_average_keeps_the_last_ones_optimizer(plain, tmp_path):
    out = tmp_path / "mean"
    other = save_universal(tmp_path / "ck")
    assert run(["average", str(other), str(plain), "--out", str(out)]) == 0
    assert load_all(out)[1]["lm_head.weight"][1] == STEPS


def test_neither_torch_nor_deepspeed_is_imported(plain, tmp_path):
    code = (
        "import sys; from growkit.cli import run\n"
        f"assert run({depth(plain, tmp_path / 'out')!r}) == 0\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# What is refused: one sentence, and nothing is written.


def refused(path, tmp_path, capsys, *said, more=()):
    capsys.readouterr()
    before = contents_of(path)
    assert run(depth(path, tmp_path / "no", *more)) in (1, 2)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and all(each in err for each in said), err
    assert not (tmp_path / "no").exists() and contents_of(path) == before


def test_a_file_of_the_training_that_leads_elsewhere_is_not_copied(tmp_path):
    path = save_universal(tmp_path / "ck")
    state = path / "trainer_state.json"
    state.rename(tmp_path / "elsewhere.json")
    state.symlink_to(tmp_path / "elsewhere.json")
    source = open_source(str(path))
    assert state.name not in source.files


def test_transformers_is_given_a_directory_with_weights_only(tmp_path, monkeypatch):
    path = save_universal(tmp_path / "ck")
    bare = open_source(str(path))
    save_directory(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(path / "model.safetensors")
    assert is_loaded_by_transformers(open_source(str(path)))
    assert not is_loaded_by_transformers(bare)
    monkeypatch.setattr(checking, "is_computed", lambda model: False)
    with pytest.raises(UsageError, match="reads no universal checkpoint of DeepSpeed"):
        checking.require_checkable(bare, 64)


def test_force_replaces_an_output_and_nothing_else(plain, tmp_path, capsys):
    again = depth(plain, tmp_path / "out", "--force")
    assert run(again) == 0 and run(again) == 0
    for name in ("mine.npy", f"{TAG}/mine.txt", f"{TAG}/zero/mine.pt"):
        capsys.readouterr()
        (tmp_path / "out" / name).write_text("x")
        assert run(again) == 2 and "mine" in capsys.readouterr().err
        assert (tmp_path / "out" / name).read_text() == "x"
        (tmp_path / "out" / name).unlink()


HEAD = f"{TAG}/zero/lm_head.weight"


@pytest.mark.parametrize(
    "name",
    [
        f"{HEAD}/exp_avg_sq.pt",
        f"{TAG}/mp_rank_00_model_states.pt",
        f"{TAG}/zero/optimizer_state.pt",
    ],
)
def test_a_missing_file_is_named(tmp_path, capsys, name):
    path = save_universal(tmp_path / "ck")
    (path / name).unlink()
    said = "must have mp_rank_00" if "mp_rank" in name else f"{path / name} is missing"
    refused(path, tmp_path, capsys, said)


def test_directories_that_are_not_read(tmp_path, capsys):
    path = save_universal(tmp_path / "ck")
    home = path / TAG
    refused(
        path,
        tmp_path,
        capsys,
        "keeps its groups",
        more=["--groups", "split", "--method", "identity"],
    )
    (home / "zero" / "other.weight").mkdir()
    refused(path, tmp_path, capsys, "other.weight is of a parameter that")
    (home / "zero" / "other.weight").rmdir()
    torch.save(torch.zeros(9), path / HEAD / "fp32.pt")
    refused(path, tmp_path, capsys, "holds no state by name")
    (home / "mp_rank_01_model_states.pt").write_bytes(b"")
    refused(path, tmp_path, capsys, "without tensor or pipeline parallelism")
    for tag in ("../elsewhere", "absent", ""):
        (path / "latest_universal").write_text(tag)
        refused(path, tmp_path, capsys, f"names {tag!r}, which has no zero/")
    (path / "config.json").unlink()
    refused(path, tmp_path, capsys, "without config.json")
    refused(home, tmp_path, capsys, "name the directory above it")


def test_pieces_of_parameters_are_not_read(tmp_path, capsys):
    form = {"sub_param_shape": argparse.Namespace(partition_dim=0)}
    path = save_universal(tmp_path / "ck", Universal(form=form))
    refused(path, tmp_path, capsys, "how its parts were cut")


def change_states(path, change):
    file = path / TAG / "mp_rank_00_model_states.pt"
    with deepspeed_classes():
        states = load(file)
        change(states)
        torch.save(states, file)


def freeze(states):
    states["frozen_param_shapes"] = {"gpt_neox.embed_in.weight": (3,)}


def add_buffer(states):
    states["module"]["rotary.inv_freq"] = torch.zeros(2)


def drop_head(states):
    del states["module"]["lm_head.weight"]


def mix(states):
    states["module"]["lm_head.weight"] = states["module"]["lm_head.weight"].half()


def shorten(states):
    states["module"]["lm_head.weight"] = torch.zeros(2, 2)


def climb(states):
    states["param_shapes"][0]["../x"] = (2,)


def name_twice(states):
    states["param_shapes"][0]["embed_out.weight"] = states["param_shapes"][0]["lm_head.weight"]


def drop_shapes(states):
    del states["param_shapes"]


@pytest.mark.parametrize(
    "change,said",
    [
        (freeze, "has frozen parameters"),
        (add_buffer, "'rotary.inv_freq' of the model is no parameter"),
        (drop_head, "the model lacks lm_head.weight"),
        (mix, "has parameters of several dtypes"),
        (shorten, "lm_head.weight has another shape"),
        (climb, "names the parameter '../x'"),
        (name_twice, "has embed_out.weight twice"),
        (drop_shapes, "has no param_shapes"),
    ],
)
def test_states_that_do_not_fit(tmp_path, capsys, change, said):
    path = save_universal(tmp_path / "ck")
    change_states(path, change)
    refused(path, tmp_path, capsys, said)


# DeepSpeed itself, where it is installed; it is no dependency.

ENGINE = """
import os, sys
import deepspeed, torch, transformers
out, load = sys.argv[1], sys.argv[2]
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
config = transformers.AutoConfig.from_pretrained(load or sys.argv[3])
model = transformers.AutoModelForCausalLM.from_config(config)
groups = [
    {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
    {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=1e-2)
settings = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "checkpoint": {"load_universal": bool(load)},
}
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
if load:
    assert engine.load_checkpoint(load)[0]
generator = torch.Generator().manual_seed(5)
for _ in range(2):
    tokens = torch.randint(0, config.vocab_size, (2, 16), generator=generator)
    loss = engine(tokens, labels=tokens).loss
    print("LOSS", loss.item())
    engine.backward(loss)
    engine.step()
engine.save_checkpoint(out)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
def test_deepspeed_goes_on_from_a_grown_checkpoint(tmp_path):
    save_directory(tmp_path / "hf")

    def python(*words):
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29631",
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
        }
        done = subprocess.run(
            [sys.executable, *words],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return [float(line.split()[1]) for line in done.stdout.splitlines() if "LOSS" in line]

    python("-c", ENGINE, "first", "", "hf")
    places = ["--input_folder", "first/global_step2", "--output_folder", f"first/{TAG}"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    python("-m", "deepspeed.checkpoint.ds_to_universal", *places, *workers)
    (tmp_path / "first" / "config.json").write_bytes((tmp_path / "hf/config.json").read_bytes())
    assert run(depth(tmp_path / "first", tmp_path / "grown", "--method", "identity")) == 0
    small = python("-c", ENGINE, "second", "first")
    grown = python("-c", ENGINE, "third", "grown")
    assert grown[0] == pytest.approx(small[0], abs=1e-6) and grown[1] != small[1]
    # Weights that were not read would be those of a new model.
    assert abs(python("-c", ENGINE, "fourth", "", "hf")[0] - small[0]) > 1e-3
