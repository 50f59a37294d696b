"""Checkpoints of gpt-neox become trainer checkpoints, moments and step included, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from neoxes import SIZES, SKIPPED, SLOTS, STEPS, Layout, save_neox, train_model

from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.errors import GrowkitError

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def trained():
    return train_model()


def check_equal(source, trained):
    """Every tensor of a source is torch's, to the bit."""
    for slot, name in zip(("params", "mu", "nu"), SLOTS, strict=True):
        assert source.tensors[slot].keys() == trained[name].keys()
        for each, tensor in trained[name].items():
            found = source.tensors[slot][each].read()
            assert found.dtype == np.float32
            assert found.tobytes() == tensor.numpy().tobytes(), (slot, each)


def import_(path, out, capsys):
    capsys.readouterr()
    assert run(["import", str(path), str(out)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_parameters_moments_and_count_are_torchs(trained, tmp_path, capsys, tp, dp):
    form = {1: "elastic", 2: "new", 4: "new"}[dp]
    path = save_neox(tmp_path / "global_step5", trained, Layout(tp=tp, dp=dp, form=form))
    check_import(path, trained, tmp_path, capsys)


def test_vectors_of_bfloat16s_optimizer_are_saved_with_their_padding(trained, tmp_path, capsys):
    layout = Layout(tp=2, dp=4, form="bf16", low="bfloat16")
    check_import(save_neox(tmp_path / "ck", trained, layout), trained, tmp_path, capsys)


def check_import(path, trained, tmp_path, capsys):
    said = import_(path, tmp_path / "out", capsys)
    assert f"with moments; step {STEPS + SKIPPED}, count {STEPS}" in said
    found = open_source(str(tmp_path / "out"))
    check_equal(found, trained)
    assert found.record == {"count": STEPS, "schedule_step": STEPS, "step": STEPS + SKIPPED}
    assert found.model.vocab == SIZES["vocab_size"] and found.model.mlp == 26
    assert found.config["use_parallel_residual"] and found.config["rotary_pct"] == 0.4


def test_the_layouts_have_padding(trained, tmp_path):
    """Else the tests of padding would test nothing."""
    paddings = []

    def note(state, number):
        paddings.append(state["group_paddings"])

    save_neox(tmp_path / "ck", trained, Layout(tp=2, dp=4, state=note))
    assert all(any(of_rank[group] for of_rank in paddings) for group in range(2))


@pytest.mark.parametrize("tp,dp,intervals", [(1, 1, 1), (1, 4, 3), (2, 2, 2)])
def test_the_form_that_pythia_was_saved_in(trained, tmp_path, capsys, tp, dp, intervals):
    layout = Layout(tp=tp, dp=dp, form="old", intervals=intervals)
    path = save_neox(tmp_path / "ck", trained, layout)
    import_(path, tmp_path / "out", capsys)
    found = open_source(str(tmp_path / "out"))
    check_equal(found, trained)
    # No step of Adam is saved: those that were not skipped.
    assert found.record["count"] == STEPS


def test_a_branch_of_the_hub_has_its_settings_beside_the_weights(trained, tmp_path):
    path = save_neox(tmp_path / "ck", trained, Layout(low="bfloat16"))
    (path / "configs" / "tiny.yml").rename(path / "70M.yml")
    check_equal(open_source(str(path)), trained)


@pytest.mark.parametrize("tp", [1, 2])
def test_sequential_residuals_and_a_tied_head(tmp_path, tp):
    trained = train_model(parallel=False, tied=True)
    path = save_neox(tmp_path / "ck", trained, Layout(tp=tp, dp=2, parallel=False, tied=True))
    source = open_source(str(path))
    check_equal(source, trained)
    assert source.config["tie_word_embeddings"] and not source.config["use_parallel_residual"]
    assert not source.notes


def test_newer_names_of_the_mlp(trained, tmp_path):
    path = save_neox(tmp_path / "ck", trained, Layout())
    for file in [*path.glob("layer_*"), path / "mp_rank_00_model_states.pt"]:
        held = torch.load(file, weights_only=False)
        groups = held.get("param_shapes", [held])
        for group in groups:
            for name in list(group):
                new = name.replace("dense_h_to_4h", "linear1").replace("dense_4h_to_h", "linear2")
                group[new] = group.pop(name)
        torch.save(held, file)
    check_equal(open_source(str(path)), trained)


def test_it_grows_once_it_is_imported(trained, tmp_path, capsys):
    path = save_neox(tmp_path / "ck", trained, Layout(tp=2, dp=2))
    assert run(["inspect", str(path)]) == 0
    assert run(["depth", "--map", "2:4", str(path), str(tmp_path / "no")]) == 1
    assert "`growkit import" in capsys.readouterr().err and not (tmp_path / "no").exists()
    import_(path, tmp_path / "out", capsys)
    grown = ["depth", "--map", "2:4", "--moments", "copy", str(tmp_path / "out")]
    assert run([*grown, str(tmp_path / "grown")]) == 0
    found = open_source(str(tmp_path / "grown"))
    name = "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight"
    old = trained["exp_avg_sq"][name.format(1)].numpy()
    assert np.array_equal(found.tensors["nu"][name.format(3)].read(), old)
    assert found.record["count"] == STEPS


def test_neither_torch_nor_deepspeed_is_imported(trained, tmp_path):
    path = save_neox(tmp_path / "ck", trained, Layout(dp=2))
    code = (
        "import sys; from growkit.cli import run\n"
        f"assert run(['import', {str(path)!r}, {str(tmp_path / 'out')!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# What is refused: one sentence, and nothing is written.


def refused(path, tmp_path, capsys, *said):
    capsys.readouterr()
    assert run(["import", str(path), str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1, err
    assert all(each in err for each in said), err
    assert not (tmp_path / "out").exists()


def swap(groups):
    """Two parameters of one shape in each other's place."""
    group = groups[0]
    one, two = ((layer, "attention.query_key_value.weight") for layer in (2, 3))
    first, second = group.index(one), group.index(two)
    group[first], group[second] = two, one


def test_a_wrong_order_is_noticed(trained, tmp_path, capsys):
    path = save_neox(tmp_path / "ck", trained, Layout(dp=2, after=swap))
    refused(path, tmp_path, capsys, "2.attention.query_key_value.weight", "when rounded to float16")
    # Where the order is stated, any order is right.
    path = save_neox(tmp_path / "right", trained, Layout(dp=2, before=swap))
    check_equal(open_source(str(path)), trained)


def test_an_order_that_is_not_stated_is_noticed_too(trained, tmp_path, capsys):
    layout = Layout(dp=2, form="old", intervals=2, before=swap)
    path = save_neox(tmp_path / "ck", trained, layout)
    refused(path, tmp_path, capsys, "when rounded to float16")


def test_intervals_joined_rank_by_rank_are_noticed(trained, tmp_path, capsys):
    path = save_neox(tmp_path / "ck", trained, Layout(dp=2, form="old", intervals=2))
    for rank in range(2):
        file = path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        file.rename(path / f"moved_{1 - rank}")
    for rank in range(2):
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        (path / f"moved_{rank}").rename(path / name)
    refused(path, tmp_path, capsys, "when rounded to float16")


def lengthen(state, number):
    state["base_optimizer_state"]["state"][1]["exp_avg"] = torch.zeros(1000)


def cut_short(state, number):
    state["single_partition_of_fp32_groups"][0] = torch.zeros(7)


def to_stage_three(state, number):
    state["zero_stage"] = type(state["zero_stage"])(3)


def to_aligned(state, number):
    state["param_alignment_paddings"] = [[0, 2], [0]]


def to_lamb(state, number):
    state["base_optimizer_state"]["state"][0] = {"momentum": torch.zeros(3)}


def to_nothing(state, number):
    del state["base_optimizer_state"]["param_groups"][0]["params"]


def to_half(state, number):
    parts = state["single_partition_of_fp32_groups"]
    parts[0] = parts[0].half()


class Foreign:
    pass


def to_foreign(state, number):
    state["loss_scaler"] = Foreign()


@pytest.mark.parametrize(
    "change,said",
    [
        (lengthen, "exp_avg of group 1 is longer by"),
        (cut_short, "than the parameters, and the padding is"),
        (to_stage_three, "of ZeRO stage 3, which cuts every parameter"),
        (to_aligned, "has padding between its parameters"),
        (to_lamb, "is of an optimizer that keeps momentum"),
        (to_nothing, "base_optimizer_state is no optimizer's state dict"),
        (to_half, "must be a vector of float32, and is float16"),
        (to_foreign, "test_neox.Foreign, which is no part of a state dict"),
    ],
)
def test_optimizers_that_cannot_be_read(trained, tmp_path, capsys, change, said):
    path = save_neox(tmp_path / "ck", trained, Layout(dp=2, state=change))
    refused(path, tmp_path, capsys, said)


@pytest.mark.parametrize(
    "name",
    [
        "layer_03-model_01-model_states.pt",
        "layer_06-model_00-model_states.pt",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "mp_rank_01_model_states.pt",
    ],
)
def test_a_missing_file_is_named(trained, tmp_path, capsys, name):
    path = save_neox(tmp_path / "ck", trained, Layout(tp=2, dp=2))
    (path / name).unlink()
    refused(path, tmp_path, capsys, f"{path / name} is missing")


@pytest.mark.parametrize(
    "name,other",
    [
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_{}"),
        ("layer_02-model_00-model_states.pt", "layer_02-model_states.pt"),
    ],
)
def test_two_files_of_one_part(trained, tmp_path, capsys, name, other):
    path = save_neox(tmp_path / "ck", trained, Layout())
    (path / other.format(name)).write_bytes((path / name).read_bytes())
    refused(path, tmp_path, capsys, "are the same part of two saves")


def test_files_of_two_saves(trained, tmp_path, capsys):
    path = save_neox(tmp_path / "ck", trained, Layout(dp=2))
    name = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    (path / name.format(2)).write_bytes((path / name.format(1)).read_bytes())
    refused(path, tmp_path, capsys, "has 3 files of an optimizer that was cut among 2 ranks")
    for file in path.glob("zero_*"):
        file.unlink()
    refused(path, tmp_path, capsys, "without its optimizer")


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"norm": "rmsnorm"}, "norm is 'rmsnorm'"),
        ({"pos-emb": "alibi"}, "pos_emb is 'alibi'"),
        ({"gpt_j_tied": True}, "gpt_j_tied is True"),
        ({"sliding_window_width": 4}, "sliding_window_width is 4"),
        ({"pipe_parallel_size": 2}, "pipe_parallel_size is 2"),
        ({"num_layers": 3}, "layer_04-model_00-model_states.pt is missing"),
        ({"num_layers": "x"}, "num_layers must be a whole number"),
        ({"num_attention_heads": 5}, "two settings"),
        ({"attention_config": [[["local"], 2]]}, "attention_config has 'local'"),
        ({"model_parallel_size": 2}, "layer_00-model_01-model_states.pt is missing"),
    ],
)
def test_settings_that_do_not_fit(trained, tmp_path, capsys, settings, said):
    path = save_neox(tmp_path / "ck", trained, Layout(settings=settings))
    if said == "two settings":
        settings = path / "configs" / "tiny.yml"
        settings.write_text(settings.read_text().replace('"num_attention_heads": 5,', ""))
        (path / "local.yml").write_text("num_attention_heads: 5\n")
        said = "two settings files state num_attention_heads"
    refused(path, tmp_path, capsys, said)


def test_settings_that_are_missing_or_garbled(trained, tmp_path, capsys):
    path = save_neox(tmp_path / "ck", trained, Layout())
    (path / "configs" / "local.yml").write_text("a: [")
    refused(path, tmp_path, capsys, "is no YAML that can be read")
    for file in (path / "configs").iterdir():
        file.unlink()
    refused(path, tmp_path, capsys, "has no settings of gpt-neox")
    for file in path.glob("layer_*"):
        file.unlink()
    refused(path, tmp_path, capsys, "a checkpoint of DeepSpeed without layer_*")


def test_parameters_that_transformers_has_no_place_for(trained, tmp_path, capsys):
    path = save_neox(tmp_path / "ck", trained, Layout())
    file = path / "layer_00-model_00-model_states.pt"
    held = torch.load(file)
    torch.save(held | {"position_embeddings.weight": torch.zeros(3)}, file)
    refused(path, tmp_path, capsys, "0.position_embeddings.weight has the shape none")


def test_replicas_that_differ_are_told(trained, tmp_path):
    path = save_neox(tmp_path / "ck", trained, Layout(tp=2))
    file = path / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    source = open_source(str(path))
    assert not source.notes

    def drift(state, number):
        state["single_partition_of_fp32_groups"][1] *= 1 + 1e-6

    other = save_neox(tmp_path / "other", trained, Layout(tp=2, state=drift))
    (other / file.name).replace(file)
    notes = open_source(str(path)).notes
    assert len(notes) == 1 and "differ between the ranks" in notes[0]


def test_a_link_that_leads_out_is_not_followed(trained, tmp_path):
    path = save_neox(tmp_path / "ck", trained, Layout())
    file = path / "mp_rank_00_model_states.pt"
    file.rename(tmp_path / "elsewhere.pt")
    file.symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(GrowkitError, match="outside the directory"):
        open_source(str(path))
