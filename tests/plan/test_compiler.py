"""A compiled step's memory and FLOPs, and the compiler's refusals in both of their forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from trainer.config.sections import build_architecture, resolve
from trainer.config.values import read_values
from trainer.devices.accelerators import GIB
from trainer.devices.sharding import make_single_device_layout
from trainer.model.kernels import splash_attention
from trainer.plan.compiler import (
    abstract_batch,
    count_product_flops,
    measure_memory,
    parse_refusal,
)
from trainer.step.update import State, abstract_state, make_train_step


def test_products_are_counted_as_often_as_they_run():
    def once(x):
        return x @ x

    def looped(x):
        return jax.lax.scan(lambda y, _: (y @ y, None), x, length=5)[0]

    def count(function):
        return count_product_flops(jax.make_jaxpr(function)(jnp.ones((8, 8))).jaxpr)

    assert count(once) == 2 * 8**3
    assert count(looped) == 5 * 2 * 8**3


def test_products_of_a_kernel_are_counted_on_all_devices_and_blocks():
    """9 products of 256 x 256 x 16: two forward, three for q's gradient, four for k's and v's.

    And the output times its gradient, once.
    """
    layout = make_single_device_layout()
    spec = layout.make_sharding("data").spec

    def attention(q):
        each = jax.shard_map(
            splash_attention,
            mesh=layout.mesh,
            in_specs=(spec, spec, spec),
            out_specs=spec,
            check_vma=False,
        )
        return each(q, q, q).sum()

    traced = jax.make_jaxpr(jax.grad(attention))(jnp.ones((3, 2, 256, 16)))
    assert count_product_flops(traced.jaxpr) == 3 * 2 * (2 * 256 * 16) * (9 * 256 + 1)


def test_what_is_computed_again_counts_again():
    model = build_architecture(resolve(read_values("tiny", [])).model)
    layout = make_single_device_layout()

    def count(*changes):
        config = resolve(read_values("tiny", list(changes)))
        step = make_train_step(config, model, layout=layout)
        like = abstract_state(config, model, layout)
        return count_product_flops(step.trace(like, abstract_batch(config, layout)).jaxpr)

    formula = 16 * 128 * model.flops_per_token(128)
    assert count() == formula
    full = count("remat=full")
    half = count("remat=half")
    assert formula < half < full < 1.34 * formula
    # Of 6 layers, for 16 x 128 tokens: the mlp's product of 128 with 512 numbers, and attention's
    # of the weights of 128 positions with 128 numbers of all heads.
    spared = 6 * 2 * 16 * 128 * (128 * 512 + 128 * 128)
    assert full - half == pytest.approx(spared)


def test_a_refusal_is_read_in_both_of_its_forms():
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.92G) exceeds available HBM (15.48G)."
    )
    late = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.30G of 15.48G hbm. "
        "Exceeded hbm capacity"
    )
    available = int(15.48 * GIB)
    assert parse_refusal(early, 3 * GIB) == (int(16.92 * GIB), available)
    assert parse_refusal(late, 3 * GIB) == (int(17.30 * GIB) - 3 * GIB, available)
    assert parse_refusal("RESOURCE_EXHAUSTED: something else", 1) == (0, None)


class Refused:
    """A lowered step whose compilation fails."""

    def __init__(self, words: str):
        self.words = words

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.words)


def test_a_program_that_was_refused_never_fits():
    sharding = make_single_device_layout().replicated
    like = State(jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding), {}, None, None)
    memory = measure_memory(Refused("RESOURCE_EXHAUSTED: of no known form"), like, 100 * GIB)
    assert memory.parameters == 16
    assert not memory.fits
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measure_memory(Refused("INTERNAL: a bug"), like, 1)
