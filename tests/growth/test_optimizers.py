"""Optimizer states of optax grow by the rule of what they hold, or are refused by name.

As classes, as the plain dicts that they are once saved and restored, and in containers of others.
That the rules are right, of every transformation of optax, is in test_every_optax.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hidden_units import (
    PLAN,
    compute,
    gap,
    list_matrices,
    make_params,
    restore_plainly,
    states,
)

import growkit
from growkit.errors import GrowkitError, UsageError
from growkit.growth import optimizers

# Steps need the learning rates of a clone; what is compared here is the state alone.
GRADIENTS = {
    "adam": optax.adam(1e-2),
    "amsgrad": optax.amsgrad(1e-2),
    "adabelief": optax.adabelief(1e-2),
    # What the accumulator begins with would grow as if it were gradients.
    "adagrad": optax.adagrad(1e-2, initial_accumulator_value=0.0),
    "adan": optax.adan(1e-2),
    "lion": optax.lion(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "nesterov": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(1e-2),
    "rmsprop centred": optax.rmsprop(1e-2, eps=1e-30, centered=True, momentum=0.9),
    "ema": optax.chain(optax.ema(0.9), optax.scale(-1e-2)),
    "apply_every": optax.chain(optax.apply_every(3), optax.scale(-1e-2)),
    "accumulated": optax.MultiSteps(optax.adam(1e-2), 3),
    "injected": optax.inject_hyperparams(optax.adam)(1e-2),
    "masked": optax.masked(optax.adam(1e-2), {"up": {"kernel": True}, "down": {"kernel": True}}),
    "clipped": optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(1e-2)),
    "if finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "ademamix": optax.contrib.ademamix(1e-2),
}
REFUSED = {
    "adafactor": (optax.adafactor(1e-2, min_dim_size_to_factor=1), "FactoredState"),
    "sm3": (optax.sm3(1e-2), "ScaleBySM3State"),
    "rprop": (optax.rprop(1e-2), "ScaleByRpropState"),
    "adadelta": (optax.adadelta(1e-2), "ScaleByAdaDeltaState"),
    "novograd": (optax.novograd(1e-2), "ScaleByNovogradState"),
    "prodigy": (optax.contrib.prodigy(), "ProdigyState"),
    "dadapt": (optax.contrib.dadapt_adamw(), "DAdaptAdamWState"),
    "lbfgs": (optax.scale_by_lbfgs(), "ScaleByLBFGSState"),
}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def test_the_clone_is_the_same_function():
    params = make_params()
    grown = growkit.grow(params, PLAN)
    assert np.abs(compute(grown) - compute(params)).max() < 1e-12
    assert grown["up"]["kernel"].shape == (3, 8)


def test_the_maximum_of_adamax_is_of_first_order():
    adamax = optax.adamax(1e-2, eps=1e-30)
    ours, theirs = states(adamax, nu="maximum")
    assert gap(ours, theirs) < 1e-9
    ours, theirs = states(adamax)
    assert gap(ours, theirs) > 1e-2
    with pytest.raises(UsageError, match="'maximum' for Adamax"):
        states(optax.adamax(1e-2), nu="max")


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name(name):
    optimizer, kind = REFUSED[name]
    state = optimizer.init(make_params())
    with pytest.raises(GrowkitError) as refusal:
        growkit.grow(state, PLAN)
    said = str(refusal.value)
    assert kind in said and "cannot grow" in said and "Adam" in said and "\n" not in said


def fill(state):
    """The state with random numbers for its matrices."""
    random = np.random.default_rng(4)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape)) if np.ndim(leaf) > 1 else leaf,
        state,
    )


@pytest.mark.parametrize("name", [*REFUSED, "ema"])
def test_what_has_no_rule_is_refused_as_dicts_too(name):
    optimizer = REFUSED[name][0] if name in REFUSED else GRADIENTS[name]
    state = restore_plainly(optimizer.init(make_params()))
    with pytest.raises(GrowkitError, match="cannot grow"):
        growkit.grow({"opt_state": state, "params": make_params()}, PLAN)


def test_the_keys_of_plain_dicts_are_the_fields_of_optaxs_classes():
    known = 0
    modules = [module for name, module in sys.modules.items() if name.startswith("optax.")]
    for keys, kind in optimizers.KEYS.items():
        name = "EmaState" if kind == optimizers.AVERAGE else kind
        found = {getattr(module, name)._fields for module in modules if hasattr(module, name)}
        # Older versions of optax lack some of them.
        assert [set(fields) for fields in found] in ([set(keys)], []), kind
        ruled = {*optimizers.FIELDS, *optimizers.REASONS, *optimizers.SIDE_BY_SIDE}
        assert kind in ruled
        known += len(found)
    assert known >= len(optimizers.KEYS) - 2


CHAINED = {
    "named": optax.named_chain(("rms", optax.scale_by_rms()), ("trace_of_it", optax.trace(0.9))),
    "wrapped": optax.chain(
        optax.masked(optax.scale_by_rms(eps=1e-30), {"up": True, "down": True}), optax.trace(0.9)
    ),
    "finite": optax.chain(optax.apply_if_finite(optax.scale_by_rms(), 3), optax.trace(0.9)),
}


@pytest.mark.parametrize("name", CHAINED)
def test_momentum_after_a_normalisation_is_copied_whatever_is_around_it(name):
    state = fill(CHAINED[name].init(make_params()))
    # A named chain's order is gone with its classes, which the test below is about.
    forms = [state] if name == "named" else [state, restore_plainly(state)]
    for form in forms:
        old = list_matrices(form)[-2:]
        new = list_matrices(growkit.grow(form, PLAN))[-2:]
        assert np.array_equal(new[0][:4], old[0]) and np.array_equal(new[1][:, :4], old[1])


def number_plainly(node):
    """A state as flax's to_state_dict saves it: dicts for classes, and "0", "1", ... for tuples."""
    if isinstance(node, list):
        return {str(place): number_plainly(part) for place, part in enumerate(node)}
    if isinstance(node, dict):
        return {name: number_plainly(part) for name, part in node.items()}
    return node


def test_a_numbered_dict_is_a_chain_whatever_its_order():
    parts = [optax.identity()] * 9 + [optax.scale_by_rms(), optax.trace(0.9)]
    state = fill(optax.chain(*parts).init(make_params()))
    numbered = number_plainly(restore_plainly(state))
    # Sorted as text, the momentum of "10" stands before the squares of "9".
    numbered = dict(sorted(numbered.items()))
    grown = growkit.grow(numbered, PLAN)
    assert list(grown) == list(numbered)
    new, old = grown["10"]["trace"], numbered["10"]["trace"]
    assert np.array_equal(new["down"]["kernel"][:4], old["down"]["kernel"])


ORDERS = {
    "rms first": ("rms", "trace_of_it"),
    "trace first": ("trace_of_it", "rms"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_named_chain_that_lost_its_classes_is_refused_by_name(order):
    made = {"rms": optax.scale_by_rms(), "trace_of_it": optax.trace(0.9)}
    chain = optax.named_chain(*((name, made[name]) for name in ORDERS[order]))
    state = restore_plainly(chain.init(make_params()))
    deeper = {"adam_like": [state["rms"]], "then": {"inner_state": [state["trace_of_it"]]}}
    for form in (state, deeper, {"opt_state": [state], "params": make_params()}):
        with pytest.raises(GrowkitError, match="which of them came first"):
            growkit.grow(form, PLAN)
    # Without a question there is no refusal: parts that all grow by one rule, and a new beginning.
    alike = {"first": state["trace_of_it"], "second": {"trace": state["trace_of_it"]["trace"]}}
    assert growkit.grow(alike, PLAN)
    assert growkit.grow(state, dataclasses.replace(PLAN, moments="reset"))


def test_optimizers_side_by_side_are_no_chain():
    labels = {"up": {"kernel": "b"}, "down": {"kernel": "a"}}
    both = optax.partition({"a": optax.scale_by_rms(), "b": optax.trace(0.9)}, labels)
    params = make_params()
    state = fill(both.init(params))
    grown = growkit.grow(state, PLAN)
    before = state.inner_states["b"].inner_state.trace["up"]["kernel"]
    after = grown.inner_states["b"].inner_state.trace["up"]["kernel"]
    # What writes a unit has half of the gradient in each of two copies.
    assert np.allclose(np.asarray(after)[:, :4], np.asarray(before) / 2)
    parts = {
        label: {"inner_state": masked.inner_state._asdict()}
        for label, masked in state.inner_states.items()
    }
    plain = growkit.grow({"inner_states": parts}, PLAN)
    plain_after = plain["inner_states"]["b"]["inner_state"]["trace"]["up"]["kernel"]
    assert np.array_equal(plain_after, after)
    lists = [optax.adam(1e-2).init(params), fill(optax.sgd(1e-2, 0.9).init(params))]
    before, after = (
        each[1][0].trace["up"]["kernel"] for each in (lists, growkit.grow(lists, PLAN))
    )
    assert np.allclose(np.asarray(after)[:, :4], np.asarray(before) / 2)


def test_averages_of_parameters_grow_as_parameters():
    params = make_params()
    optimizer = optax.contrib.schedule_free(optax.sgd(1e-2), learning_rate=1e-2)
    grown = growkit.grow(optimizer.init(params), PLAN)
    assert np.array_equal(grown.z["down"]["kernel"], growkit.grow(params, PLAN)["down"]["kernel"])
    state = {"params": params, "ema_params": params, "opt_state": optax.adam(1e-2).init(params)}
    whole = growkit.grow(state, PLAN)
    assert whole["ema_params"]["down"]["kernel"].shape == (8, 2)


def test_a_state_of_ones_own_is_known_by_its_names():
    params = make_params()
    grown = growkit.grow({"mine": {"mu": params, "nu": params}}, PLAN)
    half = np.asarray(params["up"]["kernel"])
    assert np.allclose(grown["mine"]["mu"]["up"]["kernel"][:, :4], half / 2)
    assert np.allclose(grown["mine"]["nu"]["up"]["kernel"][:, :4], half / 4)


@pytest.mark.parametrize("beside", ["sigma", "rho"])
@pytest.mark.parametrize("name", ["mu", "trace"])
def test_parameters_that_are_called_as_moments_are_not_taken_for_them(name, beside):
    """A distribution's mean is often called mu: beside sigma it is not an average of gradients."""
    params = make_params()
    with pytest.raises(GrowkitError, match=f"under '{name}' and under '{beside}': it is not clear"):
        growkit.grow({name: params, beside: params}, PLAN)
    # What tells: a count, the parameters, the other moment; and nothing that could be parameters.
    for tells in ({"count": np.int32(1)}, {"params": params}, {"nu": params}, {"seed": 3}, {}):
        grown = growkit.grow({name: params, **tells}, PLAN)
        half = np.asarray(params["up"]["kernel"]) / 2
        assert np.allclose(grown[name]["up"]["kernel"][:, :4], half)
