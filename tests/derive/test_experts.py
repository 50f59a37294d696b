"""More experts of a mixture: the same logits by transformers, the same training, and refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from continuation import Training, flatten, grow_training, nest
from sweeping import load_network, save_tiny
from trained import save_trained

from growkit.checkpoint.location import open_source
from growkit.cli import run as run_command
from growkit.cli.checked_text import choose_text
from growkit.cli.measuring import _cut_rows
from growkit.derive import proof
from growkit.derive.network import run, wide
from growkit.derive.stream import TOKENS
from growkit.derive.tiny import tiny_fields
from growkit.derive.variant import read_variant
from growkit.errors import GrowkitError, UsageError
from growkit.growth.axes import make_map, tile
from growkit.growth.choice import share_out
from growkit.growth.experts import plan_experts
from growkit.growth.plan import build_plan, set_options
from growkit.growth.rule import find_source
from growkit.growth.tree import grow as grow_tree
from growkit.models.definition import list_defined
from growkit.models.family_check import check_family
from growkit.models.gates import read_gate
from growkit.models.tables import list_shipped, read_shipped
from growkit.surgery.scores import score_experts

torch.set_num_threads(1)
BOUND = 1e-12
STATED = [kind for kind in list_shipped() if read_shipped(kind).experts]
QUICK = ("mixtral", "qwen2_moe", "granitemoe", "deepseek_v3")
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in STATED]


def tiny(kind, **fields):
    """A tiny model in memory, its architecture with it."""
    source = proof.source_of(read_variant(kind, tiny_fields(kind) | fields))
    return source, proof.read_model(read_shipped(kind), source)


def grow(source, plan, **fields):
    """A grown model in memory; fields: what its configuration says instead."""
    grown = proof.grow(source, plan)
    config = plan.grown.update(source.config) | plan.experts.fields | fields
    return replace(grown, config=config)


def gap_of(source, plan, **fields):
    return proof.gap(proof.logits_of(grow(source, plan, **fields)), proof.logits_of(source))


@pytest.mark.parametrize("times", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_more_experts_are_the_same_function(kind, times):
    source, model = tiny(kind)
    old = model.sizes["expert"]
    plan = plan_experts(model, source.config, f"{old}:{old * times}", exact=True)
    assert plan.preserved and plan.continues
    assert gap_of(source, plan) < BOUND


def test_weights_that_do_not_sum_to_1_are_the_same_function():
    for kind in ("deepseek_v3", "qwen3_moe"):
        source, model = tiny(kind, norm_topk_prob=False)
        plan = plan_experts(model, source.config, "4:8", exact=True)
        assert gap_of(source, plan) < BOUND
        if kind == "deepseek_v3":
            factor = source.config["routed_scaling_factor"]
            assert plan.experts.fields["routed_scaling_factor"] == factor / 2
            assert gap_of(source, plan, routed_scaling_factor=factor) > 1e-3


def test_each_ingredient_is_needed():
    source, model = tiny("deepseek_v3")
    plan = plan_experts(model, source.config, "4:8")
    fields = plan.experts.fields
    assert {
        name: fields[name] / source.config[name] for name in fields if name in source.config
    } == {
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
    }
    for name in ("num_experts_per_tok", "n_group", "topk_group"):
        assert gap_of(source, plan, **{name: source.config[name]}) > 1e-3, name
    # Copies beside one another, 0,0,1,1, lie in other groups.
    beside = replace(plan, maps={"expert": make_map([0, 0, 1, 1, 2, 2, 3, 3], 4, [0.5] * 8)})
    assert not beside.preserved
    assert gap_of(source, beside) > 1e-3
    uneven = replace(plan, maps={"expert": make_map([0, 1, 2, 3, 0, 0, 0, 0], 4)})
    assert not uneven.preserved
    assert gap_of(source, uneven) > 1e-3


def test_as_many_experts_a_token_are_another_function():
    source, model = tiny("mixtral")
    plan = plan_experts(model, source.config, "4:8", top="2:2")
    assert not plan.preserved and plan.experts.alike == 1
    assert gap_of(source, plan) > 1e-3
    # The copies of one expert are chosen together: it is the source with one expert a token.
    one = replace(source, config=source.config | {"num_experts_per_tok": 1})
    found = proof.gap(proof.logits_of(grow(source, plan)), proof.logits_of(one))
    assert found < BOUND
    three = plan_experts(model, source.config, "4:8", top="2:3")
    assert three.experts.alike == 0 and "do not hold every copy" in three.experts.describe_gap()
    with pytest.raises(UsageError, match="refuses 2 experts a token.*give --top 2:4"):
        plan_experts(model, source.config, "4:8", top="2:2", exact=True)


def test_noise_sets_copies_of_router_rows_apart():
    source, model = tiny("mixtral")
    even = plan_experts(model, source.config, "4:8", top="2:2")
    plan = set_options(even, noise=0.01, seed=1)
    assert even.tied_copies == ("expert",) and plan.tied_copies == () and not plan.preserved
    exact = set_options(plan_experts(model, source.config, "4:8"), noise=0.01)
    assert not exact.preserved and 1e-9 < gap_of(source, exact) < 1e-2
    before, after = source.state, grow(source, plan).state
    for name, tensor in after.items():
        row, position = plan.grown.table.match(name)
        old = before[row.name_at(find_source(plan, row, position))]
        if name.endswith(".gate.weight"):
            assert (tensor[:4] - tensor[4:]).abs().min() > 0
            assert (tensor[:4] + tensor[4:] - 2 * old).abs().max() < 1e-12
        else:
            assert (tensor == old).all()
    sized = set_options(even, noise="0.5rms", seed=1)
    for name, tensor in grow(source, sized).state.items():
        if name.endswith(".gate.weight"):
            apart = (tensor[:4] - tensor[4:]) / 2
            assert 0.35 < apart.std() / before[name].square().mean().sqrt() < 0.65
    mixed = Training(plan.grown, grow(source, plan))
    tied = Training(even.grown, grow(source, even))
    for _ in range(2):
        mixed.step(), tied.step()
    assert copies_differ(mixed) > 1e-5 > 1e-12 > copies_differ(tied)


def copies_differ(training):
    """How far the two copies of experts are from each other."""
    held = training.held.state
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    gaps = [(held[name.format(n)] - held[name.format(n + 4)]).abs().max() for n in range(4)]
    return float(max(gaps))


STEPS = 20


def weighted_norm(training):
    """The norm of all gradients, each squared number times its weight in a clip."""
    _, gradients = training.compute()
    squares = (
        (training.factor("clip", name) * gradient.numpy() ** 2).sum()
        for name, gradient in gradients.items()
    )
    return sum(squares) ** 0.5


def train_on(wrong=None):
    """The largest relative difference of losses in 20 steps after growth, by AdamW in float64."""
    source, model = tiny("mixtral")
    training = Training(model, source)
    for _ in range(3):
        training.step()
    plan = plan_experts(model, source.config, "4:8", exact=True)
    config = plan.grown.update(source.config) | plan.experts.fields
    grown = grow_training(training, plan, config)
    if wrong == "eps":
        grown.factors = {}
    if wrong in ("mu", "nu"):
        moments = getattr(grown, wrong)
        power = 1 if wrong == "mu" else 2
        for name, row in grown.rows.items():
            if "expert" in row.axes or any(axis.name == "expert" for axis in row.stacked):
                moments[name] = moments[name] * 2**power
    norms = [weighted_norm(each) for each in (training, grown)]
    if wrong is None:
        assert abs(norms[1] / norms[0] - 1) < 1e-12
    losses = [(training.step(), grown.step()) for _ in range(STEPS)]
    return max(abs(old - new) / old for old, new in losses)


def test_training_goes_on_as_the_sources():
    assert train_on() < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["eps", "mu", "nu"])
def test_training_needs_each_factor(wrong):
    assert train_on(wrong) > 1e-7


def test_multipliers_are_those_of_the_copies():
    from growkit.growth.multipliers import describe_multipliers

    source, model = tiny("mixtral")
    found = describe_multipliers(plan_experts(model, source.config, "4:12"))
    assert len(found) == 4
    for factors in found.values():
        assert factors == pytest.approx({"learning_rate": 1.0, "eps": 1 / 3, "clip": 3.0})


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_directory_grows_and_is_verified(kind, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(kind, tiny_fields(kind), source)
    assert run_command(["experts", "4:8", "--exact", str(source), str(out)]) == 0
    assert "function    preserved" in capsys.readouterr().out
    before, after = (run(load_network(path), TOKENS) for path in (source, out))
    assert proof.gap(after, before) < BOUND
    assert run_command(["verify", str(source), str(out)]) == 0
    assert run_command(["inspect", str(out)]) == 0
    assert run_command(["diff", str(source), str(out)]) in (0, 1)
    config = json.loads((out / "config.json").read_text())
    stated = json.loads((source / "config.json").read_text())
    assert config["num_experts_per_tok"] == 4
    ratio = stated["router_aux_loss_coef"] / config["router_aux_loss_coef"]
    assert ratio == pytest.approx(2)
    entry = open_source(str(out)).lineage[-1]
    assert entry["experts"]["exact"] and entry["experts"]["top"] == {"before": 2, "after": 4}


def test_the_command_line_says_what_it_does(tmp_path, capsys):
    source = tmp_path / "source"
    save_tiny("mixtral", tiny_fields("mixtral"), source)
    words = ["experts", "4:8", str(source), str(tmp_path / "out")]
    assert run_command([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "expert 4 -> 8 by copies, 2 -> 4 of them a token" in said
    assert "router_aux_loss_coef 0.001 -> 0.0005" in said and "learning rates stay" in said
    assert run_command([*words, "--dry-run", "--top", "2:2"]) == 0
    said = capsys.readouterr().out
    assert "it is the source with 1 expert a token instead of 2" in said
    for more, refusal in (
        (["--top", "2:2", "--exact"], "--exact refuses 2 experts a token"),
        (["--noise", "0.1", "--exact"], "--exact refuses --noise"),
    ):
        assert run_command([*words, *more]) == 2
        assert refusal in capsys.readouterr().err
    assert run_command(["inspect", "--rows", str(source)]) == 0
    assert "experts FROM:TO" in capsys.readouterr().out
    assert run_command([*words, "--check=16"]) == 0
    assert "PRESERVED" in capsys.readouterr().out
    assert run_command([*words, "--noise", "0.1", "--top", "2:2", "--force"]) == 0
    assert run_command(["verify", str(source), str(tmp_path / "out")]) == 0


def test_the_other_name_of_the_number_of_experts_is_kept(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny("qwen3_moe", tiny_fields("qwen3_moe"), source)
    path = source / "config.json"
    config = json.loads(path.read_text())
    config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config))
    assert run_command(["experts", "4:8", str(source), str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["num_experts"] == 8
    gap = proof.gap(run(load_network(out), TOKENS), run(load_network(source), TOKENS))
    assert gap < BOUND


def test_a_checkpoint_of_the_trainer_grows_with_its_moments(tmp_path):
    """Of a type whose files hold the experts of a layer as one tensor."""
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny("gpt_oss")[1]
    names = [name for name, _ in list_defined(model)]
    save_trained(source, model, groups=[names])
    assert run_command(["experts", "4:8", "--exact", str(source), str(out)]) == 0
    assert run_command(["verify", str(source), str(out)]) == 0
    old, new = (open_source(str(path)) for path in (source, out))
    assert new.model.sizes["expert"] == 8 and new.config["num_experts_per_tok"] == 8
    for name in old.tensors["mu"]:
        row, _ = model.table.match(name)
        times = 2 if "expert" in row.axes else 1
        for slot, factor in (("params", 1), ("mu", times), ("nu", times**2)):
            before, after = (each.tensors[slot][name].read() for each in (old, new))
            assert (np.concatenate([before] * times) / factor == after).all(), (slot, name)


EPS = 1e-3


def train_by_pytorch(path, steps):
    """Losses of a model on disk, trained on by the optimizer beside it, in float64."""
    from growkit.torch import param_groups

    network = load_network(path)
    optimizer = torch.optim.AdamW(param_groups(network, path, lr=None))
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True))
    return step_by_pytorch(network, optimizer, steps)


def step_by_pytorch(network, optimizer, steps):
    losses = []
    with wide(), torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            logits = network(TOKENS, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def save_with_optimizer(kind, path):
    """A tiny mixture after a few steps, with what transformers' Trainer saves of its optimizer."""
    save_tiny(kind, tiny_fields(kind), path)
    network = load_network(path)
    decayed, exempt = [], []
    for name, parameter in network.named_parameters():
        (exempt if "norm" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": exempt, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, eps=EPS)
    step_by_pytorch(network, optimizer, 3)
    network.save_pretrained(path)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")


def test_an_optimizer_of_pytorch_goes_on_as_the_sources(tmp_path, capsys):
    """Its parameters are those of memory, where the experts of a layer are one."""
    source, split, kept = (tmp_path / name for name in ("source", "split", "kept"))
    save_with_optimizer("mixtral", source)
    words = ["experts", "4:8", "--exact", str(source)]
    assert run_command([*words, str(split), "--groups", "split"]) == 0
    said = capsys.readouterr().out
    assert "learning rates stay; training continues exactly as the source's would" in said
    assert run_command(["verify", str(source), str(split)]) == 0
    assert run_command([*words, str(kept)]) == 0
    before = train_by_pytorch(source, 5)
    after, wrong = train_by_pytorch(split, 5), train_by_pytorch(kept, 5)
    assert max(abs(one - other) for one, other in zip(before, after, strict=True)) < 1e-11
    # With the source's eps the copies take other steps.
    assert max(abs(one - other) for one, other in zip(before, wrong, strict=True)) > 1e-6


def count_by_hooks(path, tokens, top):
    """How often each expert is chosen, by what the routers themselves return."""
    network, found = load_network(path).float(), []

    def count(module, inputs, outputs):
        found.append(torch.bincount(outputs[2].flatten(), minlength=outputs[0].shape[-1]).numpy())

    for name, module in network.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.as_tensor(tokens))
    return np.array(found)


def test_experts_are_copied_by_their_worth(tmp_path, capsys):
    """Layer by layer: an expert of one layer has nothing to do with another layer's."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_with_optimizer("mixtral", source)
    words = ["experts", "4:6", "--choose", "fisher", str(source), str(out)]
    assert run_command(words) == 0
    said = capsys.readouterr().out
    assert "experts have more copies than others" in said and "2 -> 3 of them a token" in said
    assert run_command(["verify", str(source), str(out)]) == 0
    old, new = open_source(str(source)), open_source(str(out))
    index = new.lineage[-1]["experts"]["by_layer"]
    expert = "model.layers.{}.block_sparse_moe.experts.{}.w{}.weight"
    gate = "model.layers.{}.block_sparse_moe.gate.weight"
    params, mu, nu = (old.tensors[slot] for slot in ("params", "mu", "nu"))
    for layer, copied in enumerate(index):
        names = [[expert.format(layer, n, m) for m in (1, 2, 3)] for n in range(4)]
        worth = [sum((params[n].read() ** 2 * nu[n].read()).sum() for n in each) for each in names]
        wanted = share_out(np.array(worth), 6)
        assert copied == wanted and copied[:4] == [0, 1, 2, 3]
        count = np.bincount(copied)
        for number, origin in enumerate(copied):
            name, known = expert.format(layer, number, 1), expert.format(layer, origin, 1)
            assert (new.tensors["params"][name].read() == params[known].read()).all()
            after = new.tensors["nu"][name].read()
            assert np.allclose(after, nu[known].read() / count[origin] ** 2, rtol=1e-12)
        rows = new.tensors["params"][gate.format(layer)].read()
        assert (rows == params[gate.format(layer)].read()[copied]).all()
    assert len({tuple(copied) for copied in index}) > 1, "layers must differ to tell them apart"
    # The same in memory.
    plan = plan_experts(old.model, old.config, "4:6", scores=score_experts(old))
    grown = flatten(
        grow_tree(nest({n: t.read() for n, t in params.items()}, old.model), plan), plan.grown
    )
    assert all((grown[n] == new.tensors["params"][n].read()).all() for n in grown)
    with pytest.raises(ValueError, match="by_layer does not list"):
        build_plan("experts", "", old.model, {"expert": tile(4, 8)}, experts=plan.experts)


def test_experts_are_copied_by_their_use(tmp_path, capsys):
    source, out, text = (tmp_path / name for name in ("source", "out", "text.txt"))
    save_tiny("mixtral", tiny_fields("mixtral"), source)
    assert run_command(["experts", "4:9", "--choose", "use", str(source), str(out)]) == 0
    assert "from 1 to" in capsys.readouterr().out
    assert run_command(["verify", str(source), str(out)]) == 0
    tokens = _cut_rows(choose_text(open_source(str(source)), 8192).tokens)
    counts = count_by_hooks(source, tokens, 2)
    wanted = [share_out(each.astype(float), 9) for each in counts]
    assert open_source(str(out)).lineage[-1]["experts"]["by_layer"] == wanted
    assert run(load_network(out), TOKENS).isfinite().all()
    for words, refusal in (
        ("4:6 --choose fisher", "reads Adam's second moments, and .* has none"),
        ("4:6 --choose usage", "--choose is one of all, use, fisher"),
        ("4:6 --choose-text x", "--choose-text is the text of --choose use"),
        ("4:6 --choose use --exact", "--exact refuses --choose"),
        ("4:3 --choose use", "more experts than the source's 4"),
        ("4:6 --choose use --top 2:7", "7 experts a token, and there are 6"),
        ("4:6", "6 is not a multiple of 4.*--choose copies some more often"),
        ("4:6 --from-dense 4", "unexpected extra argument"),
        ("--from-dense 4 --choose use", "those made of a dense model are alike"),
    ):
        assert run_command(["experts", *words.split(), str(source), str(tmp_path / "no")]) == 2
        assert re.search(refusal, capsys.readouterr().err), words
    words = ["experts", "4:6", "--choose=use", "--choose-text", str(text)]
    assert run_command([*words, str(source), str(tmp_path / "no")]) == 1
    assert "no tokenizer.json" in capsys.readouterr().err
    groups = read_shipped("deepseek_v3").model(expert=4)
    with pytest.raises(UsageError, match="for gates without groups"):
        plan_experts(groups, {"num_experts_per_tok": 2}, "4:6", scores=np.ones((groups.layer, 4)))
    with pytest.raises(UsageError, match="each of 4 experts in each of"):
        plan_experts(read_shipped("mixtral").model(expert=4), {}, "4:6", scores=np.ones(4))


def test_copies_are_worth_as_nearly_as_much_as_each_other():
    assert share_out(np.array([8.0, 4.0, 2.0, 2.0]), 8) == [0, 1, 2, 3, 0, 0, 0, 1]
    assert share_out(np.zeros(3), 6) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "count,top,words",
    [
        ("4:10", None, "10 is not a multiple of 4; the nearest are 8 and 12"),
        ("4:4", None, "nothing grows"),
        ("8:16", None, "begins with 8, and the source has 4"),
        ("4x", None, "is written FROM:TO, as 4:8; got '4x'"),
        ("4:2", None, "2 is not a multiple of 4"),
        ("4:8", "2:9", "asks for 9 experts a token, and there are 8"),
        ("4:8", "2:0", "asks for 0 experts a token"),
        ("4:8", "1:2", "begins with 1, and the source has 2"),
        ("4:80000", None, "more than growkit makes"),
    ],
)
def test_what_makes_no_mixture_is_refused(count, top, words):
    model = read_shipped("mixtral").model(expert=4)
    with pytest.raises(UsageError, match=words):
        plan_experts(model, {"num_experts_per_tok": 2}, count, top)


def test_models_without_a_known_gate_are_refused():
    with pytest.raises(UsageError, match="Olmo2 model has no experts"):
        read_gate(read_shipped("olmo2"), {})
    with pytest.raises(UsageError, match="how a Phimoe model chooses its experts is not in its"):
        read_gate(read_shipped("phimoe"), {})
    with pytest.raises(GrowkitError, match="lacks num_experts_per_tok"):
        read_gate(read_shipped("dots1"), {})
    with pytest.raises(GrowkitError, match="whole number"):
        read_gate(read_shipped("mixtral"), {"num_experts_per_tok": "2"})


def test_a_gate_whose_weights_nothing_scales_is_not_exact():
    family = read_shipped("mixtral")
    gate = {"gate": "sigmoid", "normalised": False, "top": "num_experts_per_tok"}
    model = replace(family, experts=gate).model(expert=4)
    assert not plan_experts(model, {}, "4:8").preserved
    with pytest.raises(UsageError, match="do not sum to 1"):
        plan_experts(model, {}, "4:8", exact=True)


def test_more_experts_without_a_choice_are_not_called_exact():
    model = read_shipped("mixtral").model(expert=4)
    assert not build_plan("width", "", model, {"expert": tile(4, 8)}).preserved


def test_tables_state_gates_that_are_whole():
    for kind in STATED:
        check_family(read_shipped(kind))
    family = read_shipped("mixtral")
    for wrong, words in (
        ({"gate": "softmin"}, "gate is one of"),
        ({"gate": "softmax", "normalised": True}, "lacks top"),
        ({**family.experts, "topp": "x"}, "has no 'topp'"),
        ({**family.experts, "top": "k"}, "states no value of 'k'"),
    ):
        with pytest.raises(GrowkitError, match=words):
            check_family(replace(family, experts=wrong))
