"""The lower bound of a step's memory: below what the compiler finds, and enough to refuse early."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from trainer.config.sections import resolve
from trainer.config.values import read_values
from trainer.plan import compiler
from trainer.plan.compiler import compile_step, estimate_step
from trainer.plan.estimate import count_kept_bytes
from trainer.plan.remedies import Trial, describe_remedy

SMALL = (
    "model={layer: 3, embed: 32, head: 2, mlp: 64, vocab: 64, context: 64, rotary_pct: 0.5}",
    "batch.sequences=8",
)
PLENTY = 2**40


def small(*changes):
    return resolve(read_values("tiny", [*SMALL, *changes]))


def test_what_a_loop_collects_is_counted_by_hand():
    def collected(x):
        last, all_x = jax.lax.scan(lambda y, _: (y * 2, (y, y.sum())), x, length=5)
        return last, all_x[0]

    jaxpr = jax.make_jaxpr(collected)(jnp.ones((4, 8), jnp.float32)).jaxpr
    # Five arrays of 4 x 8 float32; the five sums are used by nothing.
    assert count_kept_bytes(jaxpr) == 5 * 4 * 8 * 4
    inner = jax.make_jaxpr(jax.jit(collected))(jnp.ones((4, 8), jnp.float32)).jaxpr
    assert count_kept_bytes(inner) == 5 * 4 * 8 * 4
    assert count_kept_bytes(jax.make_jaxpr(jnp.sum)(jnp.ones(3)).jaxpr) == 0


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_the_bound_is_below_what_the_compiler_finds(remat):
    config = small(f"remat={remat}")
    devices = jax.devices("cpu")[:1]
    least = estimate_step(config, devices, PLENTY)
    found = compile_step(config, devices, PLENTY).memory
    assert found.exact and not found.estimated and least.estimated and least.fits
    assert 0 < least.temporaries <= found.temporaries
    assert least.parameters == found.parameters and least.peak > least.temporaries


def test_a_step_that_cannot_fit_is_not_compiled(monkeypatch):
    def compiled(*given):
        raise AssertionError("it was compiled")

    monkeypatch.setattr(compiler, "measure_memory", compiled)
    devices = jax.devices("cpu")[:1]
    least = estimate_step(small(), devices, PLENTY)
    refused = compile_step(small(), devices, least.peak - 1).memory
    assert not refused.fits and not refused.exact and refused.peak == least.peak
    with pytest.raises(AssertionError, match="it was compiled"):
        compile_step(small(), devices, least.peak)
    # More parts of the batch keep less at once; the advice says that it is a bound.
    less = estimate_step(small("batch.accumulation=4"), devices, least.peak - 1)
    assert less.fits and less.peak < least.peak
    said = describe_remedy([Trial(("batch.accumulation=4",), less)])
    assert said.startswith("batch.accumulation=4 may make it fit, which takes at least ")
