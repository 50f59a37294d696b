"""PyTorch's distributed checkpoints: read and written without torch, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import contents_of
from distributed import (
    LLAMA,
    STEPS,
    dcp,
    load_into,
    load_strictly,
    make_llama,
    make_optimizer,
    save_config,
    save_sharded,
    save_whole,
    take_state,
    train,
)

from growkit.checkpoint.location import open_source
from growkit.checkpoint.sample import read_sample
from growkit.cli import run
from growkit.errors import GrowkitError

torch = pytest.importorskip("torch")
CheckpointException = dcp.api.CheckpointException
SCHEDULE = {"base_lrs": [1e-3, 1e-3], "last_epoch": STEPS}
COLUMNS = ("o_proj", "down_proj")


@pytest.fixture(scope="module")
def network():
    return make_llama()


@pytest.fixture(scope="module")
def optimizer(network):
    made = make_optimizer(network)
    train(network, made)
    return made


def cut_axis(key):
    """As tensor parallelism: some matrices by rows, some by columns."""
    return 1 if any(word in key for word in COLUMNS) else 0


def make_state(network, optimizer, bare, flattened, name="optimizer"):
    model, state = take_state(network, optimizer, flattened)
    more = {
        "train_state": {"step": torch.tensor(STEPS), "losses": [3.5, 3.25]},
        "lr_scheduler": SCHEDULE,
    }
    return {name: state} | (model if bare else {"model": model}) | more


LAYOUTS = {
    "own": {"bare": False, "flattened": False},
    "torchtitan": {"bare": True, "flattened": True},
    "bare": {"bare": True, "flattened": False},
    "optim": {"bare": False, "flattened": True, "name": "optim"},
}


@pytest.fixture(scope="module")
def saved(network, optimizer, tmp_path_factory):
    """Layout -> the directory of a checkpoint of three processes."""
    home = tmp_path_factory.mktemp("saved")
    for layout, options in LAYOUTS.items():
        save_sharded(home / layout, make_state(network, optimizer, **options), 3, cut_axis)
        save_config(home / layout, network)
    return home


@pytest.fixture(scope="module")
def trainer(network, optimizer, tmp_path_factory):
    """The same model and moments as a checkpoint of transformers' Trainer."""
    path = tmp_path_factory.mktemp("trainer") / "checkpoint-3"
    network.save_pretrained(path)
    state = optimizer.state_dict()
    torch.save(state, path / "optimizer.pt")
    return path


def depth(source, out, *more):
    return ["depth", "--map", "2:3", str(source), str(out), *more]


def read_all(source):
    return {
        (slot, name): tensor.read()
        for slot, tensors in source.tensors.items()
        for name, tensor in tensors.items()
    }


def assert_equal_tensors(one, other):
    first, second = read_all(one), read_all(other)
    assert first.keys() == second.keys() and len(first) > 20
    for key, array in first.items():
        assert array.dtype == second[key].dtype and np.array_equal(array, second[key]), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_opened_with_its_moments(saved, network, optimizer, layout):
    source = open_source(str(saved / layout))
    assert source.kind == "dcp" and list(source.tensors) == ["params", "mu", "nu"]
    assert source.record == {"step": STEPS, "schedule_step": STEPS, "count": STEPS}
    for name, parameter in network.named_parameters():
        state = optimizer.state[parameter]
        wanted = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
        for slot, tensor in zip(source.tensors, wanted, strict=True):
            assert np.array_equal(source.tensors[slot][name].read(), tensor.numpy()), name
            rows = source.tensors[slot][name].rows(3, 7)
            assert np.array_equal(rows, tensor.numpy()[3:7])
    groups = source.torch_optimizer.groups
    assert [group.options["weight_decay"] for group in groups] == [0.1, 0.0]
    assert set(groups[1].names) == {n for n, p in network.named_parameters() if p.ndim == 1}
    assert not source.notes


GROWTHS = {
    "copies": ["depth", "--map", "2:3", "--moments", "copy"],
    "identity": ["depth", "--map", "2:4", "--method", "identity"],
    "width": ["width", "--embed", "2x", "--mlp", "2x"],
    "padded": ["width", "--embed", "24", "--vocab", "48"],
    "reset": ["depth", "--map", "2:3", "--moments", "reset"],
}


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("layout", ["own", "torchtitan"])
def test_growth_is_that_of_the_trainers_checkpoint(saved, trainer, tmp_path, growth, layout):
    for source, out in ((saved / layout, "dcp"), (trainer, "hf")):
        assert run([*GROWTHS[growth], str(source), str(tmp_path / out)]) == 0
    grown = open_source(str(tmp_path / "dcp"))
    assert_equal_tensors(grown, open_source(str(tmp_path / "hf")))
    assert grown.record["count"] == (0 if growth == "reset" else STEPS)
    assert run(["verify", str(saved / layout), str(tmp_path / "dcp")]) == 0
    assert run(["inspect", str(tmp_path / "dcp")]) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_loads_what_is_written(saved, optimizer, network, tmp_path, layout):
    out = tmp_path / "out"
    assert run(depth(saved / layout, out, "--moments", "copy")) == 0
    grown = make_llama(1, num_hidden_layers=3)
    fresh = make_optimizer(grown, lr=5.0)
    load_into(grown, fresh, out, **LAYOUTS[layout])
    old = dict(network.named_parameters())
    for name, parameter in grown.named_parameters():
        source = old[name.replace("layers.1.", "layers.0.").replace("layers.2.", "layers.1.")]
        assert torch.equal(parameter, source), name
        state, before = fresh.state[parameter], optimizer.state[source]
        assert state.keys() == before.keys()
        assert all(torch.equal(state[key], before[key]) for key in before)
    for group, before in zip(fresh.param_groups, optimizer.param_groups, strict=True):
        assert group | {"params": 0} == before | {"params": 0}
    train(grown, fresh, 1)


def test_what_the_program_keeps_besides_is_carried(saved, tmp_path):
    out = tmp_path / "out"
    assert run(depth(saved / "own", out)) == 0
    asked = {
        "train_state": {"step": torch.tensor(0), "losses": []},
        "lr_scheduler": {"base_lrs": [], "last_epoch": 0},
    }
    found = load_strictly(asked, out)
    assert found["lr_scheduler"] == SCHEDULE and int(found["train_state"]["step"]) == STEPS
    assert found["train_state"]["losses"] == [3.5, 3.25]
    for key in ("lr_scheduler.base_lrs", "train_state.step"):
        assert take_bytes(out, key) == take_bytes(saved / "own", key)


def read_torch_metadata(path):
    return dcp.FileSystemReader(path).read_metadata()


def take_bytes(path, key):
    metadata = read_torch_metadata(path)
    (place,) = [info for index, info in metadata.storage_data.items() if index.fqn == key]
    content = (path / place.relative_path).read_bytes()
    return content[place.offset : place.offset + place.length]


def test_a_key_that_is_left_out_is_missed(saved, tmp_path, monkeypatch):
    """The strict planner does notice."""
    from growkit.checkpoint import dcp_write

    monkeypatch.setattr(dcp_write, "STEP", "stepp")
    assert run(depth(saved / "own", tmp_path / "out")) == 0
    grown = make_llama(1, num_hidden_layers=3)
    with pytest.raises(
        CheckpointException, match="Missing key in checkpoint state_dict: optimizer.state"
    ):
        load_into(grown, make_optimizer(grown), tmp_path / "out", bare=False, flattened=False)


def test_a_chunk_in_the_wrong_place_is_noticed(saved, trainer, tmp_path, monkeypatch):
    """Rows of a chunk that are put one further make another model."""
    from growkit.checkpoint import dcp_items

    original = dcp_items.join_chunks

    def shifted(entry, dtype, tensors):
        tensor = original(entry, dtype, tensors)
        wrong = [np.roll(tensor.read(), 1, 0)]
        return dcp_items.Tensor(tensor.shape, dtype, lambda start, stop: wrong[0][start:stop])

    monkeypatch.setattr(dcp_items, "join_chunks", shifted)
    with pytest.raises(AssertionError):
        assert_equal_tensors(open_source(str(saved / "own")), open_source(str(trainer)))
    monkeypatch.undo()
    assert_equal_tensors(open_source(str(saved / "own")), open_source(str(trainer)))


def test_neither_torch_nor_transformers_is_imported(saved, tmp_path):
    code = (
        "import sys; from growkit.cli import run\n"
        f"assert run({depth(saved / 'own', tmp_path / 'out')!r}) == 0\n"
        "assert not {'torch', 'transformers', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_one_process_and_three_are_one_model(saved, network, optimizer, tmp_path, capsys):
    state = make_state(network, optimizer, bare=False, flattened=False)
    save_whole(state, tmp_path / "one")
    shutil.copy(saved / "own" / "config.json", tmp_path / "one")
    one, three = open_source(str(tmp_path / "one")), open_source(str(saved / "own"))
    assert_equal_tensors(one, three)
    for slot, tensors in one.tensors.items():
        for name, tensor in tensors.items():
            assert read_sample(tensor) == read_sample(three.tensors[slot][name]), name
    assert one.config == three.config
    assert one.fingerprint == three.fingerprint
    assert run(["diff", str(tmp_path / "one"), str(saved / "own")]) == 0
    assert run(["diff", str(tmp_path / "one"), str(saved / "torchtitan")]) == 0
    entry = state["optimizer"]["state"]["lm_head.weight"]
    state["optimizer"]["state"]["lm_head.weight"] = entry | {"exp_avg": entry["exp_avg"] + 1}
    save_sharded(tmp_path / "other", state)
    save_config(tmp_path / "other", network)
    assert run(["diff", str(tmp_path / "other"), str(saved / "own")]) == 1
    assert run(["verify", str(saved / "own"), str(tmp_path / "other")]) != 0


def test_files_are_of_bounded_size(saved, tmp_path):
    out = tmp_path / "out"
    assert run(depth(saved / "own", out, "--max-shard-size", "20KB")) == 0
    files = list(out.glob("*.distcp"))
    assert len(files) > 5 and max(file.stat().st_size for file in files) <= 20_000
    assert run(["verify", str(saved / "own"), str(out)]) == 0
    grown = make_llama(1, num_hidden_layers=3)
    load_into(grown, make_optimizer(grown), out, bare=False, flattened=False)


def test_it_grows_again_and_replaces_itself_with_force(saved, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    assert run(depth(saved / "torchtitan", out)) == 0
    assert run(["width", "--mlp", "2x", str(out), str(again)]) == 0
    assert run(["verify", str(out), str(again)]) == 0
    assert run(["width", "--mlp", "3x", "--force", str(out), str(again)]) == 0
    (again / "notes.xyz").write_text("mine")
    assert run(["width", "--mlp", "3x", "--force", str(out), str(again)]) == 2
    assert "notes.xyz" in capsys.readouterr().err


def test_damage_is_found_by_the_hashes(saved, tmp_path):
    out = tmp_path / "out"
    assert run(depth(saved / "own", out)) == 0
    span = open_source(str(out)).tensors["nu"]["lm_head.weight"].span
    with open(span.path, "r+b") as file:
        file.seek(span.offset + 5)
        file.write(b"\x7f")
    with pytest.raises(GrowkitError, match=r"damaged: the bytes of 'nu.lm_head.weight'"):
        open_source(str(out)).require_whole()
    assert run(["verify", str(saved / "own"), str(out)]) == 1


def test_an_average_keeps_the_layout(saved, tmp_path):
    out = tmp_path / "mean"
    one, other = saved / "own", saved / "torchtitan"
    assert run(["average", str(one), str(other), "--out", str(out)]) == 0
    assert_equal_tensors(open_source(str(out)), open_source(str(one)))
    load_strictly({"lr_scheduler": {"last_epoch": 0}}, out)


def test_a_model_without_optimizer(network, tmp_path):
    save_sharded(tmp_path / "model", {"model": network.state_dict()})
    save_config(tmp_path / "model", network)
    source = open_source(str(tmp_path / "model"))
    assert list(source.tensors) == ["params"] and source.torch_optimizer is None
    assert run(depth(tmp_path / "model", tmp_path / "out")) == 0
    grown = make_llama(1, num_hidden_layers=3)
    load_strictly({"model": grown.state_dict()}, tmp_path / "out")
    assert torch.equal(grown.lm_head.weight, network.lm_head.weight)


def test_a_tied_head_is_written_where_it_was(tmp_path):
    network = make_llama(tie_word_embeddings=True)
    optimizer = make_optimizer(network)
    train(network, optimizer)
    save_sharded(tmp_path / "tied", make_state(network, optimizer, False, False), 2)
    save_config(tmp_path / "tied", network)
    assert run(["width", "--embed", "2x", str(tmp_path / "tied"), str(tmp_path / "out")]) == 0
    sizes = json.loads((tmp_path / "out" / "config.json").read_text())
    grown = make_llama(1, **{name: sizes[name] for name in (*LLAMA, "tie_word_embeddings")})
    kept = grown.model.embed_tokens.weight.detach().clone()
    fresh = make_optimizer(grown)
    load_into(grown, fresh, tmp_path / "out", bare=False, flattened=False)
    assert grown.lm_head.weight is grown.model.embed_tokens.weight
    assert not torch.equal(grown.lm_head.weight, kept)
    assert run(["verify", str(tmp_path / "tied"), str(tmp_path / "out")]) == 0


def test_moments_in_bfloat16_stay_so(tmp_path):
    network = make_llama(dtype=torch.bfloat16)
    optimizer = make_optimizer(network)
    train(network, optimizer)
    save_sharded(tmp_path / "half", make_state(network, optimizer, False, True), 2, cut_axis)
    save_config(tmp_path / "half", network)
    assert run(depth(tmp_path / "half", tmp_path / "out", "--moments", "copy")) == 0
    metadata = read_torch_metadata(tmp_path / "out").state_dict_metadata
    moment = metadata["optimizer.state.lm_head.weight.exp_avg_sq"]
    assert moment.properties.dtype == torch.bfloat16
    grown = make_llama(1, torch.bfloat16, num_hidden_layers=3)
    fresh = make_optimizer(grown)
    load_into(grown, fresh, tmp_path / "out", bare=False, flattened=True)
    assert torch.equal(grown.lm_head.weight, network.lm_head.weight)


def test_names_in_memory_that_differ_from_those_in_files(tmp_path):
    """GPT-NeoX's head is embed_out in files and lm_head in memory."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}

    def make(layers):
        config = transformers.GPTNeoXConfig(num_hidden_layers=layers, **sizes)
        return transformers.GPTNeoXForCausalLM(config)

    network = make(2)
    optimizer = make_optimizer(network)
    train(network, optimizer)
    save_sharded(tmp_path / "neox", make_state(network, optimizer, False, True), 2)
    save_config(tmp_path / "neox", network)
    assert run(depth(tmp_path / "neox", tmp_path / "out", "--moments", "copy")) == 0
    grown = make(3)
    fresh = make_optimizer(grown)
    load_into(grown, fresh, tmp_path / "out", bare=False, flattened=True)
    head, old = grown.get_output_embeddings().weight, network.get_output_embeddings().weight
    assert torch.equal(head, old)
    assert torch.equal(fresh.state[head]["exp_avg"], optimizer.state[old]["exp_avg"])


# accelerate.


@pytest.fixture
def accelerated(network, optimizer, tmp_path):
    """checkpoint-3 as accelerate's FSDP lays it out."""
    home = tmp_path / "checkpoint-3"
    model, state = take_state(network, optimizer)
    save_sharded(home / "pytorch_model_fsdp_0", {"model": model}, 2)
    save_sharded(home / "optimizer_0", {"optimizer": state}, 2)
    save_config(home, network)
    (home / "scheduler.bin").write_bytes(b"PK\x03\x04 as it is")
    (home / "random_states_0.pkl").write_bytes(b"\x80\x04N.")
    (home / "tokenizer.json").write_text("{}")
    return home


def test_accelerates_directories(accelerated, saved, tmp_path):
    out = tmp_path / "out"
    assert run(depth(accelerated, out, "--moments", "copy")) == 0
    assert run(depth(saved / "own", tmp_path / "own", "--moments", "copy")) == 0
    assert_equal_tensors(open_source(str(out)), open_source(str(tmp_path / "own")))
    for name in ("scheduler.bin", "random_states_0.pkl", "tokenizer.json"):
        assert (out / name).read_bytes() == (accelerated / name).read_bytes()
    grown = make_llama(1, num_hidden_layers=3)
    model, state = take_state(grown, make_optimizer(grown))
    load_strictly({"model": model}, out / "pytorch_model_fsdp_0")
    load_strictly({"optimizer": state}, out / "optimizer_0")
    assert run(["verify", str(accelerated), str(out)]) == 0
    assert run(depth(accelerated, out, "--force")) == 0
    for name in ("optimizer_0/mine.txt", "mine.pkl"):
        (out / name).write_text("x")
        assert run(depth(accelerated, out, "--force")) == 2 and (out / name).exists()
        (out / name).unlink()


# Names of other programs.


def to_titan(name, tensor, heads):
    """torchtitan's name and rows, as its adapter makes them from transformers'."""
    plain = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    words = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "layers",
    }
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        rows, columns = tensor.shape
        count = heads[0] if "q_proj" in name else heads[1]
        halves = tensor.reshape(count, 2, rows // count // 2, columns)
        tensor = halves.transpose(1, 2).reshape(rows, columns).contiguous()
    for old, new in (plain | words).items():
        name = name.replace(old, new)
    return name, tensor


def to_olmo(name, tensor, heads):
    words = {
        "model.embed_tokens": "embeddings",
        "model.norm": "norm",
        "lm_head": "lm_head.w_out",
        "self_attn.q_proj": "attention.w_q",
        "self_attn.k_proj": "attention.w_k",
        "self_attn.v_proj": "attention.w_v",
        "self_attn.o_proj": "attention.w_out",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feed_forward_norm",
        "model.layers": "blocks",
    }
    for old, new in words.items():
        name = name.replace(old, new)
    return "lm_head.norm.weight" if name == "norm.weight" else name, tensor


def rename_state(model, state, change, heads):
    """State dicts with the names, and the rows, of another program."""
    new = dict(change(name, tensor, heads) for name, tensor in model.items())
    names = {name: change(name, tensor, heads)[0] for name, tensor in model.items()}
    moments = {
        names[name]: {
            key: change(name, value, heads)[1] if value.ndim else value
            for key, value in entry.items()
        }
        for name, entry in state["state"].items()
    }
    groups = [
        group | {"params": [names[name] for name in group["params"]]}
        for group in state["param_groups"]
    ]
    return new, {"state": moments, "param_groups": groups}


PROGRAMS = {"torchtitan": (to_titan, True, "optimizer"), "OLMo-core": (to_olmo, False, "optim")}


def save_renamed(path, model, state, program, heads):
    change, bare, name = PROGRAMS[program]
    made, moments = rename_state(model, state, change, heads)
    save_sharded(path, {name: moments} | (made if bare else {"model": made}), 3, cut_axis)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("growth", ["copies", "width", "padded"])
def test_programs_with_names_of_their_own(
    saved, network, optimizer, tmp_path, program, growth, capsys
):
    source = tmp_path / "source"
    model, state = take_state(network, optimizer)
    save_renamed(source, model, state, program, (4, 2))
    save_config(source, network)
    assert_equal_tensors(open_source(str(source)), open_source(str(saved / "own")))
    for each, out in ((source, "out"), (saved / "own", "own")):
        assert run([*GROWTHS[growth], str(each), str(tmp_path / out)]) == 0
    assert f"the names of parameters are {program}'s own" in capsys.readouterr().out
    grown = open_source(str(tmp_path / "own"))
    assert_equal_tensors(open_source(str(tmp_path / "out")), grown)
    assert run(["verify", str(source), str(tmp_path / "out")]) == 0
    # The same as what the program makes itself of transformers' grown model.
    change, bare, name = PROGRAMS[program]
    sizes = grown.model.sizes
    heads = (sizes["kv"] * sizes["group"], sizes["kv"])
    wanted = {
        key: torch.from_numpy(tensor.read()) for key, tensor in grown.tensors["params"].items()
    }
    moment = {key: torch.from_numpy(each.read()) for key, each in grown.tensors["mu"].items()}
    params = dict(change(key, tensor, heads) for key, tensor in wanted.items())
    moments = dict(change(key, tensor, heads) for key, tensor in moment.items())
    empty = {key: torch.empty_like(tensor) for key, tensor in params.items()}
    state = {key: {"exp_avg": torch.empty_like(each)} for key, each in moments.items()}
    asked = {name: {"state": state}} | (empty if bare else {"model": empty})
    load_strictly(asked, tmp_path / "out")
    found = asked if bare else asked["model"]
    assert all(torch.equal(found[key], tensor) for key, tensor in params.items())
    state = asked[name]["state"]
    assert all(torch.equal(state[key]["exp_avg"], each) for key, each in moments.items())


def test_an_export_of_torchtitans_names_is_transformers_model(network, optimizer, tmp_path):
    model, state = take_state(network, optimizer)
    save_renamed(tmp_path / "source", model, state, "torchtitan", (4, 2))
    save_config(tmp_path / "source", network)
    assert run(["export", str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    exported = open_source(str(tmp_path / "out"))
    assert exported.kind == "huggingface"
    for name, parameter in network.named_parameters():
        found = exported.tensors["params"][name].read()
        assert np.array_equal(found, parameter.detach().numpy()), name


def test_param_groups_are_the_checkpoints(saved, network, tmp_path):
    from growkit.torch import param_groups

    groups = param_groups(network, saved / "own")
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == 21


def test_the_order_of_heads_matters(saved, network, optimizer, tmp_path, monkeypatch):
    """Without turning them the model is another one."""
    from growkit.checkpoint import dcp as module

    model, state = take_state(network, optimizer)
    save_renamed(tmp_path / "source", model, state, "torchtitan", (4, 2))
    save_config(tmp_path / "source", network)
    monkeypatch.setattr(module, "find_rotated", lambda program, model: ())
    with pytest.raises(AssertionError):
        assert_equal_tensors(open_source(str(tmp_path / "source")), open_source(str(saved / "own")))


# What is refused: one sentence, nothing written.


def refused(path, tmp_path, capsys, *said):
    capsys.readouterr()
    before = contents_of(path)
    assert run(depth(path, tmp_path / "refused")) in (1, 2)
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1, err
    assert all(each in err for each in said), err
    assert not (tmp_path / "refused").exists() and contents_of(path) == before


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved / "own", tmp_path / "copied")


def test_a_missing_file(copied, tmp_path, capsys):
    (copied / "__1_0.distcp").unlink()
    refused(copied, tmp_path, capsys, "names the file '__1_0.distcp', which is not there")


def test_a_file_that_is_cut_off(copied, tmp_path, capsys):
    file = copied / "__2_0.distcp"
    os.truncate(file, file.stat().st_size - 1)
    refused(copied, tmp_path, capsys, "__2_0.distcp is cut off: it has")


def test_bytes_that_are_others(copied, tmp_path, capsys):
    file = copied / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    refused(copied, tmp_path, capsys, "is no file of torch.save at byte")


def test_a_link_that_leads_elsewhere(copied, tmp_path, capsys):
    (copied / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (copied / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    refused(copied, tmp_path, capsys, "outside the directory")


def test_no_configuration(copied, tmp_path, capsys):
    (copied / "config.json").unlink()
    refused(copied, tmp_path, capsys, "without the model's config.json: put it there")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x04N.", b"\x80\x02}."])
def test_metadata_that_is_none(copied, tmp_path, capsys, content):
    (copied / ".metadata").write_bytes(content)
    refused(copied, tmp_path, capsys, ".metadata")


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def change_metadata(path, change):
    metadata = read_torch_metadata(path)
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("place", ["planner_data", "storage_meta", "storage_data"])
def test_nothing_of_the_metadata_is_run(copied, tmp_path, capsys, place):
    trap = tmp_path / "trap"
    change_metadata(copied, lambda metadata: setattr(metadata, place, Trap(trap)))
    refused(copied, tmp_path, capsys, "posix.mkdir", "nothing of it was run")
    assert not trap.exists()
    pickle.loads((copied / ".metadata").read_bytes())
    assert trap.exists()


def test_nothing_of_an_option_is_run(network, optimizer, tmp_path, capsys):
    trap = tmp_path / "trap"
    state = make_state(network, optimizer, bare=False, flattened=False)
    state["optimizer"]["param_groups"][0]["betas"] = Trap(trap)
    path = save_config(save_sharded(tmp_path / "trapped", state), network)
    refused(path, tmp_path, capsys, "posix.mkdir", "nothing of it was run")
    assert not trap.exists()


def test_objects_that_are_only_carried_are_not_read(network, optimizer, tmp_path):
    trap = tmp_path / "trap"
    state = make_state(network, optimizer, bare=False, flattened=False) | {"dataloader": Trap(trap)}
    path = save_config(save_sharded(tmp_path / "carried", state), network)
    assert run(depth(path, tmp_path / "out")) == 0 and not trap.exists()
    assert take_bytes(tmp_path / "out", "dataloader") == take_bytes(path, "dataloader")


def leave_file(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path


def drop_chunk(metadata):
    metadata.state_dict_metadata["model.lm_head.weight"].chunks.pop()


def overlap(metadata):
    chunks = metadata.state_dict_metadata["model.lm_head.weight"].chunks
    chunks[1] = chunks[0]


def drop_place(metadata):
    metadata.storage_data = {
        index: info
        for index, info in metadata.storage_data.items()
        if index.fqn != "model.lm_head.weight"
    }


def drop_paths(metadata):
    metadata.planner_data = None


def add_extension(metadata):
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["stream.zstd"]


@pytest.mark.parametrize(
    "change,said",
    [
        (leave_file, "outside itself"),
        (drop_chunk, "do not cover its shape [40, 16] once"),
        (overlap, "do not cover its shape [40, 16] once"),
        (drop_place, "does not say in which file model.lm_head.weight lies"),
        (drop_paths, "save with DefaultSavePlanner"),
        (add_extension, "was written through stream.zstd"),
    ],
)
def test_metadata_that_do_not_fit(copied, tmp_path, capsys, change, said):
    change_metadata(copied, change)
    refused(copied, tmp_path, capsys, said)


def test_tensors_that_are_not_where_the_metadata_say(copied, tmp_path, capsys):
    def swap(metadata):
        places = metadata.storage_data
        one, other = (
            next(index for index in places if index.fqn == f"model.model.layers.0.{name}.weight")
            for name in ("mlp.up_proj", "input_layernorm")
        )
        places[one], places[other] = places[other], places[one]

    change_metadata(copied, swap)
    refused(copied, tmp_path, capsys, "and the metadata say float32")


def change_state(change):
    def build(network, optimizer):
        state = make_state(network, optimizer, bare=False, flattened=False)
        state["model"] = dict(state["model"])
        inner = state["optimizer"]
        state["optimizer"] = {
            "state": {name: dict(entry) for name, entry in inner["state"].items()},
            "param_groups": [dict(group) for group in inner["param_groups"]],
        }
        change(state)
        return state

    return build


def to_flat(state):
    state["model"] = {"_flat_param": torch.zeros(9)}


def to_other_names(state):
    tensor = state["model"].pop("lm_head.weight")
    state["model"]["head.weight"] = tensor


def to_numbers(state):
    state["optimizer"]["state"] = dict(enumerate(state["optimizer"]["state"].values()))


def to_frozen(state):
    del state["optimizer"]["state"]["lm_head.weight"]


def to_adafactor(state):
    for entry in state["optimizer"]["state"].values():
        entry["exp_avg_sq_row"] = entry.pop("exp_avg_sq")


def to_averages(state):
    state["ema"] = {name: tensor.clone() for name, tensor in state["model"].items()}


def to_parts_of_averages(state):
    state["ema"] = {f"{name}.average": t.clone() for name, t in state["model"].items()}


def to_other_key(state):
    state["opt"] = state.pop("optimizer")


def to_other_key_by_number(state):
    to_numbers(state)
    to_other_key(state)


def to_two_optimizers(state):
    state["optim"] = state["optimizer"]


def to_list_of_optimizers(state):
    state["optimizer"] = [state["optimizer"]] * 2


def to_object(state):
    state["model"]["model.layers.0.self_attn._extra_state"] = [1, 2]


def to_halves(state):
    state["optimizer"]["param_groups"][0]["params"] = []


def to_words(state):
    for entry in state["optimizer"]["state"].values():
        entry["step"] = "three"


def to_no_number(state):
    for entry in state["optimizer"]["state"].values():
        entry["step"] = torch.tensor(float("nan"))


def to_eight_bits(state):
    entry = state["optimizer"]["state"]["lm_head.weight"]
    entry["exp_avg"] = entry["exp_avg"].to(torch.float8_e4m3fn)


def to_titans_mamba(state):
    state["model"]["tok_embeddings.weight"] = state["model"].pop("model.embed_tokens.weight")


def to_other_shape(state):
    entry = state["optimizer"]["state"]["lm_head.weight"]
    entry["exp_avg"] = entry["exp_avg"][:, :8].contiguous()


def to_nothing(state):
    state.clear()
    state["x"] = {"y": 1}


@pytest.mark.parametrize(
    "change,said",
    [
        (to_flat, "flat parameters of FSDP in torch 1.x"),
        (to_other_names, "head.weight"),
        (to_numbers, "has moments by number"),
        (to_frozen, "has the moments of 20 parameters, and the model has 21"),
        (to_adafactor, "Adafactor keeps sums over rows and columns"),
        (to_averages, "does not know how it grows"),
        (to_parts_of_averages, "does not know how it grows"),
        (to_other_key, "is found under optimizer or optim"),
        (to_other_key_by_number, "is found under optimizer or optim"),
        (to_two_optimizers, "holds two optimizers, optimizer and optim"),
        (to_list_of_optimizers, "does not know how it grows"),
        (to_object, "an object among the parameters, model.model.layers.0.self_attn._extra_state"),
        (to_halves, "do not hold every parameter once"),
        (to_words, "is no number"),
        (to_no_number, "is no number from 0"),
        (to_eight_bits, "is float8_e4m3fn, and growkit reads float64"),
        (to_other_shape, "mu: "),
        (to_nothing, "a distributed checkpoint without a model"),
    ],
)
def test_checkpoints_that_cannot_grow(network, optimizer, tmp_path, capsys, change, said):
    state = change_state(change)(network, optimizer)
    path = save_config(save_sharded(tmp_path / "odd", state), network)
    refused(path, tmp_path, capsys, said)


def test_names_of_a_program_for_another_model(network, optimizer, tmp_path, capsys):
    model, state = take_state(network, optimizer)
    save_renamed(tmp_path / "odd", model, state, "torchtitan", (4, 2))
    save_config(tmp_path / "odd", network)
    config = (tmp_path / "odd" / "config.json").read_text()
    (tmp_path / "odd" / "config.json").write_text(config.replace('"llama"', '"olmo2"'))
    refused(tmp_path / "odd", tmp_path, capsys, "torchtitan's own names", "--table")


def test_split_groups_and_checks_are_for_other_kinds(saved, tmp_path, capsys):
    words = ["width", "--embed", "2x", str(saved / "own"), str(tmp_path / "refused")]
    assert run([*words, "--groups", "split"]) == 2
    assert "the groups of a distributed checkpoint are kept" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_the_directory_around_is_told(saved, tmp_path, capsys):
    for name in ("step-2", "step-10"):
        shutil.copytree(saved / "torchtitan", tmp_path / "runs" / name)
    refused(tmp_path / "runs", tmp_path, capsys, f"did you mean '{tmp_path}/runs/step-10'?")
    shutil.copytree(saved / "optim", tmp_path / "step3" / "model_and_optim")
    (tmp_path / "step3" / "config.json").write_text('{"model": {}}')
    refused(tmp_path / "step3", tmp_path, capsys, "of OLMo-core", "step3/model_and_optim'?")


def test_growth_without_room_leaves_nothing(saved, tmp_path, monkeypatch, capsys):
    def no_room(file, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("growkit.checkpoint.fill._reserve", no_room)
    assert run(depth(saved / "own", tmp_path / "out")) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
