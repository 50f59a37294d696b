"""Learning rates by muP after growth in width, row by row.

The rule is table 3 of arXiv 2203.03466 (Adam): hidden and output matrices 1/fan-in, embeddings,
biases and norms 1. Every factor that it gives is written out here for GPT-NeoX and Llama.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from growkit.cli import run
from growkit.entries import Growth, read_entry
from growkit.errors import UsageError
from growkit.growth.depth import plan_depth
from growkit.growth.multipliers import compute_multipliers, describe_rates
from growkit.growth.plan import MUP, combine_plans, set_options
from growkit.growth.vocabulary import plan_vocabulary
from growkit.growth.width import plan_width
from growkit.lineage import Lineage
from growkit.models.definition import list_defined
from growkit.models.gpt_neox import GPT_NEOX
from growkit.models.llama import LLAMA
from growkit.surgery.groups import find_factors
from trainer.run.growth import select_multipliers

NEOX_SIZES = {"layer": 2, "embed": 16, "head": 2, "mlp": 12, "vocab": 24, "context": 16}
NEOX = GPT_NEOX.model(rotary_pct=0.5, tied=False, **NEOX_SIZES)
NEOX_TIED = GPT_NEOX.model(rotary_pct=0.5, tied=True, **NEOX_SIZES)
LLAMA_SIZES = {"layer": 2, "embed": 24, "kv": 2, "group": 3, "head_dim": 4, "mlp": 20, "vocab": 24}
LLAMA_UNTIED = LLAMA.model(tied=False, **LLAMA_SIZES)
LLAMA_TIED = LLAMA.model(tied=True, **LLAMA_SIZES)

# (source, growth, {row: factor}); all other rows have 1: the embedding, norms and biases.
CASES = {
    # embed 16 to 32, heads 2 to 4, mlp 12 to 24: every fan-in doubles.
    "neox, copies": (
        NEOX,
        {"embed": "2x"},
        {
            "attention.query_key_value.weight": 1 / 2,
            "attention.dense.weight": 1 / 2,
            "mlp.dense_h_to_4h.weight": 1 / 2,
            "mlp.dense_4h_to_h.weight": 1 / 2,
            "embed_out.weight": 1 / 2,
        },
    ),
    # The norm before a tied head carries 1/2 of its copies: the multiplier of the output.
    "neox, copies, tied": (
        NEOX_TIED,
        {"embed": "2x"},
        {
            "attention.query_key_value.weight": 1 / 2,
            "attention.dense.weight": 1 / 2,
            "mlp.dense_h_to_4h.weight": 1 / 2,
            "mlp.dense_4h_to_h.weight": 1 / 2,
            "final_layer_norm.weight": 1 / 2,
            "final_layer_norm.bias": 1 / 2,
        },
    ),
    # embed 16 to 24 by padding, heads 2 to 3, mlp 12 to 30 by uneven copies.
    "neox, padded": (
        NEOX,
        {"embed": 24, "mlp": 30},
        {
            "attention.query_key_value.weight": 16 / 24,
            "attention.dense.weight": 2 / 3,
            "mlp.dense_h_to_4h.weight": 16 / 24,
            "mlp.dense_4h_to_h.weight": 12 / 30,
            "embed_out.weight": 16 / 24,
        },
    ),
    # A tied head that is padded has no place for muP's multiplier: see docs/operators.md.
    "neox, padded, tied": (
        NEOX_TIED,
        {"embed": 24, "mlp": 30},
        {
            "attention.query_key_value.weight": 16 / 24,
            "attention.dense.weight": 2 / 3,
            "mlp.dense_h_to_4h.weight": 16 / 24,
            "mlp.dense_4h_to_h.weight": 12 / 30,
        },
    ),
    # head_dim 8 to 12 makes embed 24: dense reads 2 heads of 12.
    "neox, head_dim": (
        NEOX,
        {"head_dim": 12, "mlp": 12},
        {
            "attention.query_key_value.weight": 16 / 24,
            "attention.dense.weight": 16 / 24,
            "mlp.dense_h_to_4h.weight": 16 / 24,
            "embed_out.weight": 16 / 24,
        },
    ),
    # kv 2 to 4 with 3 query heads each: o_proj reads 48 instead of 24.
    "llama, copies": (
        LLAMA_UNTIED,
        {"embed": "2x"},
        {
            "self_attn.q_proj.weight": 1 / 2,
            "self_attn.k_proj.weight": 1 / 2,
            "self_attn.v_proj.weight": 1 / 2,
            "self_attn.o_proj.weight": 1 / 2,
            "mlp.gate_proj.weight": 1 / 2,
            "mlp.up_proj.weight": 1 / 2,
            "mlp.down_proj.weight": 1 / 2,
            "lm_head.weight": 1 / 2,
        },
    ),
    "llama, wider mlp, tied": (
        LLAMA_TIED,
        {"mlp": 50},
        {"mlp.down_proj.weight": 20 / 50},
    ),
    # embed 24 to 36 by padding; the heads stay.
    "llama, padded": (
        LLAMA_UNTIED,
        {"embed": 36, "heads": 6, "mlp": 20},
        {
            "self_attn.q_proj.weight": 24 / 36,
            "self_attn.k_proj.weight": 24 / 36,
            "self_attn.v_proj.weight": 24 / 36,
            "mlp.gate_proj.weight": 24 / 36,
            "mlp.up_proj.weight": 24 / 36,
            "lm_head.weight": 24 / 36,
        },
    ),
}


def plan_by_mup(model, sizes, noise="0.5rms"):
    """A growth in width that training does not go on exactly after, with muP's rates."""
    return dataclasses.replace(
        plan_width(model, **sizes),
        noise=float(noise.removesuffix("rms")),
        noise_unit="rms",
        rates=MUP,
    )


def shorten(name):
    """A row's name without its model's first words and layer."""
    return (
        name.split("{layer}.")[-1].split("{/layer}.")[-1].split("gpt_neox.")[-1].split("model.")[-1]
    )


def list_rates(plan):
    """{row: its factor} of the tree that the optimizer multiplies by, ones left out."""
    tree = compute_multipliers(plan.grown, [plan])["learning_rate"]
    found = {}
    for row in plan.grown.table.rows:
        node = tree
        for key in row.path:
            node = node[key]
        assert isinstance(node, float), "one number a row, which PyTorch's groups can hold"
        found[shorten(row.name)] = node
    return {name: rate for name, rate in found.items() if rate != 1.0}


@pytest.mark.parametrize("name", CASES)
def test_every_row_has_the_factor_of_the_table(name):
    model, sizes, wanted = CASES[name]
    plan = plan_by_mup(model, sizes)
    assert not plan.continues
    assert list_rates(plan) == pytest.approx(wanted)
    assert {shorten(row): rate for row, rate in describe_rates(plan).items()} == list_rates(plan)


def test_groups_of_pytorch_hold_them():
    plan = plan_by_mup(LLAMA_UNTIED, CASES["llama, padded"][1])
    factors = find_factors(plan.grown, list_defined(plan.grown), [plan])
    assert factors["model.layers.1.mlp.up_proj.weight"].rate == pytest.approx(24 / 36)
    assert factors["model.layers.1.self_attn.o_proj.weight"].rate == 1.0
    assert factors["model.embed_tokens.weight"].rate == 1.0


def test_even_copies_have_the_rates_of_exact_growth():
    """There muP's factors are those with which training would go on exactly, but for the noise."""
    for model in (NEOX, NEOX_TIED, LLAMA_UNTIED, LLAMA_TIED):
        exact = plan_width(model, embed="2x")
        noisy = plan_by_mup(model, {"embed": "2x"})
        assert exact.continues and not noisy.continues
        trees = [compute_multipliers(plan.grown, [plan]) for plan in (exact, noisy)]
        assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
        assert all(map(np.array_equal, *map(jax.tree.leaves, trees)))


def test_where_training_goes_on_exactly_it_does():
    """Uneven copies have other rates by muP than by their shares; exact growth keeps its own."""
    uneven = plan_width(NEOX, mlp=30)
    assert uneven.continues
    asked = set_options(uneven, rates=MUP)
    trees = [compute_multipliers(uneven.grown, [plan]) for plan in (uneven, asked)]
    assert all(map(np.array_equal, *map(jax.tree.leaves, trees)))


def test_growths_after_each_other_multiply():
    first = plan_by_mup(NEOX, {"embed": "2x"})
    second = dataclasses.replace(plan_width(first.grown, embed=48, mlp=30), rates=MUP)
    tree = compute_multipliers(second.grown, [first, second])["learning_rate"]
    layers = tree["layers"]
    assert layers["mlp"]["dense_h_to_4h"]["weight"] == pytest.approx(16 / 48)
    assert layers["mlp"]["dense_4h_to_h"]["weight"] == pytest.approx(12 / 30)
    assert layers["attention"]["dense"]["weight"] == pytest.approx(2 / 6)
    assert tree["embed_in"]["weight"] == layers["mlp"]["dense_h_to_4h"]["bias"] == 1.0


def test_the_lineage_says_it_and_training_follows():
    plan = plan_by_mup(NEOX, {"embed": 24})
    entry = json.loads(json.dumps(Growth.of(plan).to_json()))
    assert entry["rates"]["rule"] == "mup" and "optimizer" not in entry
    assert entry["rates"]["learning_rate"]["embed_out.weight"] == pytest.approx(16 / 24)
    assert read_entry(entry).plan(NEOX).rates == MUP
    assert read_entry(entry).to_json() == entry
    lineage = Lineage.read([entry])
    assert lineage.multiplied and not lineage.continues
    found = select_multipliers("auto", lineage, plan.grown)
    assert found.learning_rate["embed_out"]["weight"] == pytest.approx(16 / 24)
    assert select_multipliers("off", lineage, plan.grown) is None
    kept = Growth.of(dataclasses.replace(plan, rates="keep")).to_json()
    assert "rates" not in kept
    assert select_multipliers("auto", Lineage.read([kept]), plan.grown) is None


@pytest.mark.parametrize(
    "plan",
    [plan_depth(NEOX, "2:3"), plan_vocabulary(NEOX, "+8")],
    ids=["depth", "vocab"],
)
def test_no_width_no_rates(plan):
    with pytest.raises(UsageError, match="--rates mup is for growth in width"):
        set_options(plan, rates=MUP)
    wide = combine_plans("grow", [plan, plan_width(NEOX, embed="2x")], NEOX)
    assert set_options(wide, rates=MUP).rates == MUP


def test_the_command_says_who_multiplies(tmp_path, capsys):
    from conftest import SMALL, save_directory

    save_directory(tmp_path / "source", SMALL)
    command = ["width", "--embed", "2x", "--noise", "0.5rms", "--rates"]
    paths = [str(tmp_path / "source"), str(tmp_path / "out")]
    assert run([*command, "mup", "--dry-run", *paths]) == 0
    said = capsys.readouterr().out
    assert "rate        by muP, approximate: the trainer multiplies" in said
    assert "x0.5 for attention.query_key_value.weight" in said
    assert run([*command, "mpu", *paths]) == 2
    assert "--rates is one of keep, mup, got 'mpu'; did you mean 'mup'?" in capsys.readouterr().err
