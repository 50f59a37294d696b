"""Texts read together, padded, and scored by blocks of the vocabulary score as each does alone."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growkit.models.gpt_neox import GPT_NEOX
from trainer.config.sections import Precision
from trainer.evaluate import likelihood as likelihood_module
from trainer.evaluate import losses
from trainer.evaluate.batches import WASTE, pad_length, plan_batches
from trainer.evaluate.likelihood import Likelihood, select_rows
from trainer.model import attention
from trainer.model.decoder import Decoder, init_params
from trainer.step.loss import cross_entropy

WINDOW = 48
VOCAB = 50
MODEL = GPT_NEOX.model(layer=1, embed=16, head=2, mlp=32, vocab=VOCAB, context=WINDOW, tied=True)
FLOAT32 = Precision("float32", "float32")


@pytest.mark.parametrize(("size", "shards"), [(8, 1), (12, 4), (4, 4)])
def test_every_text_is_in_one_batch_that_has_room_for_it(size, shards):
    lengths = np.random.default_rng(0).integers(1, 1025, 300).tolist() + [1024] * 50
    batches = list(plan_batches(lengths, 1024, size, shards))
    assert Counter(number for each in batches for number in each.numbers) == Counter(range(350))
    for each in batches:
        assert len(each.numbers) <= each.height <= size
        assert each.height % shards == 0
        assert all(lengths[number] <= each.time <= 1024 for number in each.numbers)
    computed = sum(each.height * each.time for each in batches)
    padded = sum(pad_length(length, 1024) for length in lengths)
    assert padded <= computed < 1.25 * padded
    assert len({(each.height, each.time) for each in batches}) <= 16


def test_a_short_text_is_not_padded_to_a_long_one():
    batches = list(plan_batches([1024, 250, 1024], 1024, 8, 1))
    assert [(each.numbers, each.height, each.time) for each in batches] == [
        ([0, 2], 2, 1024),
        ([1], 1, 256),
    ]
    # Where little is at stake a batch is filled up, and one program serves.
    (batch,) = plan_batches([32, 9, 30], 1024, 8, 1)
    assert (batch.height, batch.time) == (4, 32)
    assert (batch.height - 3) * batch.time < WASTE


def test_three_thousand_documents_waste_little():
    """Nearly all windows are full, as those of long documents are."""
    lengths = [1024] * 9000 + np.random.default_rng(1).integers(1, 1024, 3000).tolist()
    batches = list(plan_batches(lengths, 1024, 8, 1))
    assert sum(each.height * each.time for each in batches) < 1.05 * sum(lengths)


@pytest.fixture(scope="module")
def parameters():
    params = init_params(MODEL, FLOAT32, 0)
    generator = np.random.default_rng(0)
    # Larger than drawn, so that the tokens before matter.
    params = jax.tree.map(lambda leaf: leaf + 0.5 * generator.normal(size=leaf.shape), params)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def draw_pairs():
    generator = np.random.default_rng(2)
    sizes = ((1, 1), (30, 18), (17, 2), (70, 9), (1, 48), (2, 1), (9, 3), (20, 20))
    draw = generator.integers
    return [(draw(0, VOCAB, a).tolist(), draw(0, VOCAB, b).tolist()) for a, b in sizes]


def test_padding_and_neighbours_change_no_score(parameters, monkeypatch):
    likelihood = Likelihood(Decoder(MODEL, FLOAT32), parameters, WINDOW, 4)
    pairs = draw_pairs()
    told = []
    together = likelihood.score(pairs, lambda texts, tokens: told.append((texts, tokens)))
    assert np.sum(told, 0).tolist() == [8, 1 + 47 + 18 + 48 + 48 + 2 + 11 + 39]
    monkeypatch.setattr(likelihood_module, "PADDING", 7)
    assert likelihood.score(pairs) == together, "not by a bit"
    np.testing.assert_allclose(likelihood.score(pairs[1:2]), together[1:2], rtol=0, atol=1e-4)
    assert max(abs(total) for total, _ in together) > 10


def test_if_tokens_read_those_after_them_padding_would_change_scores(parameters, monkeypatch):
    monkeypatch.setattr(attention, "_weigh", lambda scores, *_: jax.nn.softmax(scores, axis=-1))
    likelihood = Likelihood(Decoder(MODEL, FLOAT32), parameters, WINDOW, 4)
    before = likelihood.score(draw_pairs()[1:4])
    monkeypatch.setattr(likelihood_module, "PADDING", 7)
    assert likelihood.score(draw_pairs()[1:4]) != before


@pytest.mark.parametrize(("block", "bound"), [(4, None), (4, 0.8), (11, None), (100, 0.8)])
def test_blocks_of_the_vocabulary_give_the_losses_of_all_logits(block, bound, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK", block)
    generator = np.random.default_rng(0)
    with jax.enable_x64(True):
        rows = jnp.asarray(generator.normal(size=(16, 5)))
        head = jnp.asarray(generator.normal(size=(11, 5)))
        # Tokens 3 and 8 are equally likely: the first of them is the likeliest.
        head = head.at[8].set(head[3])
        logits = losses._multiply(rows, head, bound)
        likeliest = np.asarray(logits.argmax(-1))
        assert (likeliest == 3).any()
        for targets in (likeliest, np.where(likeliest == 3, 8, likeliest), np.arange(16) % 11):
            found, hits = losses._compute_in_blocks(rows, head, jnp.asarray(targets), bound)
            np.testing.assert_allclose(found, cross_entropy(logits, targets), rtol=0, atol=1e-12)
            np.testing.assert_array_equal(hits, likeliest == targets)


def test_few_numbers_of_positions():
    assert {select_rows(count) for count in range(1, 513)} == {64, 128, 256, 512}
    assert all(select_rows(count) >= count for count in range(1, 513))
