"""Attention by kernels: equal to XLA's form, selected where their rules allow, with a reason."""

from __future__ import annotations

import importlib.util
from functools import partial
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
from trainer.model.attention import Scores, causal_attention
from trainer.model.kernels import cudnn_attention, kernel_attention, select_kernel, splash_attention
from trainer.plan.compiler import abstract_batch
from trainer.plan.topology import find_target
from trainer.step.update import abstract_state, make_train_step

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPUs' compiler, is not here"
)
pytestmark = pytest.mark.usefixtures("strict_promotion")
# Three blocks of queries and of keys.
TIME = 384


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def xla(q, k, v):
    return causal_attention(q, k, v, None, 0.0)


def splash(q, k, v):
    return splash_attention(q, k, v, interpret=True)


def assert_same(ours, theirs, depth, heads=2):
    """Outputs and gradients (of a random projection of the output) agree. heads: of the queries."""
    q = random(1, heads, TIME, depth)
    k, v = (random(1, 2, TIME, depth, seed=seed) for seed in (1, 2))
    projection = random(1, heads, TIME, depth, seed=3)

    @partial(jax.jit, static_argnums=0)
    def differentiate(attention, q, k, v):
        out, back = jax.vjp(attention, q, k, v)
        return jax.tree.leaves((out, back(projection)))

    pairs = zip(differentiate(ours, q, k, v), differentiate(theirs, q, k, v), strict=True)
    for mine, plain in pairs:
        np.testing.assert_allclose(mine, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [64, 80, 96, 128])
def test_splash_attention_is_attention(depth):
    assert_same(splash, xla, depth)


@pytest.mark.parametrize("window", [None, 150])
def test_splash_attention_of_groups_with_windows_and_caps(window):
    scores = Scores(divisor=10.0, cap=1.5)

    def ours(q, k, v, width=window):
        return splash_attention(q, k, v, interpret=True, scores=scores, window=width)

    def plain(q, k, v):
        width = None if window is None else jnp.int32(window)
        return causal_attention(q, k, v, None, 0.0, "cpu", width, scores)

    assert_same(ours, plain, 64, heads=4)
    with pytest.raises(AssertionError):
        assert_same(lambda *a: ours(*a, width=149), plain, 64, heads=4)


def test_splash_attention_with_another_scale_or_mask_is_not(monkeypatch):
    with pytest.raises(AssertionError):
        assert_same(lambda q, k, v: splash(q * 1.01, k, v), xla, 64)
    module = kernels.import_splash()
    monkeypatch.setattr(module, "CausalMask", module.FullMask)
    with pytest.raises(AssertionError):
        assert_same(splash, xla, 64)


def test_cudnn_is_asked_for_attention(monkeypatch):
    """Without a GPU, its call is computed by the other implementation of the same function."""
    plain = jax.nn.dot_product_attention

    def elsewhere(*arguments, implementation, **options):
        assert implementation == "cudnn"
        return plain(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", elsewhere)
    assert_same(cudnn_attention, xla, 80)
    windowed = partial(cudnn_attention, scores=Scores(divisor=7.0), window=100)
    scores = Scores(divisor=7.0)
    assert_same(
        windowed,
        lambda *a: causal_attention(*a, None, 0.0, "cpu", jnp.int32(100), scores),
        80,
        heads=4,
    )
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, is_causal, **options: elsewhere(*a, **options)
    )
    with pytest.raises(AssertionError):
        assert_same(cudnn_attention, xla, 80)


def on(kind: str, capability: str = ""):
    """A layout of one device of a kind. capability: an NVIDIA GPU's."""
    platform = "gpu" if capability else "cpu"
    if kind.startswith("TPU"):
        platform = "tpu"
    device = SimpleNamespace(device_kind=kind, compute_capability=capability)
    return SimpleNamespace(
        platform=platform, mesh=SimpleNamespace(devices=np.array([device], object))
    )


def choice(layout, *changes):
    config = resolve(read_values("760m", ["dropout.attention=0", *changes]))
    return select_kernel(config, build_architecture(config.model), layout)


CPU = on("cpu")
TPU_V4 = on("TPU v4")
H100 = on("NVIDIA H100", "9.0")
A100 = on("NVIDIA A100", "8.0")
V100 = on("Tesla V100", "7.0")


@pytest.mark.parametrize(
    ("layout", "changes", "name", "words"),
    [
        (TPU_V4, [], "splash", "attention: Pallas splash attention, whose rules allow head_dim"),
        (TPU_V4, ["attention=xla"], "xla", "attention: XLA, as attention=xla asks"),
        (TPU_V4, ["dropout.attention=0.1"], "xla", "because dropout.attention is 0.1; Pallas"),
        (TPU_V4, ["precision.compute=float32"], "xla", "precision.compute is float32"),
        (TPU_V4, ["model.context=1000"], "xla", "model.context is 1000; Pallas splash attention"),
        (TPU_V4, ["model.head=4"], "xla", "head_dim is 384"),
        (on("TPU v3"), [], "xla", "the device is a TPU v3; Pallas splash attention needs TPU v4"),
        (on("TPU v5 lite"), ["model.head=24"], "splash", "head_dim 64"),
        (on("TPU v6 lite"), [], "splash", ""),
        (on("TPU7x"), [], "splash", ""),
        (H100, [], "cudnn", "attention: cuDNN flash attention, whose rules allow"),
        (A100, ["model.context=1000"], "cudnn", ""),
        (V100, [], "xla", "Ampere or later"),
        (H100, ["dropout.attention=0.1"], "xla", "cuDNN flash attention needs dropout.attention"),
        (H100, ["model.head=8"], "xla", "head_dim is 192; cuDNN flash attention needs"),
        (CPU, ["model.context=128"], "xla", "attention: XLA, because a cpu has no kernel"),
        (CPU, [], "xla", "no kernel of its own; queries are computed in 4 blocks"),
    ],
)  # fmt: skip
def test_the_kernel_by_rule(layout, changes, name, words):
    found = choice(layout, *changes)
    assert found.name == name and words in found.words


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        (
            CPU,
            ["attention=splash"],
            "attention=splash does not run on a cpu; use auto or xla",
        ),
        (H100, ["attention=splash"], "does not run on a gpu; use auto, xla or cudnn"),
        (
            on("TPU v3"),
            ["attention=splash"],
            "needs TPU v4 or later, but the device is a TPU v3; attention=auto uses XLA here",
        ),
        (
            H100,
            ["attention=cudnn", "dropout.attention=0.1"],
            "needs dropout.attention 0, but dropout.attention is 0.1",
        ),
    ],
)
def test_a_kernel_that_cannot_be_is_refused(layout, changes, words):
    with pytest.raises(UsageError, match=words):
        choice(layout, *changes)


def test_a_layer_takes_the_kernel_of_its_kind(monkeypatch):
    """One of two windows, chosen by a number that the program is given."""
    monkeypatch.setitem(
        kernels.KERNEL_FUNCTIONS, "splash", partial(splash_attention, interpret=True)
    )
    arrays = tuple(random(1, 2, TIME, 64, seed=seed) for seed in range(3))
    chosen = jax.jit(
        lambda kind: kernel_attention("splash", arrays, None, windows=(100, None), kind=kind)
    )
    for kind, window in enumerate((jnp.int32(100), None)):
        plain = causal_attention(*arrays, None, 0.0, "cpu", window)
        np.testing.assert_allclose(chosen(kind), plain, rtol=0, atol=1e-5)
        other = chosen(1 - kind)
        assert np.abs(np.asarray(other) - plain).max() > 1e-3


def test_capped_scores_are_not_cudnns():
    changes = [
        "model.kind=gemma2",
        "model.rotary_pct=1",
        "model.parallel_residual=false",
        "model.config={sliding_window: 512}",
    ]
    found = choice(H100, *changes)
    assert found.name == "xla" and "scores are capped at 50" in found.words
    assert choice(TPU_V4, *changes).name == "splash"


@libtpu
@pytest.mark.parametrize("name", ["v4-16", "v5e-8", "v6e-8"])
def test_splash_attention_is_compiled_for_a_slice(name):
    """With its gradient, sequences over four devices and heads over two."""
    layout = Layout(make_mesh(Mesh(tensor=2), find_target(name).devices))

    def summed(q, k, v):
        return kernel_attention("splash", (q, k, v), layout).astype(jnp.float32).sum()

    like = jax.ShapeDtypeStruct((8, 4, 256, 80), jnp.bfloat16, sharding=layout.batch_sharding())
    compiled = jax.jit(jax.grad(summed, (0, 1, 2))).lower(like, like, like).compile()
    # One kernel forward, and two backward: for q, and for k and v.
    assert compiled.as_text().count("tpu_custom_call") >= 3


@libtpu
@pytest.mark.parametrize(("dropout", "kernels"), [(0, True), (0.1, False)])
def test_a_step_takes_the_kernel_that_is_printed(dropout, kernels):
    config = resolve(
        read_values("tiny", ["precision.compute=bfloat16", f"dropout.attention={dropout}"])
    )
    model = build_architecture(config.model)
    layout = make_layout(config, model, find_target("v5e-8").devices)
    step = make_train_step(config, model, layout=layout)
    lowered = step.trace(
        abstract_state(config, model, layout), abstract_batch(config, layout)
    ).lower()
    assert ("tpu_custom_call" in lowered.as_text()) == kernels
    assert (select_kernel(config, model, layout).name == "splash") == kernels
