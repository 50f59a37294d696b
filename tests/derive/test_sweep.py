"""Every type that has a table grows by files and the command line as transformers computes.

A tiny random model of the type is saved by transformers, grown by each verb in each way that the
table offers, and loaded by transformers. Exact growths give the source's logits; copies of layers
give those of transformers' own layers in that order, each of its kind. What the table does not
offer is refused. A row that says something wrong is noticed. After growth in width gradients are
the rule's, and twenty steps of AdamW go on as the small model's.
"""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from continuation import Training, grow_training
from mistakes import one_of_each
from sweeping import (
    Sweep,
    expects_refusal,
    list_depths,
    list_misfits,
    list_widths,
    make_tiny,
    save_tiny,
    sweep_type,
)

from growkit.derive import proof
from growkit.derive.tiny import tiny_fields
from growkit.derive.variant import config_json
from growkit.growth.axes import tile
from growkit.growth.plan import build_plan
from growkit.models import FAMILIES, find_family
from growkit.models.given import use_family
from growkit.models.tables import list_shipped

torch.set_num_threads(1)
EVERY = [*FAMILIES, *list_shipped()]
# Of different kinds: grouped heads, learned positions and Conv1D, scaled embedding, experts, latent
# attention, a mixed stack, a recurrence, a fused query with one key.
SAMPLE = ("llama", "gpt2", "gemma2", "qwen3_moe", "deepseek_v3", "qwen3_next", "mamba", "falcon")
KINDS = [kind if kind in SAMPLE else pytest.param(kind, marks=pytest.mark.slow) for kind in EVERY]


@pytest.mark.parametrize("kind", KINDS)
def test_a_type_grows_through_files(kind, tmp_path):
    sweep = sweep_type(kind, tmp_path)
    wrong = [
        case for case in sweep.cases if case.exact == expects_refusal(sweep, case) or is_other(case)
    ]
    assert not wrong
    assert any(case.exact for case in sweep.cases)


def is_other(case):
    """Whether a growth was done and is another function, or its layers changed their kind."""
    return not case.refused and not case.exact


# Where two sizes must be one, or a projection comes and goes with them: such models are refused.
BOUND_SIZES = {"electra", "helium", "roformer", "opt", "kimi_linear"}


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if str(kind) in SAMPLE or kind.values[0] not in BOUND_SIZES]
)
def test_a_table_holds_for_other_sizes(kind):
    """A table read off one tiny model takes no number of it for a name or a size."""
    assert not list_misfits(kind)


@pytest.mark.parametrize("kind", ["gemma2", pytest.param("phi3", marks=pytest.mark.slow)])
def test_a_mistake_of_each_sort_is_noticed(kind, tmp_path):
    family = find_family(kind)
    mistakes = one_of_each(family)
    assert len(mistakes) > 4
    save_tiny(kind, tiny_fields(kind), tmp_path / "source")
    missed = []
    for what, wrong in mistakes.items():
        with use_family(wrong):
            noticed = notices(Sweep(kind, tmp_path))
        if not noticed:
            missed.append(what)
    assert not missed


def notices(sweep):
    """Whether growth in width, in depth or by padding shows that something is wrong."""
    names = ("together", "identity", "padding", "embed")
    cases = [*list_depths(sweep), *list_widths(sweep)]
    return any(
        not sweep.try_growth(case).exact
        for case in cases
        if case.name in names and not expects_refusal(sweep, case)
    )


# Learned positions, an offset and a factor, blocks in one dimension, a norm over heads, a parallel
# block, experts, latent attention, a recurrence.
CONTINUED = ("gpt2", "gemma2", "phi3", "olmo2", "cohere", "qwen3_moe", "deepseek_v3", "mamba")
STEPS = 20
GRADIENTS = 1e-9


def list_maps(model):
    """Maps of every axis that grows: unequal copies and shares, where they may be."""
    family = model.family
    maps = {}
    for axis in family.fields:
        if axis in ("layer", "embed", "vocab", "position", "expert", *family.frozen):
            continue
        even = axis in model.table.uniform_axes
        maps[axis] = proof.even(model.sizes[axis]) if even else proof.uneven(model.sizes[axis])
    times = 2
    if family.coupled:
        times = 1
        for axis in (family.heads, "group"):
            times *= len(maps[axis]) // model.sizes[axis] if axis in maps else 1
    return maps | {"embed": tile(model.embed, times * model.embed)}


@pytest.mark.parametrize("kind", CONTINUED)
def test_training_goes_on_as_the_small_model_s(kind):
    """Three steps, growth with unequal copies, twenty steps of both: the same losses."""
    family = find_family(kind)
    config, state = make_tiny(kind, tiny_fields(kind))
    source = proof.Grown(config_json(config), state)
    model = proof.read_model(family, source)
    maps = list_maps(model)
    plan = build_plan("width", "", model, maps)
    assert plan.continues
    assert proof.gradient_gap(family, SimpleNamespace(config=config, state=state), maps) < GRADIENTS
    small = Training(model, source)
    for _ in range(3):
        small.step()
    large = grow_training(small, plan, plan.grown.config(source.config))
    if kind == CONTINUED[0]:
        assert wanders_without_factors(small, large)
    losses = [(small.step(), large.step()) for _ in range(STEPS)]
    assert losses[0][0] - losses[-1][0] > 0.1
    for before, after in losses:
        assert after == pytest.approx(before, rel=1e-9)


def wanders_without_factors(small, large):
    """Whether the same steps without the factors of rate and eps are another training."""
    one, other = deepcopy((small.held, large.held))
    before = Training(small.model, one, dict(small.mu), dict(small.nu), small.count)
    after = Training(large.model, other, dict(large.mu), dict(large.nu), large.count)
    losses = [(before.step(), after.step()) for _ in range(3)]
    return abs(losses[-1][0] - losses[-1][1]) > 1e-4
