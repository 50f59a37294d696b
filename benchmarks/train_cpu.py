"""The trainer's step on a CPU compared with the same step in PyTorch, in tokens per second.

    python benchmarks/train_cpu.py [gpt_neox | llama]

The trainer's own jitted step (`make_train_step`: loss, gradients, clip, AdamW) against
transformers' class with torch.optim.AdamW (fused), eager and under torch.compile: 6 layers, embed
256, vocabulary 8192, 8 sequences of 256 tokens, float32, no dropout, two threads each. The Llama
has 2 key and value heads for its 4 heads, and a gated mlp of as many numbers. All begin with the
same parameters and train on the same tokens, in turns; their losses must agree at the end. The
script prints the median of each, and the median, smallest and largest ratio of all rounds. It takes
about a minute and a half.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch_training import convert_parameters, make_network, make_step

from trainer.config.sections import Config, build_architecture, resolve
from trainer.step.update import init_state, make_train_step

ROUNDS = 10
STEPS = 3  # a round
THREADS = 2
TOLERANCE = 1e-3  # relative difference of the losses at the end
CONFIG = {
    "model": {"layer": 6, "embed": 256, "head": 4, "mlp": 1024, "vocab": 8192, "context": 256},
    "dropout": {"hidden": 0.0, "attention": 0.0},
    "precision": {"compute": "float32"},
    "batch": {"sequences": 8},
    "schedule": {"kind": "constant", "warmup": 0},
}
# What the model section of a family has beside those sizes: 3 x 683 is about 2 x 1024.
FAMILIES = {"gpt_neox": {}, "llama": {"kind": "llama", "kv": 2, "mlp": 684}}
OURS = "trainer"
EAGER = "PyTorch, eager"
COMPILED = "PyTorch, torch.compile"

Step = Callable[[np.ndarray], float]  # tokens [B, T+1] -> loss; it keeps its own state


def make_jax_step(config: Config, params: Any) -> Step:
    """The trainer's step."""
    model = build_architecture(config.model)
    # Copied, because the step is given its state's memory.
    state = init_state(config, model, jax.tree.map(jax.numpy.array, params))
    step = make_train_step(config, model)

    def run(tokens: np.ndarray) -> float:
        nonlocal state
        state, metrics = step(state, tokens[None])
        return float(metrics["loss"])

    return run


def make_torch_step(config: Config, compiled: bool) -> Step:
    """PyTorch's step."""
    network = make_network(build_architecture(config.model), config.dropout)
    step = make_step(network, config.optimizer, compiled, config.precision.compute)
    return lambda tokens: float(step(torch.from_numpy(tokens)))


def time_step(run: Step, batches: np.ndarray) -> float:
    """Seconds a step over some batches, waiting for each step."""
    begun = time.perf_counter()
    for tokens in batches:
        run(tokens)
    return (time.perf_counter() - begun) / len(batches)


def make_competitors(config: Config, first: np.ndarray) -> dict[str, Step]:
    """The steps by name, compiled by a run over the batches `first`.

    torch.compile is left out where it does not work: it needs a C++ compiler.
    """
    model = build_architecture(config.model)
    params = convert_parameters(make_network(model, config.dropout), model)
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


def require_same_loss(losses: dict[str, float]) -> None:
    """Exit when the steps did not train alike."""
    lowest = min(losses.values())
    if max(losses.values()) - lowest > TOLERANCE * lowest:
        raise SystemExit(f"these are not the same training: losses {losses}")


def show(rounds: list[dict[str, float]], tokens: int) -> None:
    """Print tokens per second and ratios. rounds: seconds a step by name; tokens: in a step."""
    for name in rounds[0]:
        median = statistics.median(times[name] for times in rounds)
        line = f"{name:24} {1e3 * median:7.1f} ms a step, {tokens / median:7.0f} tokens/s"
        if name != OURS:
            ratios = sorted(times[name] / times[OURS] for times in rounds)
            line += (
                f"; trainer's tokens/s over it {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )
        print(line)


def main() -> None:
    torch.set_num_threads(THREADS)
    family = sys.argv[1] if len(sys.argv) > 1 else "gpt_neox"
    config = resolve({**CONFIG, "model": {**CONFIG["model"], **FAMILIES[family]}})
    sequences = config.batch.sequences
    context = config.model.context
    shape = (ROUNDS, STEPS, sequences, context + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, shape)
    steps = make_competitors(config, tokens[0])
    rounds = []
    for batches in tokens:
        rounds.append({name: time_step(step, batches) for name, step in steps.items()})
    require_same_loss({name: step(tokens[0, 0]) for name, step in steps.items()})
    show(rounds, sequences * context)


if __name__ == "__main__":
    main()
