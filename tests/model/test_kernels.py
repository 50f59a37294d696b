"""Attention by kernels: the same as XLA's form, and taken where their rules allow, with the reason said."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growkit.errors import UsageError
from trainer.config.sections import Mesh, build_architecture, resolve
from trainer.config.values import read_values
from trainer.devices.sharding import Layout, make_layout, make_mesh
from trainer.model import kernels
from trainer.model.attention import causal_attention
from trainer.model.kernels import cudnn_attention, kernel_attention, select_kernel, splash_attention
from trainer.plan.compiler import abstract_batch
from trainer.plan.topology import find_target
from trainer.step.update import abstract_state, make_train_step

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPUs' compiler, is not here"
)
# Three blocks of queries and of keys.
TIME = 384


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def xla(q, k, v):
    return causal_attention(q, k, v, None, 0.0)


def splash(q, k, v):
    return splash_attention(q, k, v, interpret=True)


def assert_same(ours, theirs, depth):
    """Outputs and gradients (of a random projection of the output) agree."""
    q, k, v = (random(1, 2, TIME, depth, seed=seed) for seed in range(3))
    projection = random(1, 2, TIME, depth, seed=3)

    def found(attention, projection, *inputs):
        out, back = jax.vjp(attention, *inputs)
        return out, back(projection)

    compiled = jax.jit(found, static_argnums=0)
    pair = [
        jax.tree.leaves(compiled(attention, projection, q, k, v)) for attention in (ours, theirs)
    ]
    for mine, plain in zip(*pair, strict=True):
        np.testing.assert_allclose(mine, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [64, 80, 96, 128])
def test_splash_attention_is_attention(depth):
    assert_same(splash, xla, depth)


def test_splash_attention_with_another_scale_or_mask_is_not(monkeypatch):
    with pytest.raises(AssertionError):
        assert_same(lambda q, k, v: splash(q * 1.01, k, v), xla, 64)
    monkeypatch.setattr(kernels.splash, "CausalMask", kernels.splash.FullMask)
    with pytest.raises(AssertionError):
        assert_same(splash, xla, 64)


def test_cudnn_is_asked_for_attention(monkeypatch):
    """What it is asked for, computed by the other implementation of the same function."""
    plain = jax.nn.dot_product_attention

    def elsewhere(*arguments, implementation, **options):
        assert implementation == "cudnn"
        return plain(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", elsewhere)
    assert_same(cudnn_attention, xla, 80)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, is_causal, **options: elsewhere(*a, **options)
    )
    with pytest.raises(AssertionError):
        assert_same(cudnn_attention, xla, 80)


def on(kind: str, capability: str = ""):
    """A layout of one device of a kind."""
    platform = "tpu" if kind.startswith("TPU") else "gpu" if capability else "cpu"
    device = SimpleNamespace(device_kind=kind, compute_capability=capability)
    return SimpleNamespace(
        platform=platform, mesh=SimpleNamespace(devices=np.array([device], object))
    )


def choice(layout, *changes):
    config = resolve(read_values("760m", ["dropout.attention=0", *changes]))
    return select_kernel(config, build_architecture(config.model), layout)


H100, A100, V100 = on("NVIDIA H100", "9.0"), on("NVIDIA A100", "8.0"), on("Tesla V100", "7.0")


@pytest.mark.parametrize(
    ("layout", "changes", "name", "words"),
    [
        (on("TPU v4"), [], "splash", "attention: Pallas splash attention, as its rules allow: head_dim 128"),
        (on("TPU v5 lite"), ["model.head=24"], "splash", "head_dim 64"),
        (on("TPU v6 lite"), [], "splash", ""),
        (on("TPU7x"), [], "splash", ""),
        (on("TPU v3"), [], "xla", "the device is a TPU v3; Pallas splash attention needs TPU v4 or later"),
        (on("TPU v4"), ["attention=xla"], "xla", "attention: XLA, as the configuration says"),
        (on("TPU v4"), ["dropout.attention=0.1"], "xla", "because dropout.attention is 0.1; Pallas splash attention "),
        (on("TPU v4"), ["precision.compute=float32"], "xla", "precision.compute is float32"),
        (on("TPU v4"), ["model.context=1000"], "xla", "model.context is 1000; Pallas splash attention needs"),
        (on("TPU v4"), ["model.head=4"], "xla", "head_dim is 384"),
        (H100, [], "cudnn", "attention: cuDNN flash attention, as its rules allow"),
        (A100, ["model.context=1000"], "cudnn", ""),
        (V100, [], "xla", "Ampere or later"),
        (H100, ["dropout.attention=0.1"], "xla", "cuDNN flash attention needs dropout.attention 0"),
        (H100, ["model.head=8"], "xla", "head_dim is 192; cuDNN flash attention needs a multiple of 8 up to 128"),
        (on("cpu"), ["model.context=128"], "xla", "attention: XLA, there being no kernel for a cpu"),
        (on("cpu"), [], "xla", "attention: XLA, there being no kernel for a cpu, in 4 blocks of queries"),
    ],
)  # fmt: skip
def test_the_kernel_by_rule(layout, changes, name, words):
    found = choice(layout, *changes)
    assert found.name == name and words in found.words


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        (
            on("cpu"),
            ["attention=splash"],
            "attention=splash is not for a cpu; here it may be auto or xla",
        ),
        (H100, ["attention=splash"], "not for a gpu; here it may be auto, xla or cudnn"),
        (
            on("TPU v3"),
            ["attention=splash"],
            "needs TPU v4 or later, and the device is a TPU v3; attention=auto takes",
        ),
        (
            H100,
            ["attention=cudnn", "dropout.attention=0.1"],
            "needs dropout.attention 0, and dropout.attention is 0.1",
        ),
    ],
)
def test_a_kernel_that_cannot_be_is_refused(layout, changes, words):
    with pytest.raises(UsageError, match=words):
        choice(layout, *changes)


@libtpu
@pytest.mark.parametrize("name", ["v4-16", "v5e-8", "v6e-8"])
def test_splash_attention_is_compiled_for_a_slice(name):
    """With its gradient, sequences over four devices and heads over two."""
    made = Layout(make_mesh(Mesh(tensor=2), find_target(name).devices))

    def summed(q, k, v):
        return kernel_attention("splash", q, k, v, made).astype(jnp.float32).sum()

    like = jax.ShapeDtypeStruct((8, 4, 256, 80), jnp.bfloat16, sharding=made.batch_sharding())
    compiled = jax.jit(jax.grad(summed, (0, 1, 2))).lower(like, like, like).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3, (
        "forward, and backward for q and for k and v"
    )


@libtpu
@pytest.mark.parametrize(("dropout", "kernels"), [(0, True), (0.1, False)])
def test_a_step_takes_the_kernel_that_is_printed(dropout, kernels):
    config = resolve(
        read_values("tiny", ["precision.compute=bfloat16", f"dropout.attention={dropout}"])
    )
    model = build_architecture(config.model)
    made = make_layout(config, model, find_target("v5e-8").devices)
    step = make_train_step(config, model, layout=made)
    lowered = step.trace(abstract_state(config, model, made), abstract_batch(config, made)).lower()
    assert (
        ("tpu_custom_call" in lowered.as_text())
        == kernels
        == (select_kernel(config, model, made).name == "splash")
    )
