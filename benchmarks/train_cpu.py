"""The trainer's step on a CPU against the same step in PyTorch: tokens/s, in turns, on the same
tokens.

    python benchmarks/train_cpu.py

The trainer's own jitted step (`make_train_step`: loss, gradients, clip, AdamW) against
transformers' GPTNeoXForCausalLM with torch.optim.AdamW (fused), eager and under torch.compile: 6
layers, d 256, vocabulary 8192, 8 sequences of 256 tokens, float32, no dropout, two threads each.
All begin with the same parameters, and their losses must agree at the end. Printed are the median
of each, and the median, least and largest of the rounds' ratios. About a minute and a half.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch_training import convert_parameters, make_network, make_step

from trainer.config.sections import Config, build_architecture, resolve
from trainer.step.update import init_state, make_train_step

ROUNDS, STEPS, THREADS = 10, 3, 2
CONFIG = {
    "model": {"layer": 6, "embed": 256, "head": 4, "mlp": 1024, "vocab": 8192, "context": 256},
    "dropout": {"hidden": 0.0, "attention": 0.0},
    "precision": {"compute": "float32"},
    "batch": {"sequences": 8},
    "schedule": {"kind": "constant", "warmup": 0},
}
OURS, EAGER, COMPILED = "trainer", "PyTorch, eager", "PyTorch, torch.compile"


def make_jax_step(config: Config, params: Any) -> Callable[[np.ndarray], float]:
    """tokens [B, T+1] -> loss of the trainer's step, which keeps its state here."""
    model = build_architecture(config.model)
    state, step = (
        init_state(config, model, jax.tree.map(jax.numpy.array, params)),
        make_train_step(config, model),
    )

    def run(tokens: np.ndarray) -> float:
        nonlocal state
        state, metrics = step(state, tokens[None])
        return float(metrics["loss"])

    return run


def make_torch_step(config: Config, compiled: bool) -> Callable[[np.ndarray], float]:
    """The same of PyTorch's."""
    network = make_network(build_architecture(config.model), config.dropout)
    step = make_step(network, config.optimizer, compiled, config.precision.compute)
    return lambda tokens: float(step(torch.from_numpy(tokens)))


def time_step(run: Callable[[np.ndarray], float], batches: np.ndarray) -> float:
    """Seconds a step over some batches, each step waited for."""
    begun = time.perf_counter()
    for tokens in batches:
        run(tokens)
    return (time.perf_counter() - begun) / len(batches)


def make_competitors(config: Config, first: np.ndarray) -> dict[str, Callable[[np.ndarray], float]]:
    """The steps by name, each compiled and warm; torch.compile only where it works (it needs a C++
    compiler).
    """
    params = convert_parameters(
        make_network(build_architecture(config.model), config.dropout),
        build_architecture(config.model),
    )
    steps = {
        OURS: make_jax_step(config, params),
        EAGER: make_torch_step(config, False),
        COMPILED: make_torch_step(config, True),
    }
    for name in list(steps):
        try:
            time_step(steps[name], first)
        except torch._dynamo.exc.TorchDynamoException as problem:
            print(f"{name} does not work here: {str(problem).splitlines()[0]}")
            del steps[name]
    return steps


def main() -> None:
    torch.set_num_threads(THREADS)
    config = resolve(CONFIG)
    sequences, context, vocab = config.batch.sequences, config.model.context, config.model.vocab
    shape = (ROUNDS, STEPS, sequences, context + 1)
    tokens = np.random.default_rng(0).integers(0, vocab, shape)
    steps = make_competitors(config, tokens[0])
    rounds = [
        {name: time_step(step, batches) for name, step in steps.items()} for batches in tokens
    ]
    losses = {name: step(tokens[0, 0]) for name, step in steps.items()}
    if max(losses.values()) - min(losses.values()) > 1e-3 * min(losses.values()):
        raise SystemExit(f"these are not the same training: losses {losses}")
    for name in steps:
        median = statistics.median(row[name] for row in rounds)
        line = (
            f"{name:24} {1e3 * median:7.1f} ms a step, {sequences * context / median:7.0f} tokens/s"
        )
        ratios = sorted(row[name] / row[OURS] for row in rounds)
        if name != OURS:
            line += f"; trainer's tokens/s over it {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(line)


if __name__ == "__main__":
    main()
