"""Texts continued with keys and values that are kept are those of a model that reads them whole.

The siblings, whose cache is one position off, are not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import DEFAULT, MODELS, QUICK, TIME, save_model

from growkit.checkpoint.location import open_source
from trainer.config.sections import Precision
from trainer.evaluate import generate
from trainer.evaluate.generate import Generator, generate_tokens, select_length
from trainer.model.attention import Past
from trainer.model.block import KEPT
from trainer.model.decoder import Decoder
from trainer.model.kinds import compute_tables, list_kinds, number_kinds

pytestmark = pytest.mark.usefixtures("strict_promotion")

TOKENS = np.random.default_rng(1).integers(0, 96, (2, TIME))
PROMPTS = np.random.default_rng(2).integers(0, 96, (6, 5))
PROMPT = PROMPTS[0].tolist()
# Tokens that follow; the context is 32.
COUNT = 20
# What is read first, of TIME; and the positions of a cache, more than are needed.
FIRST, SIZE = 9, 20
# transformers reads on beyond a context, growkit cuts the text.
WITHIN = [name for name in MODELS if name != "llama-longer-than-dynamic"]
# This one draws the same token always.
VARIED = [name for name in WITHIN if name != "gpt2-untied"]


def select(names, default):
    """All names, those slow that are not of the default."""
    return [
        name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name] = save_model(tmp_path_factory.mktemp("models") / name, *MODELS[name])
        return made[name]

    return make


def compare_parts_with_whole(path, shifts):
    """The largest differences of logits in float64, of the largest, where a text is read in two
    parts and the second part's position is wrong by each of `shifts`.
    """
    with jax.enable_x64(True):
        source = open_source(str(path))
        model = source.model
        params = {"params": jax.device_put(source.stack(dtype="float64"))}
        network = Decoder(model, Precision("float64", "float64"))

        def read(tokens, time, **more):
            kinds, _ = number_kinds(list_kinds(model, time))
            tables = compute_tables(model, kinds, time, np.float64)
            return network.apply(params, tokens, rotary=tables, **more)

        def read_both(shift):
            whole = read(TOKENS, TIME)
            _, kept = read(TOKENS[:, :FIRST], FIRST, head=False, mutable=[KEPT])
            widths = [(0, 0)] * 3 + [(0, SIZE - FIRST), (0, 0)]
            # What lies behind the filled positions must not matter.
            keys, values = (
                jnp.pad(each, widths, constant_values=7.0) for each in network.find_kept(kept)
            )
            past = Past(keys, values, jnp.int32(FIRST) + shift)
            return whole[:, FIRST:], read(TOKENS[:, FIRST:], SIZE, past=past)

        quick = jax.jit(read_both, compiler_options=QUICK)
        found = [[np.asarray(each) for each in quick(np.int32(shift))] for shift in shifts]
    assert all(parts.dtype == np.float64 for _, parts in found)
    return [np.abs(whole - parts).max() / np.abs(whole).max() for whole, parts in found]


@pytest.mark.parametrize("name", select(WITHIN, ("mistral", "gemma3", "gpt2")))
def test_a_text_in_two_parts_is_the_text(saved, name):
    """The siblings are one position off."""
    exact, *siblings = compare_parts_with_whole(saved(name), [0, -1, 1])
    assert exact < 1e-12
    assert min(siblings) > 1e-3


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of a busy machine wait for each other at every small product."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generate_theirs(path):
    """The likeliest tokens after each prompt by transformers' own generate."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    network = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    network.generation_config.eos_token_id = None
    with torch.no_grad():
        found = network.generate(
            torch.from_numpy(PROMPTS), max_new_tokens=COUNT, do_sample=False, pad_token_id=0
        )
    return found[:, PROMPTS.shape[1] :].tolist()


def generate_ours(path):
    source = open_source(str(path))
    params = jax.device_put(source.stack(dtype="float32"))
    generator = Generator(source.model, 0.0)
    return [list(generator.draw(params, prompt.tolist(), COUNT, 0)) for prompt in PROMPTS]


@pytest.mark.parametrize("name", select(VARIED, (*DEFAULT, "gpt_neox-linear")))
def test_the_likeliest_tokens_are_those_of_transformers(saved, name):
    theirs = generate_theirs(saved(name))
    assert {len(tokens) for tokens in theirs} == {COUNT}
    # Models of random parameters soon repeat themselves.
    assert len({token for tokens in theirs for token in tokens}) > 2
    assert generate_ours(saved(name)) == theirs


def test_a_cache_one_position_off_draws_other_tokens(saved, monkeypatch):
    theirs = generate_theirs(saved("llama"))

    def shift(keys, values, length):
        return Past(keys, values, length - 1)

    monkeypatch.setattr(generate, "Past", shift)
    assert generate_ours(saved("llama")) != theirs


def test_tokens_are_drawn_as_from_the_whole_text(saved):
    """With the same keys, and beyond the context from the last tokens that it holds."""
    source = open_source(str(saved("llama")))
    context, temperature, seed = source.model.context, 0.8, 3
    network = Decoder(source.model, Precision("float32", "float32"))
    params = {"params": source.stack(dtype="float32")}
    apply = jax.jit(network.apply)
    text, count = list(PROMPT), context + 8 - len(PROMPT)
    for number in range(count):
        last = text[-context:]
        padded = np.zeros((1, context), np.int32)
        padded[0, : len(last)] = last
        logits = apply(params, padded)[0, len(last) - 1]
        key = jax.random.fold_in(jax.random.key(seed), number)
        text.append(int(jax.random.categorical(key, logits / temperature)))
    assert len(text) > context
    assert list(generate_tokens(source, PROMPT, count, temperature, seed)) == text[len(PROMPT) :]


def test_few_programs_are_compiled(saved):
    lengths = {select_length(length, 2048) for length in range(1, 2049)}
    assert lengths == {64, 128, 256, 512, 1024, 2048}
    assert select_length(65, 100) == 100 and select_length(5, 32) == 32
    source = open_source(str(saved("llama")))
    generator = Generator(source.model, 0.0)
    params = jax.device_put(source.stack(dtype="float32"))
    for length in (1, 3, 5):
        assert len(list(generator.draw(params, PROMPT[:length], 2 * length, 0))) == 2 * length
    assert generator._read._cache_size() == generator._extend._cache_size() == 1
