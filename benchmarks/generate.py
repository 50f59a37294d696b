"""How fast `growkit generate` draws tokens, compared with transformers' own generate.

    python benchmarks/generate.py [--family NAME] [--layers N] [--embed N] [--vocab N]
                                  [--prompt N] [--tokens N] [--rounds N] [--threads N]

Expect a ratio (growkit's tokens per second over transformers') above 1 on a CPU. Both draw the
likeliest tokens after the same prompt with the same random float32 parameters, batch size 1, each
with its cache of keys and values. Each first draws once untimed, which compiles growkit's programs;
then they take turns. The time includes reading the prompt. The script stops where their tokens
differ.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import torch
import transformers

from growkit.checkpoint.location import open_source
from growkit.errors import GrowkitError
from trainer.evaluate.generate import Generator

HEAD = 64  # dimensions of a head
GROUP = 4  # query heads that read one key and value head, in families that have groups
Draw = Callable[[], list[int]]


def make_network(family: str, layers: int, embed: int, vocab: int, context: int) -> Any:
    """A model of transformers' own class with random parameters."""
    heads = embed // HEAD
    fields: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": embed,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
    }
    if family == "gpt_neox":
        fields["intermediate_size"] = 4 * embed
    else:
        # A gated mlp has three matrices; its usual width is 8/3 of the model's.
        gated = {"intermediate_size": 8 * embed // 3, "num_key_value_heads": max(1, heads // GROUP)}
        fields |= gated
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **fields)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # A text must not end before it is as long as asked.
    network.generation_config.eos_token_id = None
    return network.eval()


def prepare_growkit(directory: Path, prompt: list[int], tokens: int) -> Draw:
    """The function that draws with the trainer's model of a directory."""
    source = open_source(str(directory))
    params = jax.device_put(source.stack(dtype="float32"))
    generator = Generator(source.model, temperature=0.0)
    return lambda: list(generator.draw(params, prompt, tokens, seed=0))


def prepare_transformers(network: Any, prompt: list[int], tokens: int) -> Draw:
    """The function that draws with transformers' generate."""
    ids = torch.tensor([prompt])

    def draw() -> list[int]:
        with torch.no_grad():
            found = network.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        drawn: list[int] = found[0, len(prompt) :].tolist()
        return drawn

    return draw


def measure(draw: Draw) -> float:
    """Tokens per second."""
    start = time.perf_counter()
    count = len(draw())
    return count / (time.perf_counter() - start)


def describe(values: list[float], form: str) -> str:
    """The median, and the least and the largest value."""
    figures = (statistics.median(values), min(values), max(values))
    median, least, largest = (format(value, form) for value in figures)
    return f"{median} ({least} to {largest})"


@click.command()
@click.option("--family", default="llama", show_default=True)
@click.option("--layers", default=12, show_default=True)
@click.option("--embed", default=768, show_default=True)
@click.option("--vocab", default=32000, show_default=True)
@click.option("--prompt", "length", default=128, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", default=128, show_default=True, help="Tokens that are drawn.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=0, help="Threads of PyTorch; 0 leaves its own number.")
def main(
    family: str,
    layers: int,
    embed: int,
    vocab: int,
    length: int,
    tokens: int,
    rounds: int,
    threads: int,
) -> None:
    """Print tokens per second of both and their ratio."""
    if threads:
        torch.set_num_threads(threads)
    network = make_network(family, layers, embed, vocab, context=2 * (length + tokens))
    prompt = np.random.default_rng(0).integers(0, vocab, length).tolist()
    with tempfile.TemporaryDirectory() as directory:
        network.save_pretrained(directory)
        ours = prepare_growkit(Path(directory), prompt, tokens)
    theirs = prepare_transformers(network, prompt, tokens)
    if ours() != theirs():
        raise GrowkitError("growkit and transformers draw different tokens")
    growkit_speeds, transformers_speeds = [], []
    for _ in range(rounds):
        growkit_speeds.append(measure(ours))
        transformers_speeds.append(measure(theirs))
    pairs = zip(growkit_speeds, transformers_speeds, strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    print(f"{family}, {layers} layers, embed {embed}; prompt {length}, {tokens} tokens drawn")
    print(f"growkit: {describe(growkit_speeds, '.1f')} tokens per second")
    print(f"transformers: {describe(transformers_speeds, '.1f')} tokens per second")
    print(f"ratio: {describe(ratios, '.2f')}")


if __name__ == "__main__":
    main()
