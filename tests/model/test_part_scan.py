"""Layers of which some are trained: gradients as through all, and no work for frozen ones."""

from __future__ import annotations

import doctest
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import QUICK

import trainer.model.part_scan
from growkit.models.gpt_neox import GPT_NEOX
from trainer.config.sections import Dropout, Model, Precision, build_architecture
from trainer.devices.sharding import make_single_device_layout
from trainer.model.decoder import Decoder, init_params
from trainer.model.part_scan import Stretch, divide_layers
from trainer.step.part import Part
from trainer.step.update import accumulate_gradients, sum_loss

NEOX = GPT_NEOX.model(layer=4, embed=16, head=2, mlp=12, vocab=40, context=16, rotary_pct=0.5)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 2, 17)))
FLOAT32 = Precision("float32", "float32")


@pytest.mark.parametrize(
    "trained,layers,stretches",
    [
        ([1, 3], 4, [(1, 0, 1), (1, 1, 1), (1, 1, 0)]),
        ([0, 2, 4], 6, [(3, 1, 1)]),
        ([1, 5, 9, 13], 15, [(1, 0, 1), (3, 1, 3), (1, 1, 1)]),
        ([4, 5, 6], 7, [(1, 0, 4), (1, 3, 0)]),
        ([0, 1], 2, [(1, 2, 0)]),
        ([0, 1, 3], 5, [(1, 2, 1), (1, 1, 1)]),
    ],
)
def test_equal_runs_are_one_stretch(trained, layers, stretches):
    found = divide_layers(trained, layers)
    assert found == [Stretch(*stretch) for stretch in stretches]
    assert sum(each.times * each.period for each in found) == layers
    assert sum(each.times * each.trained for each in found) == len(trained)


def test_the_example_in_the_docs():
    assert doctest.testmod(trainer.model.part_scan).failed == 0


def make(model, remat="none", dropout=0.0):
    layout = make_single_device_layout()
    drop = Dropout(hidden=dropout, attention=0.0, embedding=dropout)
    network = Decoder(model, FLOAT32, drop, remat, layout=layout)
    return network, init_params(model, FLOAT32, 0)


def through_all(network, params, part):
    """The loss and the gradient of the trained layers, by a backward pass through all layers."""
    table = network.model.table

    def loss(trained):
        merged = part.merge(table, params, trained)
        return sum(sum_loss(network, merged, tokens, None) for tokens in TOKENS) / (4 * 16)

    return jax.value_and_grad(loss)(part.select(table, params))


def compare(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for one, other in pairs:
        largest = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * max(largest, 1.0))


def make_gemma():
    """A model whose layers are of two kinds."""
    kinds = ["sliding_attention"] * 2 + ["full_attention"]
    config = {"sliding_window": 5, "layer_types": kinds * 2, "query_pre_attn_scalar": 20}
    sizes = {"layer": 6, "embed": 24, "head": 4, "kv": 2, "head_dim": 6, "mlp": 32, "vocab": 40}
    return build_architecture(Model(kind="gemma3_text", context=16, config=config, **sizes))


@pytest.mark.parametrize(
    "make_model,layers,remat",
    [
        (lambda: NEOX, (1, 3), "none"),
        pytest.param(lambda: NEOX, (0, 2), "full", marks=pytest.mark.slow),
        pytest.param(make_gemma, (2, 5), "none", marks=pytest.mark.slow),
        pytest.param(make_gemma, (3, 4, 5), "dots", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_a_pass_through_all_layers(
    make_model, layers, remat, strict_promotion
):
    network, params = make(make_model(), remat)
    part = Part(layers)

    @partial(jax.jit, compiler_options=QUICK)
    def ours(params):
        return accumulate_gradients(network, params, TOKENS, None, part)

    @partial(jax.jit, compiler_options=QUICK)
    def theirs(params):
        return through_all(network, params, part)

    expected = theirs(params)
    compare(ours(params), expected)
    # Were each layer taken for its neighbour, they would be others.
    shifted = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, 0), params["layers"])
    with pytest.raises(AssertionError):
        compare(ours(params | {"layers": shifted}), expected)


def test_below_the_lowest_trained_layer_nothing_is_kept():
    network, params = make(NEOX)
    part = Part((3,))

    def measure(make_gradient):
        compiled = jax.jit(make_gradient, compiler_options=QUICK).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = measure(lambda params: accumulate_gradients(network, params, TOKENS, None, part))
    theirs = measure(lambda params: through_all(network, params, part))
    assert ours < 0.75 * theirs


@pytest.mark.slow
def test_dropout_draws_masks_by_layer():
    network, params = make(NEOX, dropout=0.5)

    @jax.jit
    def loss(key):
        return accumulate_gradients(network, params, TOKENS, key, Part((1, 3)))[0]["loss"]

    first, second = jax.random.key(0), jax.random.key(1)
    assert float(loss(first)) == float(loss(first)) != float(loss(second))
