"""A mixture with more experts goes on in the trainer exactly as the small one would.

Twenty steps of the trainer's own AdamW in float64, with an active clip, decay and the loss that
balances experts. The multipliers are those of the lineage; without them it is another training.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from test_family_continuation import check_continuation

from growkit.growth.experts import plan_experts
from trainer.config.model import Model, build_architecture

AFTER = 20
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

    def plan_twice(model):
        return plan_experts(model, model.config(), "4:8", exact=True)

    plan, wrong = check_continuation(model, plan_twice, AFTER, 1e-10)
    assert plan.grown.gate.top == 4
    assert plan.grown.gate.values["auxiliary"] == 0.025
    assert np.abs(wrong)[:, 0].max() > 1e-6
