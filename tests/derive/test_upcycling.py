"""A dense model becomes a mixture: the same logits by transformers, what breaks them, moments."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from sweeping import load_network, save_tiny

import growkit
from growkit.checkpoint.location import open_source
from growkit.cli import run as run_command
from growkit.derive import proof
from growkit.derive.network import name_as_files, run, wide
from growkit.derive.stream import TOKENS
from growkit.derive.tiny import tiny_fields
from growkit.errors import GrowkitError, UsageError
from growkit.growth.mixture import plan_mixture
from growkit.growth.plan import set_options
from growkit.models.definition import list_defined
from growkit.models.family_check import check_family
from growkit.models.tables import list_mixtures, read_shipped
from growkit.surgery.grow import prepare_growth

torch.set_num_threads(1)
BOUND = 1e-12
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
# Dense type, its options, the words of the command, the mixture, experts, experts a token.
CASES = {
    "llama": ("llama", {}, "8 --top 2 --exact", "mixtral", 8, 2),
    "qwen2 shared": ("qwen2", {}, "4 --top 3 --shared --exact", "qwen2_moe", 4, 3),
    "qwen3 in parts": ("qwen3", {}, "4 --every 2 --granularity 2", "qwen3_moe", 8, 4),
}
SLOW = {
    "mistral": ("mistral", {"sliding_window": 4}, "4", "mixtral", 4, 2),
    "qwen2 windows": ("qwen2", WINDOW, "4 --every 3", "qwen2_moe", 4, 2),
    "qwen2 silent": ("qwen2", {}, "4", "qwen2_moe", 4, 2),
    "llama otherwise": ("llama", {}, "4 --to qwen2_moe --shared", "qwen2_moe", 4, 2),
    "llama tied": ("llama", {"tie_word_embeddings": True}, "2", "mixtral", 2, 2),
    "qwen3 softmax": ("qwen3", {}, "4 --gate softmax --exact", "qwen3_moe", 4, 2),
    "qwen2 softmax": ("qwen2", {}, "4 --gate softmax --shared", "qwen2_moe", 4, 2),
    "qwen3 softmax of all": (
        "qwen3",
        {},
        "2 --gate softmax --router random --top 4 --granularity 2",
        "qwen3_moe",
        4,
        4,
    ),
    "qwen3 noise": ("qwen3", {}, "4 --router zero --noise 0.5", "qwen3_moe", 4, 2),
    "olmo2": ("olmo2", {}, "4 --granularity 4 --top 8", "flex_olmo", 16, 8),
    "qwen3 window": ("qwen3", WINDOW | {"max_window_layers": 0}, "4", "qwen3_moe", 4, 2),
}
ALL = [
    *(pytest.param(case, id=name) for name, case in CASES.items()),
    *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
]


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Saves a tiny model of a type, once."""
    known = {}

    def make(kind, fields=()):
        key = json.dumps([kind, dict(fields)])
        if key not in known:
            known[key] = tmp_path_factory.mktemp("dense") / "model"
            save_tiny(kind, tiny_fields(kind) | dict(fields), known[key])
        return known[key]

    return make


def logits_at(path):
    return run(load_network(path), TOKENS)


@pytest.mark.parametrize("case", ALL)
def test_a_mixture_is_the_same_function(case, save, tmp_path, capsys):
    dense, fields, words, kind, count, top = case
    source, out = save(dense, fields), tmp_path / "out"
    assert run_command(["experts", "--from-dense", *words.split(), str(source), str(out)]) == 0
    said = capsys.readouterr().out
    assert "function    preserved" in said and f"{count} experts" in said
    assert proof.gap(logits_at(out), logits_at(source)) < BOUND
    grown = open_source(str(out))
    assert grown.model.kind == kind and grown.model.sizes["expert"] == count
    assert grown.config["num_experts_per_tok"] == top
    assert run_command(["verify", str(source), str(out)]) == 0
    entry = growkit.read_lineage(out).last_growth(out)
    assert entry.preserved and not entry.continues
    assert entry.source.fingerprint == open_source(str(source)).fingerprint
    assert run_command(["inspect", str(out)]) == 0 and run_command(["diff", str(source), str(out)])


def plan_of(path, experts=4, top=2, **options):
    source = open_source(str(path))
    return source, plan_mixture(source.model, source.config, experts, top, **options)


def make(source, plan):
    """A mixture in memory, with moments where the source has some."""
    contents = prepare_growth(source, plan)
    state = {
        name: torch.from_numpy(recipe.make_array().copy())
        for name, recipe in contents.recipes["params"].items()
    }
    return proof.Grown(contents.config, state)


def gap_of(source, grown, **fields):
    changed = replace(grown, config=grown.config | fields)
    return proof.gap(proof.logits_of(changed), logits_at(source.path))


def test_each_ingredient_is_needed(save):
    source, plan = plan_of(save("qwen2"), shared=True, granularity=2, top=4)
    grown = make(source, plan)
    assert gap_of(source, grown) < BOUND
    # What transformers takes for fields that config.json leaves out is another model.
    assert gap_of(source, grown, rms_norm_eps=1e-6) > 1e-6
    assert gap_of(source, grown, rope_parameters={"rope_type": "default", "rope_theta": 3e3}) > 1e-6
    # A token that goes through other parts of the mlp, weights that do not sum to 1.
    assert gap_of(source, grown, num_experts_per_tok=3) > 1e-3
    assert gap_of(source, grown, norm_topk_prob=False) > 1e-3
    # The parts of a copy have equal rows of the router; shuffled ones are chosen apart.
    gate = "model.layers.0.mlp.gate.weight"
    rows = grown.state[gate]
    assert (rows[::2] == rows[1::2]).all() and (rows[0] != rows[2]).all()
    apart = replace(grown, state=grown.state | {gate: rows[[0, 2, 4, 6, 1, 3, 5, 7]]})
    assert gap_of(source, apart) > 1e-3
    # Each factor of a down-projection.
    for part in ("experts.0", "shared_expert"):
        name = f"model.layers.1.mlp.{part}.down_proj.weight"
        wrong = replace(grown, state=grown.state | {name: grown.state[name] / 2})
        assert gap_of(source, wrong) > 1e-4, part


def test_where_it_is_another_function_the_gap_is_said(save):
    source, plan = plan_of(save("qwen3"), gate="softmax", router="random")
    assert not plan.preserved and "sum to 1 but to about 0.5" in plan.experts.describe_gap()
    assert gap_of(source, make(source, plan)) > 1e-6
    source, plan = plan_of(save("qwen3"), granularity=2, router="zero")
    assert not plan.preserved and "--router random" in plan.experts.describe_gap()
    source, plan = plan_of(save("qwen3"), granularity=2)
    noisy = set_options(plan, noise=1.0)
    assert plan.preserved and not noisy.preserved
    assert gap_of(source, make(source, noisy)) > 1e-6
    with pytest.raises(UsageError, match="--exact refuses this mixture: .*do not sum to 1"):
        plan_of(save("qwen3"), gate="softmax", router="random", exact=True)


def test_the_ties_of_a_zero_router_are_told(save):
    _, plan = plan_of(save("qwen3"), router="zero")
    assert plan.tied_copies == ("expert",)
    assert plan_of(save("qwen3"))[1].tied_copies == ()


def squares(grown, tokens):
    """The mean of squared gradients of single tokens, by names in files, each a batch of its own.

    A token alone has one gradient, and its square is what noise adds to a second moment.
    """
    network = proof.network_of(grown)
    network.requires_grad_(True)
    sums = {}
    for token in tokens:
        network.zero_grad()
        with wide(), torch.enable_grad():
            logits = network(torch.tensor([[token]]), use_cache=False).logits[0]
            torch.nn.functional.cross_entropy(logits, torch.tensor([token + 1])).backward()
        found = {
            name: torch.zeros_like(each) if each.grad is None else each.grad
            for name, each in network.named_parameters()
        }
        for name, gradient in name_as_files(network, found).items():
            sums[name] = sums.get(name, 0.0) + gradient.double() ** 2 / len(tokens)
    return sums


@pytest.mark.parametrize(
    "kind,options",
    [
        ("qwen2", {"granularity": 2, "top": 4, "shared": True}),
        pytest.param("llama", {}, marks=pytest.mark.slow),
        pytest.param("qwen3", {"gate": "softmax"}, marks=pytest.mark.slow),
    ],
)
def test_nu_is_that_of_single_tokens(kind, options, save):
    """Summed over the copies, which have different tokens, with weights that are all but equal."""
    source, plan = plan_of(save(kind), **options)
    grown, tokens = make(source, plan), range(3, 15)
    for name in (each for each in grown.state if each.endswith(".gate.weight")):
        grown.state[name] *= 1e-8
    dense = proof.Grown(source.config, stack(source))
    before, after = squares(dense, tokens), squares(grown, tokens)
    arrays = {name: each.numpy() for name, each in before.items()}
    moments = with_moments(source, {"nu": arrays, "mu": arrays})
    contents = prepare_growth(moments, plan)
    assert compare_nu(contents, plan, after) < 1e-6
    mu = contents.recipes["mu"]
    assert not any(mu[name].make_array().any() for name in mu if ".experts." in name)
    # The rule of growth by copies that are all chosen is another.
    upcycling = replace(plan.upcycling, chosen=plan.upcycling.copies)
    other = replace(plan, experts=replace(plan.experts, upcycling=upcycling))
    assert compare_nu(prepare_growth(moments, other), plan, after) > 0.1


def compare_nu(contents, plan, squared):
    """The largest difference from the squares, of the largest of each parameter."""
    parts = plan.upcycling.granularity
    found, wanted = {}, {}
    for name, recipe in contents.recipes["nu"].items():
        row, position = plan.grown.table.match(name)
        if row.name.endswith("gate.weight"):
            continue
        # Copies are summed: which of them a token goes through, the router says.
        key = (row.name, *position[:1], *(expert % parts for expert in position[1:]))
        found[key] = found.get(key, 0.0) + recipe.make_array()
        wanted[key] = wanted.get(key, 0.0) + squared[name].numpy()
    return max(
        float(np.abs(found[key] - array).max() / max(np.abs(array).max(), 1e-30))
        for key, array in wanted.items()
    )


def stack(source):
    return {
        name: torch.from_numpy(tensor.read().copy())
        for name, tensor in source.tensors["params"].items()
    }


def with_moments(source, slots):
    """A source in memory that has moments."""
    from growkit.checkpoint.tensor import wrap_array

    tensors = {
        slot: {n: wrap_array(a) for n, a in arrays.items()} for slot, arrays in slots.items()
    }
    return replace(source, tensors=source.tensors | tensors)


def decay_groups(network):
    """The parameters of a network in the two groups of transformers' Trainer."""
    kept = set(transformers.Trainer.get_decay_parameter_names(None, network))
    named = dict(network.named_parameters())
    return [
        {"params": [named[n] for n in named if n in kept], "weight_decay": 0.1},
        {"params": [named[n] for n in named if n not in kept], "weight_decay": 0.0},
    ]


def train(network, optimizer, steps):
    """A few steps on fixed texts; the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = network(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_checkpoint_of_the_trainer_becomes_one_of_a_mixture(save, tmp_path, capsys):
    """Its optimizer.pt numbers the parameters of memory, which holds experts as one."""
    source, out = tmp_path / "source", tmp_path / "out"
    network = load_network(save("qwen3")).float()
    optimizer = torch.optim.AdamW(decay_groups(network), lr=1e-3)
    train(network, optimizer, 3)
    network.save_pretrained(source)
    torch.save(optimizer.state_dict(), source / "optimizer.pt")
    words = ["experts", "--from-dense", "4", "--every", "2", str(source), str(out)]
    assert run_command([*words, "--groups", "split"]) == 2
    assert "has neither, so leave it out" in capsys.readouterr().err
    assert run_command(words) == 0
    said = capsys.readouterr().out
    assert "mu copied (zero in experts), nu copied (x 0.125 in experts" in said
    assert run_command(["verify", str(source), str(out)]) == 0
    mixture = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert [n for n, _ in mixture.named_parameters()] == [
        name for name, _ in list_defined(open_source(str(out)).model)
    ]
    again = torch.optim.AdamW(decay_groups(mixture), lr=1e-3)
    again.load_state_dict(torch.load(out / "optimizer.pt", weights_only=True))
    named, dense = dict(mixture.named_parameters()), dict(network.named_parameters())
    layer = "model.layers.1.mlp."
    entry = again.state[named[f"{layer}experts.gate_up_proj"]]
    pair = [optimizer.state[dense[f"{layer}{n}_proj.weight"]] for n in ("gate", "up")]
    wanted = torch.cat([each["exp_avg_sq"] for each in pair]) / (2 * 4)
    assert entry["step"] == 3 and not entry["exp_avg"].any()
    assert all(torch.allclose(each, wanted, rtol=1e-6, atol=0) for each in entry["exp_avg_sq"])
    # A router begins with a mean: with nothing under this count its first step would be too large.
    router = again.state[named[f"{layer}gate.weight"]]["exp_avg_sq"]
    assert router.min() > 0 and torch.allclose(router, pair[0]["exp_avg_sq"].mean())
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_norm.weight"):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(again.state[named[name]][key], optimizer.state[dense[name]][key])
    # The loss goes on from where it stood.
    assert abs(train(mixture, again, 3)[0] - train(network, optimizer, 1)[0]) < 1e-5


@pytest.mark.parametrize(
    "kind,words,refusal",
    [
        ("qwen3", "1", "from 2 to 65536 experts, and this one would have 1"),
        ("qwen3", "8x", "--from-dense takes a whole number"),
        ("qwen3", "4 --top 5", "5 experts a token, and there are 4; between 1 and 4 work"),
        ("qwen3", "4 --top 2:4", "--top takes a whole number"),
        ("qwen3", "4 --granularity 5", "5 does not divide the mlp's 24 units; 4 and 6 do"),
        ("qwen3", "4 --granularity 2 --top 3", "3 is not a multiple of --granularity 2.*--top 2"),
        ("qwen3", "4 --granularity 0", "--granularity is at least 1"),
        ("qwen3", "4 --every 9", "--every 9 gives no layer experts: the source has 3 layers"),
        ("qwen3", "4 --shared", "types that have a shared expert, as qwen2_moe"),
        ("qwen3", "4 --router copy", "a dense model has none; it takes random or zero"),
        ("qwen3", "4 --router radom", "--router is one of random, zero.*did you mean 'random'"),
        ("qwen3", "4 --gate sotfmax", "--gate is one of normalised, softmax"),
        ("qwen3", "4 --gate softmax --router random --exact", "do not sum to 1"),
        ("qwen3", "4 --granularity 2 --noise 0.1 --exact", "--exact refuses --noise here"),
        ("qwen3", "4 --to qwen2_moe", "becomes qwen3_moe, and --to is 'qwen2_moe'"),
        ("qwen3", "4 --to olmoe", "norms over the queries and keys of all heads"),
        ("qwen3", "4 --to qwen3_mo", "did you mean 'qwen3_moe'"),
        ("qwen3", "4 --moments first", "--moments first is for copies beside an original"),
        ("qwen3", "4:8", "--from-dense takes a whole number"),
        ("llama", "4 --every 2", "a Mixtral model has them in every layer"),
        ("llama", "4 --gate softmax", "always sum to 1"),
        ("qwen3_moe", "4", "a mixture of 4 experts already; `growkit experts 4:8`"),
        ("gpt2", "4", "becomes no mixture that growkit knows: --from-dense takes olmo2, llama"),
    ],
)
def test_what_makes_no_mixture_is_refused(kind, words, refusal, save, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["experts", "--from-dense", *words.split(), str(save(kind)), str(out)]
    assert run_command(words) == 2 and not out.exists()
    said = capsys.readouterr().err
    assert re.search(refusal, said), said
    assert len(said.strip().splitlines()) == 1


def test_what_has_no_place_in_the_mixture_is_refused(save):
    with pytest.raises(UsageError, match="no place for model.layers.{layer}.self_attn.q_proj.bias"):
        plan_of(save("llama", {"attention_bias": True}))
    with pytest.raises(UsageError, match="window in 2 of 3 layers, and a Qwen3Moe model has it in"):
        plan_of(save("qwen3", WINDOW))
    source, plan = plan_of(save("qwen3"))
    with pytest.raises(UsageError, match="was made of a 'qwen3' model, and this is a 'llama'"):
        growkit.write_grown(open_source(str(save("llama"))), plan, "out")
    with pytest.raises(UsageError, match="on disk: growkit.write_grown"):
        growkit.grow({}, plan)
    for option in ("--every", "--to", "--shared"):
        words = ["experts", "4:8", option, *(["2"] if option != "--shared" else [])]
        assert run_command([*words, str(save("qwen3_moe")), "out"]) == 2


@pytest.mark.slow
def test_the_command_line_checks(save, tmp_path, capsys):
    words = ["experts", "--from-dense=4", "--check=16", str(save("qwen3")), str(tmp_path / "out")]
    assert run_command(words) == 0
    assert "PRESERVED" in capsys.readouterr().out


def test_the_command_line_adds_tokens_and_grows_on(save, tmp_path, capsys):
    source, out = save("qwen3"), tmp_path / "out"
    words = ["experts", "--from-dense=4", "--router", "zero", "--vocab", "+3"]
    assert run_command([*words, str(source), str(out)]) == 0
    said = capsys.readouterr().out
    assert "every token goes to the same experts" in said
    assert "router zero" in said and "vocab 40 -> 43" in said
    assert run_command(["verify", str(source), str(out)]) == 0
    assert run_command(["verify", str(save("llama")), str(out)]) == 2
    assert "was made of a 'qwen3' model" in capsys.readouterr().err
    # More experts of what was made, and layers of it.
    for more in (["experts", "4:8"], ["depth", "--map", "3:4"]):
        assert run_command([*more, str(out), str(tmp_path / more[0])]) == 0
        assert run_command(["verify", str(out), str(tmp_path / more[0])]) == 0
        assert run_command(["inspect", "--new", str(tmp_path / more[0])]) == 0


def test_a_lineage_that_makes_no_mixture_is_told(save, tmp_path, capsys):
    source, out = save("qwen3"), tmp_path / "out"
    assert run_command(["experts", "--from-dense", "4", str(source), str(out)]) == 0
    entries = json.loads((out / "lineage.json").read_text())
    for wrong in ({"copies": 0}, {"scale": 2.0}, {"granularity": 1 << 20}, {"router": 3}):
        changed = json.loads(json.dumps(entries))
        changed[-1]["experts"]["upcycling"] |= wrong
        (out / "lineage.json").write_text(json.dumps(changed))
        assert run_command(["verify", str(source), str(out)]) == 1
        assert "not a plan that can be read" in capsys.readouterr().err
    # A plan of another layout makes another model.
    entries[-1]["experts"]["upcycling"]["router"] = "zero"
    (out / "lineage.json").write_text(json.dumps(entries))
    assert run_command(["verify", str(source), str(out)]) == 1
    assert "gate.weight' of params differs in" in capsys.readouterr().err


def test_tables_that_state_mixtures_are_whole():
    for kind in list_mixtures():
        check_family(read_shipped(kind))
    family = read_shipped("mixtral")
    for wrong, words in (
        ({"upcycling": {"form": []}}, "'form' is missing, or none of these"),
        ({"upcycling": {"from": [], "window": "x"}}, "which layers have a window"),
        ({"experts": {}}, "needs .experts."),
        ({"upcycled": {"x": "zeros"}}, "which is no row of the table"),
    ):
        with pytest.raises(GrowkitError, match=words):
            check_family(replace(family, **wrong))
