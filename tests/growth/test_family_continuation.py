"""After exact growth in width every family of the trainer goes on as its small model would.

Steps of the trainer's own AdamW in float64 with an active clip, decay and a schedule that
continues. The multipliers are those of the lineage; without them it is another training.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from growkit.entries import Growth
from growkit.growth.axes import tile
from growkit.growth.multipliers import compute_multipliers
from growkit.growth.plan import build_plan
from growkit.growth.tree import grow
from growkit.lineage import Lineage
from trainer.config.model import Model, build_architecture
from trainer.config.sections import Batch, Config, Dropout, Optimizer, Precision, Schedule
from trainer.model.decoder import init_params
from trainer.step.optimizer import Multipliers
from trainer.step.update import init_state, make_train_step

BEFORE, AFTER = 3, 12
CONFIG = Config(
    dropout=Dropout(0.0, 0.0, 0.0),
    precision=Precision("float64", "float64"),
    batch=Batch(2, 1),
    optimizer=Optimizer(learning_rate=1e-2, eps=1e-4, weight_decay=0.1, clip=0.5),
    schedule=Schedule(steps=60, warmup=4),
)
SIZES = {"layer": 2, "embed": 8, "head": 4, "mlp": 6, "vocab": 24, "context": 12}
GROUPED = SIZES | {"kv": 2, "head_dim": 4, "initializer_range": 0.2}
SCORES = {"query_pre_attn_scalar": 6, "sliding_window": 5}
FAMILIES = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "olmo2": GROUPED,
    "gemma2": GROUPED | {"config": SCORES},
    "gemma3_text": GROUPED | {"config": SCORES},
    "granite": GROUPED | {"tied": False, "config": {"logits_scaling": 3.0}},
    "gpt2": SIZES | {"initializer_range": 0.2},
}
DEFAULT = ("gemma2",)
NAMES = [
    name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
]
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def plan_growth(model):
    maps = {"embed": tile(8, 16), "mlp": tile(6, 18)}
    if "kv" in model.sizes:
        return build_plan("width", "test", model, maps | {"kv": tile(2, 4)})
    return build_plan("width", "test", model, maps | {"head": tile(4, 8)})


def compile_step(model):
    """The train step, a function of multipliers too: one program for right and wrong ones."""

    def step(trees, state, tokens):
        return make_train_step(CONFIG, model, Multipliers(**trees))(state, tokens)

    return jax.jit(step, compiler_options=QUICK)


def train(step, trees, state, first, count):
    """The losses and gradient norms of some steps, and the state after them."""
    found = []
    for number in range(first, first + count):
        start = np.random.default_rng(number).integers(0, 24, (1, 2, 1))
        state, metrics = step(trees, state, (start + np.arange(13)) % 24)
        found.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return np.array(found), state


def check_continuation(model, make_plan, after, error):
    """Steps of the grown model are the small model's with the multipliers, and not without.

    make_plan: of the growth, made once the small model was trained. error: the relative one that is
    allowed. Returns the plan, and the losses and gradient norms without multipliers less those of
    the small model.
    """
    state = init_state(CONFIG, model, init_params(model, CONFIG.precision, 0))
    small = compile_step(model)
    _, state = train(small, {}, state, 0, BEFORE)
    before = jax.device_get(state)
    expected, _ = train(small, {}, state, BEFORE, after)
    assert (expected[:, 1] > CONFIG.optimizer.clip).any(), "the clip must act"
    plan = make_plan(model)
    assert plan.continues
    entries = Lineage.read([Growth.of(plan).to_json()])
    read = [growth.plan_within(plan.grown) for growth in entries.growths_owed()]
    right = compute_multipliers(plan.grown, read)
    grown = compile_step(plan.grown)
    found, _ = train(grown, right, grow(before, plan), BEFORE, after)
    np.testing.assert_allclose(found, expected, rtol=error)
    ones = jax.tree.map(np.ones_like, right)
    wrong, _ = train(grown, ones, grow(before, plan), BEFORE, after)
    return plan, wrong - expected


@pytest.mark.parametrize("kind", NAMES)
def test_training_goes_on_as_the_small_models_would(kind):
    model = build_architecture(Model(kind=kind, **FAMILIES[kind]))
    _, wrong = check_continuation(model, plan_growth, AFTER, 1e-11)
    assert np.abs(wrong)[:, 0].max() > 1e-5
