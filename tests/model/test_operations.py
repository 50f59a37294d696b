"""Operations with their own backward pass equal automatic differentiation of the plain formulas."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.model import attention
from trainer.model.activation import ACTIVATIONS
from trainer.model.attention import Scores, causal_attention, split_queries
from trainer.model.dropout import draw_mask
from trainer.model.matmul import project
from trainer.step import loss as loss_module
from trainer.step.loss import cross_entropy, sum_token_losses

pytestmark = pytest.mark.usefixtures("strict_promotion")

SHAPE = (2, 3, 12, 4)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def plain_attention(q, k, v, mask=None, dropout=0.0):
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    if mask is not None:
        weights = jnp.where(mask, weights / (1 - dropout), 0)
    return jnp.einsum("bhts,bhsd->bhtd", weights, v)


def assert_same_gradients(ours, theirs, *arguments, bound=1e-12):
    """Values and gradients (of a random projection of the output) agree in every argument."""
    projection = random(*theirs(*arguments).shape, seed=9)
    places = tuple(range(len(arguments)))

    def differentiate(function):
        projected = jax.value_and_grad(lambda *a: (function(*a) * projection).sum(), places)
        return jax.tree.leaves(jax.jit(projected)(*arguments))

    for mine, plain in zip(differentiate(ours), differentiate(theirs), strict=True):
        np.testing.assert_allclose(mine, plain, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("platform", "time", "count"), [("cpu", 12, 4), ("cpu", 11, 1), ("tpu", 12, 1)]
)
def test_attention(platform, time, count, monkeypatch):
    """On a CPU by blocks of queries, where time divides evenly."""
    monkeypatch.setattr(attention, "SHORTEST", 3)
    q, k, v = (random(*SHAPE, seed=seed)[:, :, :time] for seed in range(3))
    assert len(split_queries(time, platform)) == count
    assert_same_gradients(
        lambda *a: causal_attention(*a, None, 0.0, platform), plain_attention, q, k, v
    )


def test_blocks_that_lack_a_part_of_their_past_are_not_attention(monkeypatch):
    monkeypatch.setattr(attention, "SHORTEST", 3)
    q, k, v = (random(*SHAPE, seed=seed) for seed in range(3))
    monkeypatch.setattr(attention, "_sum_prefixes", lambda parts: parts[-1])
    with pytest.raises(AssertionError):
        assert_same_gradients(lambda *a: causal_attention(*a, None, 0.0), plain_attention, q, k, v)
    monkeypatch.undo()
    assert len(split_queries(12, "cpu")) == 1 and len(split_queries(256, "cpu")) == 4
    monkeypatch.setattr(
        attention, "split_queries", lambda time, platform: [(0, 3), (0, 3), (6, 9), (9, 12)]
    )
    with pytest.raises(AssertionError):
        assert_same_gradients(lambda *a: causal_attention(*a, None, 0.0), plain_attention, q, k, v)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 7), (7, 3)])
def test_projection(platform, inputs, outputs):
    """Whichever of the operands is the narrower."""
    x, weight = random(2, 5, inputs), random(outputs, inputs, seed=1)

    def plain(x, weight):
        return x @ weight.T

    assert_same_gradients(lambda x, w: project(x, w, platform), plain, x, weight)
    with pytest.raises(AssertionError):
        assert_same_gradients(
            lambda x, w: project(x, jax.lax.stop_gradient(w), platform), plain, x, weight
        )


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_attention_with_dropout(platform, monkeypatch):
    monkeypatch.setattr(attention, "SHORTEST", 3)
    q, k, v = (random(*SHAPE, seed=seed) for seed in range(3))
    key = jax.random.key(3)
    mask = draw_mask(jax.random.key_data(key), 0.3, (*SHAPE[:3], SHAPE[2]))
    assert not mask.all()

    def ours(*arguments):
        return causal_attention(*arguments, key, 0.3, platform)

    assert_same_gradients(ours, lambda *a: plain_attention(*a, mask, 0.3), q, k, v)
    with pytest.raises(AssertionError):
        assert_same_gradients(ours, plain_attention, q, k, v)


GROUPED = (2, 6, 12, 4)


def group_plainly(q, k, v, mask=None, dropout=0.0, window=12, cap=None, divisor=2.0):
    """Keys and values repeated for each query head of their group."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k) / divisor
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    places = np.arange(q.shape[2])
    distance = places[:, None] - places[None]
    read = ((distance >= 0) & (distance < window))[None, None]
    weights = jax.nn.softmax(jnp.where(read, scores, -jnp.inf), axis=-1)
    if mask is not None:
        weights = jnp.where(mask, weights / (1 - dropout), 0)
    return jnp.einsum("bhts,bhsd->bhtd", weights, v)


def grouped_inputs():
    return random(*GROUPED), random(*SHAPE, seed=1), random(*SHAPE, seed=2)


@pytest.mark.parametrize(
    ("platform", "changes"),
    [("cpu", {}), ("cpu", {"window": 5, "cap": 0.7, "divisor": 3.0}), ("tpu", {"window": 3})],
)
def test_grouped_attention(platform, changes, monkeypatch):
    """Groups of two heads; windows, caps and other divisors, in blocks of queries too."""
    monkeypatch.setattr(attention, "SHORTEST", 3)
    scores = Scores(changes.get("divisor"), changes.get("cap"))
    window = jnp.int32(changes["window"]) if "window" in changes else None

    def ours(q, k, v):
        return causal_attention(q, k, v, None, 0.0, platform, window, scores)

    assert_same_gradients(ours, lambda *a: group_plainly(*a, **changes), *grouped_inputs())
    for wrong in ({"window": 6}, {"cap": 0.6}, {"divisor": 2.1}):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(
                ours(*grouped_inputs()),
                group_plainly(*grouped_inputs(), **(changes | wrong)),
                rtol=0,
                atol=1e-12,
            )


def test_grouped_attention_with_dropout(monkeypatch):
    monkeypatch.setattr(attention, "SHORTEST", 3)
    key = jax.random.key(3)
    mask = draw_mask(jax.random.key_data(key), 0.3, (*GROUPED[:3], GROUPED[2]))

    def ours(q, k, v):
        return causal_attention(q, k, v, key, 0.3, "cpu")

    assert_same_gradients(ours, lambda *a: group_plainly(*a, mask, 0.3), *grouped_inputs())


def test_groups_are_of_neighbours():
    """A query head reads the key head of its own group, and not the next one's."""
    q, k, v = grouped_inputs()
    exchanged = q.reshape(2, 3, 2, 12, 4).swapaxes(1, 2).reshape(q.shape)
    with pytest.raises(AssertionError):
        assert_same_gradients(
            lambda q, k, v: causal_attention(exchanged, k, v, None, 0.0), group_plainly, q, k, v
        )


def test_attention_looks_at_the_past_only():
    q, k, v = (random(*SHAPE, seed=seed) for seed in range(3))
    later = v.at[:, :, 5:].add(1.0)
    before, after = (causal_attention(q, k, values, None, 0.0) for values in (v, later))
    np.testing.assert_array_equal(before[:, :, :5], after[:, :, :5])
    assert not np.allclose(before[:, :, 5:], after[:, :, 5:])


PLAIN_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = random(5, 7) * 3
    assert_same_gradients(ACTIVATIONS[name], PLAIN_ACTIVATIONS[name], x)
    other = PLAIN_ACTIVATIONS["gelu_new" if name == "gelu" else "gelu"]
    with pytest.raises(AssertionError):
        assert_same_gradients(ACTIVATIONS[name], other, x)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("rows", [1, 6, 1000])
def test_loss(monkeypatch, rows, platform):
    monkeypatch.setattr(loss_module, "ROWS", {platform: rows})
    monkeypatch.setattr(loss_module, "target_platform", lambda layout: platform)
    batch, time, embed, vocab = 3, 8, 5, 11
    hidden, head = random(batch, time, embed), random(vocab, embed, seed=1)
    targets = np.random.default_rng(2).integers(0, vocab, (batch, time))
    mask = jnp.asarray([1.0, 0.0, 1.0])

    def plain(hidden, head):
        return (cross_entropy(hidden @ head.T, targets) * mask[:, None]).sum()

    def plainly_capped(hidden, head):
        logits = 0.8 * jnp.tanh(hidden @ head.T / 0.8)
        return (cross_entropy(logits, targets) * mask[:, None]).sum()

    assert_same_gradients(lambda h, w: sum_token_losses(h, w, targets, mask), plain, hidden, head)
    capped = partial(sum_token_losses, bound=0.8)
    assert_same_gradients(lambda h, w: capped(h, w, targets, mask), plainly_capped, hidden, head)
    with pytest.raises(AssertionError):
        assert_same_gradients(
            lambda h, w: sum_token_losses(h, w, targets, jnp.ones(3)), plain, hidden, head
        )


def test_loss_holds_no_more_logits_than_a_piece():
    batch, time, embed, vocab = 4, 256, 8, 512
    arguments = (
        random(batch, time, embed),
        random(vocab, embed),
        np.zeros((batch, time), int),
        jnp.ones(batch),
    )
    gradient = jax.jit(jax.grad(sum_token_losses, (0, 1))).lower(*arguments).compile()
    everything = batch * time * vocab * 8
    at_once = jax.jit(jax.grad(partial(sum_token_losses, rows=loss_module.ALL_ROWS), (0, 1)))
    held = at_once.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert held >= everything
    assert gradient.memory_analysis().temp_size_in_bytes < everything
    plain = (
        jax.jit(jax.grad(lambda h, w, t, m: cross_entropy(h @ w.T, t).sum(), (0, 1)))
        .lower(*arguments)
        .compile()
    )
    assert plain.memory_analysis().temp_size_in_bytes >= everything


def test_narrow_numbers_are_summed_wide():
    hidden, head = random(2, 16, 8).astype(jnp.bfloat16), random(32, 8).astype(jnp.bfloat16)
    total = sum_token_losses(hidden, head, np.zeros((2, 16), int), jnp.ones(2, jnp.float32))
    assert total.dtype == jnp.float32
    q = random(*SHAPE).astype(jnp.bfloat16)
    mixed = causal_attention(q, q, q, None, 0.0)
    assert mixed.dtype == jnp.bfloat16
    wide = q.astype(jnp.float32)
    plain = plain_attention(wide, wide, wide)
    np.testing.assert_allclose(mixed.astype(jnp.float32), plain, atol=0.05)


def test_the_loss_takes_float32_in_64_bit_mode():
    hidden, head = random(2, 16, 8).astype(jnp.float32), random(32, 8).astype(jnp.float32)
    targets = np.zeros((2, 16), int)
    assert sum_token_losses(hidden, head, targets, jnp.ones(2)).dtype == jnp.float32
