"""The trainer's step on one GPU compared with the same step in PyTorch: tokens per second and MFU.

    python benchmarks/train_gpu.py [SEQUENCES]

The 760m preset in bfloat16 (parameters and moments float32), SEQUENCES (16) of 1024 tokens a step:
the trainer's jitted step against transformers' GPTNeoXForCausalLM under torch.compile, its
attention held to the flash kernel, with torch.optim.AdamW (fused). One row is without dropout, one
with the recipe's, the same on both sides. Expect without dropout on an H200: at least half of the
peak, and 1.2 times PyTorch's tokens per second. Needs jax[cuda12] and a torch with CUDA. Both share
the card's memory, so JAX takes what it needs instead of three quarters of it. They are timed in
turns.
"""

from __future__ import annotations

import os
import statistics
import sys
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import torch
from torch_training import convert_parameters, make_network, make_step
from train_cpu import Step, make_jax_step, time_step

from trainer.config.sections import Config, build_architecture, resolve
from trainer.config.values import read_values
from trainer.log.speed import Utilization

ROUNDS = 5
STEPS = 10  # a round
WARM_UP = 3  # steps, which compile
OURS = "trainer"
THEIRS = "PyTorch"


def make_config(sequences: int, dropout: bool) -> Config:
    """The preset with a batch for one card, without the rematerialisation that TPU slices need."""
    overrides = [f"batch.sequences={sequences}", "schedule.warmup=0", "remat=none"]
    if not dropout:
        overrides += ["dropout.hidden=0", "dropout.attention=0"]
    return resolve(read_values("760m", overrides))


def make_torch_step(config: Config, network: Any) -> Step:
    """PyTorch's step, compiled, with the flash kernel."""
    step = make_step(network, config.optimizer, True, config.precision.compute)

    def run(tokens: np.ndarray) -> float:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return float(step(torch.from_numpy(tokens).cuda()))

    return run


def time_rounds(config: Config) -> list[dict[str, float]]:
    """Seconds a step of both sides in each round, on the same parameters and tokens."""
    model = build_architecture(config.model)
    network = make_network(model, config.dropout, device="cuda")
    steps = {
        OURS: make_jax_step(config, convert_parameters(network, model)),
        THEIRS: make_torch_step(config, network),
    }
    shape = (STEPS, config.batch.sequences, config.model.context + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, shape)
    for step in steps.values():
        time_step(step, tokens[:WARM_UP])
    rounds = []
    for _ in range(ROUNDS):
        rounds.append({name: time_step(step, tokens) for name, step in steps.items()})
    return rounds


def measure_row(config: Config) -> str:
    """The figures of one configuration, in words."""
    rounds = time_rounds(config)
    batch = config.batch.sequences * config.model.context
    flops_per_token = build_architecture(config.model).flops_per_token()
    utilization = Utilization(jax.devices()[0], 1, flops_per_token)
    words = []
    for name in (OURS, THEIRS):
        speed = batch / statistics.median(times[name] for times in rounds)
        mfu = utilization.compute_mfu(speed)
        share = "MFU unknown: the peak is not listed" if mfu is None else f"MFU {mfu:.1%}"
        words.append(f"{name} {speed:.0f} tokens/s, {share}")
    ratio = statistics.median(times[THEIRS] / times[OURS] for times in rounds)
    words.append(f"trainer's tokens/s over PyTorch's {ratio:.2f}")
    return "; ".join(words)


def main() -> None:
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        seen = "one" if torch.cuda.is_available() else "none"
        raise SystemExit(
            "this benchmark needs a GPU that both JAX and PyTorch see; "
            f"JAX sees {kind}, PyTorch {seen}"
        )
    sequences = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    print(f"{kind}, jax {jax.__version__}, torch {torch.__version__}")
    for name, dropout in (("dropout 0", False), ("the recipe's dropout", True)):
        print(f"{name}: {measure_row(make_config(sequences, dropout))}")


if __name__ == "__main__":
    main()
