"""A mixture with more experts goes on in the trainer exactly as the small one would.

Twenty steps of the trainer's own AdamW in float64, with an active clip, decay and the loss that
balances experts. The multipliers are those of the lineage; without them it is another training.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from test_family_continuation import CONFIG, compile_step, train

from growkit.entries import Growth
from growkit.growth.experts import plan_experts
from growkit.growth.multipliers import compute_multipliers
from growkit.growth.tree import grow
from growkit.lineage import Lineage
from trainer.config.model import Model, build_architecture
from trainer.model.decoder import init_params
from trainer.step.update import init_state

BEFORE, AFTER = 3, 20
SIZES = {"layer": 2, "embed": 8, "head": 4, "kv": 2, "head_dim": 4, "vocab": 24, "context": 12}
GATE = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.05}
FIELDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 6, "norm_topk_prob": True},
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIELDS)
def test_training_goes_on_as_the_small_mixtures_would(kind):
    config = GATE | FIELDS[kind]
    section = Model(kind=kind, mlp=6, initializer_range=0.3, config=config, **SIZES)
    model = build_architecture(section)
    state = init_state(CONFIG, model, init_params(model, CONFIG.precision, 0))
    small = compile_step(model)
    _, state = train(small, {}, state, 0, BEFORE)
    before = jax.device_get(state)
    expected, _ = train(small, {}, state, BEFORE, AFTER)
    assert (expected[:, 1] > CONFIG.optimizer.clip).any(), "the clip must act"
    plan = plan_experts(model, model.config(), "4:8", exact=True)
    assert plan.continues and plan.grown.gate.top == 4
    assert plan.grown.gate.values["auxiliary"] == 0.025
    entries = Lineage.read([Growth.of(plan).to_json()])
    read = [growth.plan_within(plan.grown) for growth in entries.growths_owed()]
    right = compute_multipliers(plan.grown, read)
    grown = compile_step(plan.grown)
    found, _ = train(grown, right, grow(before, plan), BEFORE, AFTER)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    ones = jax.tree.map(np.ones_like, right)
    wrong, _ = train(grown, ones, grow(before, plan), BEFORE, AFTER)
    assert np.abs(wrong - expected)[:, 0].max() > 1e-6
