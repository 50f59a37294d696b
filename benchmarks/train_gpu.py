"""The trainer's step on one GPU against the same step in PyTorch: tokens/s and model FLOPs
utilisation.

    python benchmarks/train_gpu.py [SEQUENCES]

The 760m preset in bfloat16 (parameters and moments float32), SEQUENCES (16) of 1024 tokens a step:
the trainer's jitted step against transformers' GPTNeoXForCausalLM under torch.compile, its
attention held to the flash kernel, and torch.optim.AdamW (fused); one row without dropout and one
with the recipe's, the same on both sides. Expected without dropout on an H200: at least half of the
peak, and 1.2 times PyTorch's tokens/s. Needs jax[cuda12] and a torch with CUDA. Timed in turns; the
memory is shared, so JAX takes what it needs and not three quarters of the card.
"""

from __future__ import annotations

import os
import statistics
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import torch
from torch_training import convert_parameters, make_network, make_step
from train_cpu import make_jax_step, time_step

from trainer.config.sections import Config, build_architecture, resolve
from trainer.config.values import read_values

ROUNDS, STEPS = 5, 10
# Dense bfloat16 FLOP/s by what JAX calls the device: NVIDIA's data sheets.
PEAKS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}


def make_config(sequences: int, dropout: bool) -> Config:
    """The preset at a batch for one card; the rematerialisation that its slices need is left out."""
    overrides = [f"batch.sequences={sequences}", "schedule.warmup=0", "remat=none"]
    none = [] if dropout else ["dropout.hidden=0", "dropout.attention=0"]
    return resolve(read_values("760m", overrides + none))


def make_torch_step(config: Config, network):
    """tokens [B, T+1] -> loss, compiled, on the flash kernel."""
    step = make_step(network, config.optimizer, True, config.precision.compute)

    def run(tokens: np.ndarray) -> float:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return float(step(torch.from_numpy(tokens).cuda()))

    return run


def measure_row(config: Config) -> str:
    """The figures of one configuration, both sides from the same parameters."""
    model, batch = build_architecture(config.model), config.batch.sequences * config.model.context
    network = make_network(model, config.dropout, device="cuda")
    steps = {
        "trainer": make_jax_step(config, convert_parameters(network, model)),
        "PyTorch": make_torch_step(config, network),
    }
    shape = (STEPS, config.batch.sequences, config.model.context + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, shape)
    for step in steps.values():
        time_step(step, tokens[:3])
    rounds = [
        {name: time_step(step, tokens) for name, step in steps.items()} for _ in range(ROUNDS)
    ]
    peak = PEAKS.get(jax.devices()[0].device_kind)
    words = []
    for name in steps:
        speed = batch / statistics.median(times[name] for times in rounds)
        share = (
            f"MFU {speed * model.flops_per_token() / peak:.1%}"
            if peak
            else "MFU unknown: the peak is not listed"
        )
        words.append(f"{name} {speed:.0f} tokens/s, {share}")
    ratio = statistics.median(times["PyTorch"] / times["trainer"] for times in rounds)
    return f"{'; '.join(words)}; trainer's tokens/s over PyTorch's {ratio:.2f}"


def main() -> None:
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise SystemExit(
            f"this benchmark needs a GPU that both JAX and PyTorch see; JAX sees {jax.devices()[0].device_kind}, "
            f"PyTorch {'one' if torch.cuda.is_available() else 'none'}"
        )
    sequences = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}")
    for name, dropout in (("dropout 0", False), ("the recipe's dropout", True)):
        print(f"{name}: {measure_row(make_config(sequences, dropout))}")


if __name__ == "__main__":
    main()
