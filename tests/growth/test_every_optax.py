"""Every transformation of optax grows by its rule, holds nothing that grows, or is refused by name.

The lists below name all of them. Of each that grows, the grown state is the state that the grown
model would have, and a state by another rule is not; and after growth a few more steps of optax's
own leave both models the same function. A state that is not known is refused by name, so that one
of a later optax is.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hidden_units import (
    PLAN,
    compute,
    feed_both,
    gap,
    list_matrices,
    loss,
    make_params,
    restore_plainly,
)
from optax import contrib
from optax.experimental import aggregating

import growkit
from growkit.errors import GrowkitError
from growkit.growth import optimizers
from growkit.growth.padding import MU, NU, VALUE

pytestmark = pytest.mark.filterwarnings("ignore:.*(deprecated|required in optax).*")
RATE = 1e-2
BOTH = {"up": {"kernel": True}, "down": {"kernel": True}}
DECAYED = {"up": {"kernel": True}, "down": {"kernel": False}}
LABELS = {"up": {"kernel": "a"}, "down": {"kernel": "b"}}


def first(updates):
    return updates["up"]["kernel"][0, 0]


def accept(updates, *_, **__):
    return jnp.array(True)


# name -> the transformation, and how growth is called where the state looks like another's.
GROWS = {
    "adabelief": lambda: optax.adabelief(RATE),
    "adagrad": lambda: optax.adagrad(RATE, initial_accumulator_value=0.0),
    "adam": lambda: optax.adam(RATE),
    "adamax": lambda: optax.adamax(RATE, eps=1e-30),
    "adamaxw": lambda: optax.adamaxw(RATE, eps=1e-30),
    "adamw": lambda: optax.adamw(RATE),
    "adan": lambda: optax.adan(RATE),
    "amsgrad": lambda: optax.amsgrad(RATE),
    "lamb": lambda: optax.lamb(RATE),
    "lion": lambda: optax.lion(RATE),
    "nadam": lambda: optax.nadam(RATE),
    "nadamw": lambda: optax.nadamw(RATE),
    "optimistic_adam": lambda: optax.optimistic_adam(RATE, eps=1e-30),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(RATE, eps=1e-30),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(RATE),
    "radam": lambda: optax.radam(RATE),
    "rmsprop centred": lambda: optax.rmsprop(RATE, eps=1e-30, centered=True, momentum=0.9),
    "sgd nesterov": lambda: optax.sgd(RATE, momentum=0.9, nesterov=True),
    "rmsprop": lambda: optax.rmsprop(RATE, eps=1e-30, momentum=0.9),
    "sgd": lambda: optax.sgd(RATE, momentum=0.9),
    "signum": lambda: optax.signum(RATE),
    # What optax.yogi's accumulator begins with, 1e-6, would grow as if it were gradients.
    "yogi": lambda: optax.scale_by_yogi(initial_accumulator_value=0.0),
    "scale_by_adam": optax.scale_by_adam,
    "scale_by_adamax": lambda: optax.scale_by_adamax(eps=1e-30),
    "scale_by_adan": optax.scale_by_adan,
    "scale_by_amsgrad": optax.scale_by_amsgrad,
    "scale_by_belief": optax.scale_by_belief,
    "scale_by_lion": optax.scale_by_lion,
    "scale_by_optimistic_gradient": optax.scale_by_optimistic_gradient,
    "scale_by_radam": optax.scale_by_radam,
    "scale_by_rms": optax.scale_by_rms,
    "scale_by_rss": lambda: optax.scale_by_rss(initial_accumulator_value=0.0),
    "scale_by_stddev": lambda: optax.scale_by_stddev(eps=1e-30),
    "scale_by_yogi": lambda: optax.scale_by_yogi(initial_accumulator_value=0.0),
    "trace": lambda: optax.trace(0.9),
    "ema": lambda: optax.ema(0.9),
    "apply_every": lambda: optax.apply_every(3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1e9), optax.trace(0.9)),
    "named_chain": lambda: optax.named_chain(("a", optax.scale_by_adam()), ("b", optax.scale(2.0))),
    "partition": lambda: optax.partition({"a": optax.adam(RATE), "b": optax.lion(RATE)}, LABELS),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.sgd(RATE, 0.9), "b": optax.adam(RATE)}, LABELS
    ),
    "masked": lambda: optax.masked(optax.adam(RATE), BOTH),
    "selective_transform": lambda: optax.selective_transform(
        optax.adam(RATE), freeze_mask={"up": {"kernel": False}, "down": {"kernel": True}}
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(RATE), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(RATE),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adam)(RATE),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(RATE), 3),
    "conditionally_mask": lambda: optax.conditionally_mask(optax.adam(RATE), lambda _: True),
    "conditionally_transform": lambda: optax.conditionally_transform(
        optax.adam(RATE), lambda _: True
    ),
    "with_extra_args_support": lambda: optax.with_extra_args_support(optax.adam(RATE)),
    "contrib.acprop": lambda: contrib.acprop(RATE, eps_root=0.0),
    "contrib.ademamix": lambda: contrib.ademamix(RATE),
    "contrib.adopt": lambda: contrib.adopt(RATE, eps=1e-30),
    "contrib.scale_by_acprop": lambda: contrib.scale_by_acprop(eps_root=0.0),
    "contrib.scale_by_ademamix": contrib.scale_by_ademamix,
    "contrib.scale_by_adopt": lambda: contrib.scale_by_adopt(eps=1e-30),
    "contrib.scale_by_simplified_ademamix": contrib.scale_by_simplified_ademamix,
    "contrib.simplified_ademamix": lambda: contrib.simplified_ademamix(RATE),
    "contrib.split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(RATE)),
    "contrib.scale_by_muon": lambda: contrib.scale_by_muon(
        ns_steps=1,
        weight_dimension_numbers=lambda params: jax.tree.map(
            lambda _: contrib.MuonDimensionNumbers(), params
        ),
    ),
    "contrib.muon": lambda: contrib.muon(RATE, ns_steps=1),
}
OPTIONS = {name: {"nu": "maximum"} for name in ("adamax", "adamaxw", "scale_by_adamax")} | {
    name: {"mu": "step"} for name in ("contrib.adopt", "contrib.scale_by_adopt")
}
# A plain dict {count, ema} may be an average of parameters, and a dict of parts has lost its order.
WITHOUT_CLASSES = ("ema", "signum", "named_chain")
# Wrappers whose state is parameters, or asks for more than gradients; shown one by one below.
APART = {
    "lookahead",
    "contrib.sam",
    "contrib.schedule_free",
    "contrib.schedule_free_adamw",
    "contrib.schedule_free_sgd",
    "contrib.sophia",
    "scale_by_backtracking_linesearch",
    "scale_by_zoom_linesearch",
    "aggregating.accumulate_avg_updates",
    "aggregating.average_incrementally_updates",
    "aggregating.average_per_element_updates",
    "aggregating.get_per_element_mean_and_sum_sq_diff_grads",
    "aggregating.process",
    "aggregating.track_per_element_mean_and_variance_with_ema",
}
NOTHING = {
    "noisy_sgd": lambda: optax.noisy_sgd(RATE),
    "fromage": lambda: optax.fromage(RATE),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "sign_sgd": lambda: optax.sign_sgd(RATE),
    "identity": optax.identity,
    "set_to_zero": optax.set_to_zero,
    "stateless": lambda: optax.stateless(lambda updates, params: updates),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda update, param: update),
    "centralize": optax.centralize,
    "normalize_by_update_norm": optax.normalize_by_update_norm,
    "scale": lambda: optax.scale(2.0),
    "scale_by_learning_rate": lambda: optax.scale_by_learning_rate(RATE),
    "scale_by_param_block_norm": optax.scale_by_param_block_norm,
    "scale_by_param_block_rms": optax.scale_by_param_block_rms,
    "scale_by_polyak": optax.scale_by_polyak,
    "scale_by_schedule": lambda: optax.scale_by_schedule(lambda count: 1.0),
    "scale_by_sign": optax.scale_by_sign,
    "scale_by_trust_ratio": optax.scale_by_trust_ratio,
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(1.0),
    "clip": lambda: optax.clip(1.0),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(1.0),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "keep_params_nonnegative": optax.keep_params_nonnegative,
    "zero_nans": optax.zero_nans,
    "add_noise": lambda: optax.add_noise(0.1, 0.5, 0),
    "add_decayed_weights": lambda: optax.add_decayed_weights(0.1),
    "freeze": lambda: optax.freeze(BOTH),
    "measure_with_ema": lambda: optax.measure_with_ema(first, 0.9),
    "monitor": lambda: optax.monitor({"first": first, "slow": optax.measure_with_ema(first, 0.9)}),
    "snapshot": lambda: optax.snapshot("first", first),
    "contrib.differentially_private_aggregate": (
        lambda: contrib.differentially_private_aggregate(1.0, 0.1, 0)
    ),
    "contrib.dpsgd": lambda: contrib.dpsgd(RATE, 1.0, 0.1, 0),
    "contrib.normalize": contrib.normalize,
    "contrib.reduce_on_plateau": contrib.reduce_on_plateau,
    "contrib.hutchinson_estimator_diag_hessian": contrib.hutchinson_estimator_diag_hessian,
}
REFUSED = {
    "adadelta": (lambda: optax.adadelta(RATE), "ScaleByAdaDeltaState"),
    "scale_by_adadelta": (optax.scale_by_adadelta, "ScaleByAdaDeltaState"),
    "adafactor": (lambda: optax.adafactor(RATE, min_dim_size_to_factor=1), "Adafactor"),
    "scale_by_factored_rms": (optax.scale_by_factored_rms, "Adafactor"),
    "flatten": (lambda: optax.flatten(optax.adam(RATE)), "optax.flatten"),
    "lars": (lambda: optax.lars(RATE), "optax.lars"),
    "lbfgs": (optax.lbfgs, "L-BFGS"),
    "scale_by_lbfgs": (optax.scale_by_lbfgs, "L-BFGS"),
    "novograd": (lambda: optax.novograd(RATE), "NovoGrad"),
    "scale_by_novograd": (optax.scale_by_novograd, "NovoGrad"),
    "rprop": (lambda: optax.rprop(RATE), "Rprop"),
    "scale_by_rprop": (lambda: optax.scale_by_rprop(RATE), "Rprop"),
    "sm3": (lambda: optax.sm3(RATE), "SM3"),
    "scale_by_sm3": (optax.scale_by_sm3, "SM3"),
    "scale_by_distance_over_gradients": (
        optax.scale_by_distance_over_gradients,
        "ScaleByDistanceOverGradientsState",
    ),
    "contrib.cocob": (contrib.cocob, "COCO"),
    "contrib.scale_by_cocob": (contrib.scale_by_cocob, "COCO"),
    "contrib.dadapt_adamw": (contrib.dadapt_adamw, "D-Adaptation"),
    "contrib.dog": (contrib.dog, "DoG"),
    "contrib.dowg": (contrib.dowg, "DoWG"),
    "contrib.galore": (lambda: contrib.galore(RATE, rank=2), "GaLore"),
    "contrib.scale_by_galore": (lambda: contrib.scale_by_galore(rank=2), "GaLore"),
    "contrib.madgrad": (lambda: contrib.madgrad(RATE), "MADGRAD"),
    "contrib.scale_by_madgrad": (lambda: contrib.scale_by_madgrad(RATE), "MADGRAD"),
    "contrib.mechanize": (lambda: contrib.mechanize(optax.adam(RATE)), "Mechanic"),
    "contrib.momo": (contrib.momo, "MoMo"),
    "contrib.momo_adam": (contrib.momo_adam, "MoMo"),
    "contrib.prodigy": (contrib.prodigy, "Prodigy"),
}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------- the lists are whole


def makes_transformation(thing) -> bool:
    """Whether a function says that it returns a transformation; so does MultiSteps's class."""
    if not callable(thing):
        return False
    if isinstance(thing, type):
        return hasattr(thing, "init") and hasattr(thing, "update") and thing is optax.MultiSteps
    try:
        returned = inspect.signature(thing).return_annotation
    except (TypeError, ValueError):
        return False
    return "GradientTransformation" in str(returned) or "Aggregator" in str(returned)


def list_exported() -> set[str]:
    found = set()
    modules = (("", optax), ("contrib.", contrib), ("aggregating.", aggregating))
    for prefix, module in modules:
        names = [name for name in dir(module) if not name.startswith("_")]
        made = [name for name in names if makes_transformation(getattr(module, name))]
        found |= {f"{prefix}{name}" for name in made}
    return found


def test_every_exported_transformation_is_in_a_list():
    listed = {*GROWS, *APART, *NOTHING, *REFUSED}
    assert list_exported() <= listed


# ---------------------------------------------------------------- each of them


def make(name, lists):
    """The transformation of a name; skipped where an older optax lacks it."""
    made = lists[name]
    module = contrib if name.startswith("contrib.") else optax
    if not hasattr(module, name.removeprefix("contrib.").split()[0]):
        pytest.skip(f"this optax has no {name}")
    return (made[0] if isinstance(made, tuple) else made)()


DOUBLES = (
    "nadam",
    "nadamw",
    "lamb",
    "adamaxw",
    "radam",
    "with_extra_args_support",
    "inject_stateful_hyperparams",
    "conditionally_mask",
    "contrib.simplified_ademamix",
)


def mark_doubles(names):
    """Names; slow are those whose state is of the same class as another name's."""
    slow = [name for name in names if "scale_by_" in name or name in DOUBLES]
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


@pytest.mark.parametrize("name", mark_doubles(GROWS))
def test_the_grown_state_is_that_of_the_grown_model(name, monkeypatch):
    options = OPTIONS.get(name, {})
    small, theirs = feed_both(make(name, GROWS), 2)
    ours = growkit.grow(small, PLAN, **options)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert gap(ours, theirs) < 1e-9
    # The same once it was saved and restored without its classes.
    if name not in WITHOUT_CLASSES:
        plain = growkit.grow(restore_plainly(small), PLAN, **options)
        pairs = zip(list_matrices(plain), list_matrices(restore_plainly(ours)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    other = {MU: VALUE, NU: MU, VALUE: MU}
    wrong = {
        kind: {field: other[rule] for field, rule in fields.items()}
        for kind, fields in optimizers.FIELDS.items()
    }
    monkeypatch.setattr(optimizers, "FIELDS", wrong)
    assert gap(growkit.grow(small, PLAN, **options), theirs) > 1e-2


@pytest.mark.parametrize("name", NOTHING)
def test_what_holds_no_parameters_passes_through(name):
    params = make_params()
    state = make(name, NOTHING).init(params)
    grown = growkit.grow({"params": params, "opt_state": state}, PLAN)["opt_state"]
    assert jax.tree.structure(grown) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(grown), strict=True):
        assert old is new or np.array_equal(old, new)


@pytest.mark.parametrize("form", ["classes", "plain dicts"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_grow_is_refused_by_name(name, form):
    params = make_params()
    state = make(name, REFUSED).init(params)
    state = state if form == "classes" else restore_plainly(state)
    with pytest.raises(GrowkitError) as refusal:
        growkit.grow({"params": params, "opt_state": state}, PLAN)
    said = str(refusal.value)
    # {mu, nu} of these two is told by its arrays.
    known = REFUSED[name][1] if form == "classes" else REFUSED[name][1].replace("SM3", "SM3 and N")
    assert known in said and "anew after growth" in said and "\n" not in said


# ---------------------------------------------------------------- what stands apart


def test_averages_and_copies_of_parameters_grow_as_parameters():
    params = make_params()
    grown = growkit.grow(params, PLAN)
    free = contrib.schedule_free(optax.adam(RATE), learning_rate=RATE).init(params)
    assert gap(growkit.grow(free, PLAN).z, grown) == 0.0
    sam = contrib.sam(optax.sgd(RATE, 0.9), optax.sgd(RATE)).init(params)
    assert gap(growkit.grow(sam, PLAN).cache, grown) == 0.0
    pair = optax.LookaheadParams.init_synced(params)
    state = optax.lookahead(optax.adam(RATE), 5, 0.5).init(pair)
    both, _ = growkit.grow((pair, state), PLAN)
    assert gap(both.slow, grown) == gap(both.fast, grown) == 0.0


@pytest.mark.parametrize(
    "search",
    [
        lambda: optax.scale_by_backtracking_linesearch(3, store_grad=True),
        lambda: optax.scale_by_zoom_linesearch(3),
    ],
)
def test_what_a_line_search_keeps_grows_as_a_gradient(search):
    params = make_params()
    state = search().init(params)._replace(grad=jax.grad(loss)(params))
    wide = growkit.grow(params, PLAN)
    grown = growkit.grow({"params": params, "opt_state": state}, PLAN)["opt_state"]
    assert gap(grown.grad, jax.grad(loss)(wide)) < 1e-12


def test_what_optax_aggregates_grows_by_its_order():
    params = make_params()
    halves = {"mean_grads": 2, "sum_sq_diff_grads": 4, "avg_grad": 2}
    halves |= {"mean_grads_ema": 2, "variance_grads_ema": 4}
    for made in (
        aggregating.accumulate_avg_updates(2),
        aggregating.get_per_element_mean_and_sum_sq_diff_grads(0, 2),
        aggregating.track_per_element_mean_and_variance_with_ema(),
    ):
        state = made.init(params)
        kept = [name for name in state._fields if name in halves]
        state = state._replace(**dict.fromkeys(kept, params))
        for form in (state, restore_plainly(state)):
            grown = growkit.grow(form, PLAN)
            for name in kept:
                part = grown[name] if isinstance(grown, dict) else getattr(grown, name)
                half = params["up"]["kernel"] / halves[name]
                assert np.array_equal(part["up"]["kernel"][:, :4], half)


def test_sophias_hessian_is_of_second_order():
    params = make_params()
    state = contrib.sophia(RATE).init(params)
    state = (state[0]._replace(nu=params), *state[1:])
    grown = growkit.grow(state, PLAN)[0].nu
    assert np.array_equal(grown["up"]["kernel"][:, :4], params["up"]["kernel"] / 4)


# ---------------------------------------------------------------- what is not known


class ScaleByTomorrowState(NamedTuple):
    momentum: Any
    count: Any = 0


class ShampooState(NamedTuple):
    statistics: Any


class Training(NamedTuple):
    params: Any
    opt_state: Any


def test_a_state_that_is_not_known_is_refused_by_name(monkeypatch):
    params = make_params()
    adam = optax.adam(RATE).init(params)
    mine = ScaleByTomorrowState(params)
    # In a chain of optax, or around one of its states, it is the state of a transformation.
    for state in ((*adam, mine), optax.MaskedState(mine), [params, (mine, optax.EmptyState())]):
        with pytest.raises(GrowkitError, match="ScaleByTomorrowState cannot grow.*'momentum'"):
            growkit.grow({"params": params, "opt_state": state}, PLAN)
    with pytest.raises(GrowkitError, match="ShampooState cannot grow.*preconditioners"):
        growkit.grow({"params": params, "opt_state": ShampooState(params)}, PLAN)
    # A training state of somebody's own is no transformation.
    whole = growkit.grow(Training(params, adam), PLAN)
    assert gap(whole.params, growkit.grow(params, PLAN)) == 0.0
    # A class of a later optax, with a tree or with one array of all parameters.
    monkeypatch.setattr(ScaleByTomorrowState, "__module__", "optax._src.tomorrow")
    for held in (params, jnp.zeros(20)):
        with pytest.raises(GrowkitError, match="ScaleByTomorrowState cannot grow.*'momentum'"):
            growkit.grow(Training(params, ScaleByTomorrowState(held)), PLAN)


# ---------------------------------------------------------------- steps commute with growth

# name -> the optimizer, and of which order in the gradient its steps are for up and down. A copy
# must move by its share of its source's step: steps of order 0 lack the share that the parameter
# reads (down: 1/2), and those of order 1 have the share that it writes (up: 1/2) too much.
STEPS = {
    "sgd": (lambda: optax.sgd(0.1, momentum=0.9), (1, 1)),
    "adam": (lambda: optax.adam(RATE, eps=1e-30), (0, 0)),
    "adamw": (lambda: optax.adamw(RATE, eps=1e-30, weight_decay=0.1, mask=DECAYED), (0, 0)),
    "lion": (lambda: optax.lion(RATE, weight_decay=0.0), (0, 0)),
    "rmsprop": (lambda: optax.rmsprop(RATE, eps=1e-30, momentum=0.9), (0, 0)),
    "adagrad": (
        lambda: optax.adagrad(RATE, initial_accumulator_value=0.0, eps=1e-30),
        (0, 0),
    ),
    "ema": (lambda: optax.chain(optax.ema(0.9), optax.scale(-0.1)), (1, 1)),
    "accumulated": (lambda: optax.MultiSteps(optax.adam(RATE, eps=1e-30), 2), (0, 0)),
    "partition": (
        lambda: optax.partition(
            {"a": optax.sgd(0.1, 0.9), "b": optax.adam(RATE, eps=1e-30)}, LABELS
        ),
        (1, 0),
    ),
}


def train(optimizer, params, state, factors, steps):
    """Parameters and state after steps, each multiplied by a factor for up and down."""
    with jax.disable_jit():
        for _ in range(steps):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            updates = {
                name: {"kernel": updates[name]["kernel"] * factor}
                for name, factor in zip(("up", "down"), factors, strict=True)
            }
            params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", STEPS)
def test_steps_after_growth_are_the_growth_of_steps(name):
    make_optimizer, orders = STEPS[name]
    optimizer = make_optimizer()
    before = train(optimizer, make_params(), optimizer.init(make_params()), (1.0, 1.0), 3)
    after = train(optimizer, *before, (1.0, 1.0), 3)
    factors = (2.0 ** orders[0], 0.5)
    ours = train(optimizer, *growkit.grow(before, PLAN), factors, 3)
    assert gap(ours, growkit.grow(after, PLAN)) < 1e-9
    assert np.abs(compute(ours[0]) - compute(after[0])).max() < 1e-9
    # Moments that are copied as they are leave another function.
    copied = dataclasses.replace(PLAN, moments="copy")
    theirs = train(optimizer, *growkit.grow(before, copied), factors, 3)
    assert np.abs(compute(theirs[0]) - compute(after[0])).max() > 1e-4


RESIDUAL = """
layers.{layer}.up.kernel     /embed mlp  normal  matrix
layers.{/layer}.down.kernel  /mlp embed  normal  matrix
"""


def compute_residual(params, x):
    for layer in params["layers"]:
        x = x + jnp.tanh(x @ layer["up"]["kernel"]) @ layer["down"]["kernel"]
    return x


@pytest.mark.parametrize("method", ["identity", "replicate"])
@pytest.mark.parametrize("name", ["sgd", "adam", "lion"])
def test_the_step_after_identity_layers_is_the_small_models_for_the_old_ones(name, method):
    """One step, because the new layers move too; and not with copies that add something."""
    random = np.random.default_rng(5)
    model = growkit.describe_model(RESIDUAL, {"layer": 2, "embed": 3, "mlp": 4}, norm="rms")
    params = {
        "layers": [
            {
                "up": {"kernel": jnp.asarray(random.normal(size=(3, 4)))},
                "down": {"kernel": jnp.asarray(random.normal(size=(4, 3)))},
            }
            for _ in range(2)
        ]
    }
    inputs = random.normal(size=(5, 3))
    optimizer = STEPS[name][0]()

    @jax.grad
    def slope(params):
        return jnp.square(compute_residual(params, inputs)).mean()

    def step(params, state):
        updates, state = optimizer.update(slope(params), state, params)
        return optax.apply_updates(params, updates), state

    before = step(params, optimizer.init(params))
    after = step(*before)
    grown = growkit.grow(before, model, map="2:4", method=method)
    ours = step(*grown)
    assert len(ours[0]["layers"]) == 4
    old = {"layers": [ours[0]["layers"][0], ours[0]["layers"][2]]}
    same = gap(old, after[0]) < 1e-12
    assert same == (method == "identity")
