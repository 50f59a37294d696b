"""Experts on a CPU: a step of a mixture beside dense models, and blocks beside jax.lax.ragged_dot.

    python benchmarks/experts_cpu.py [ROWS ...]

The first table times a gradient step (float32, 8 x 256 tokens, 4 layers of width 256) of a mixture
of 8 experts, 2 per token, beside a dense model with as many active parameters. Expect less than 1.5
times the dense model's time. The second times one mlp's products, forward and backward, in blocks
of so many rows (32, 64, 128, 256), and by ragged_dot, which XLA for CPU sends through all experts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.model import Model, build_architecture
from trainer.config.sections import Precision
from trainer.devices.sharding import make_single_device_layout
from trainer.model import grouped
from trainer.model.decoder import Decoder, init_params
from trainer.step.update import accumulate_gradients

ROUNDS = 7
EXPERTS, TOP, EMBED, HIDDEN = 8, 2, 256, 512
SIZES = {"layer": 4, "embed": EMBED, "head": 4, "vocab": 4096, "context": 256}
GATE = {"num_experts": EXPERTS, "num_experts_per_tok": TOP, "moe_intermediate_size": HIDDEN}
MODELS = {
    "mixture, 8 experts of 512, 2 per token": Model(kind="qwen3_moe", config=GATE, **SIZES),
    "dense, mlp 1024": Model(kind="qwen3", mlp=TOP * HIDDEN, **SIZES),
}


def time_calls(call: Callable[[], Any]) -> float:
    """Seconds of a call, the median of some after the first, which compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def time_model(section: Model) -> float:
    """Seconds of a gradient of 8 sequences."""
    model = build_architecture(section)
    precision = Precision("float32", "float32")
    network = Decoder(model, precision, layout=make_single_device_layout())
    params = init_params(model, precision, 0)
    shape = (1, 8, model.context + 1)
    tokens = np.random.default_rng(0).integers(0, model.vocab, shape, dtype=np.int32)
    step = jax.jit(partial(accumulate_gradients, network))
    return time_calls(lambda: step(params, tokens, None))


def time_products(platform: str) -> float:
    """Seconds of one product of 4096 rows in 8 uneven groups, with its gradients."""
    draw = np.random.default_rng(0)
    rows = 8 * 256 * TOP
    sizes = jnp.asarray(draw.multinomial(rows, draw.dirichlet(np.full(EXPERTS, 4.0))), jnp.int32)
    x = jnp.asarray(draw.normal(size=(rows, EMBED)), jnp.float32)
    weight = jnp.asarray(draw.normal(size=(EXPERTS, HIDDEN, EMBED)), jnp.float32)

    def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.square(grouped.multiply_groups(x, weight, sizes, platform)).sum()

    step = jax.jit(jax.grad(loss, (0, 1)))
    return time_calls(lambda: step(x, weight))


def main(blocks: list[int]) -> None:
    """Print both tables."""
    for name, section in MODELS.items():
        print(f"{name:<40} {1e3 * time_model(section):8.1f} ms")
    for rows in blocks:
        grouped.ROWS = rows
        print(f"{f'blocks of {rows} rows':<40} {1e3 * time_products('cpu'):8.1f} ms")
    print(f"{'ragged_dot':<40} {1e3 * time_products('tpu'):8.1f} ms")


if __name__ == "__main__":
    main([int(each) for each in sys.argv[1:]] or [32, 64, 128, 256])
