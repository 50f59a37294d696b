"""Attention by the kernels of TPUs and GPUs, which never hold the weights of all pairs, and the rule for when.

Splash attention (Pallas) on TPUs, cuDNN's flash attention on NVIDIA's GPUs; where neither may be used the program is
`trainer.model.attention`'s, as XLA compiles it. Knows what each kernel needs and how it is called on a mesh; leaves
projections and rotary positions to the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from growkit.errors import UsageError
from growkit.models.architecture import Architecture
from trainer.config.sections import Config
from trainer.devices.accelerators import compute_capability, tpu_generation
from trainer.devices.sharding import BATCH_AXES, COMPUTE_RULES, Layout
from trainer.model.attention import split_queries

KERNELS = {"tpu": "splash", "gpu": "cudnn"}
TITLES = {"splash": "Pallas splash attention", "cudnn": "cuDNN flash attention", "xla": "XLA"}
# Queries and keys that splash attention takes at once, at most; it takes no fewer than 128, a row of registers.
BLOCKS = (512, 256, 128)


@dataclass(frozen=True)
class Choice:
    """How attention is computed: name, xla, splash or cudnn; reason, in words."""

    name: str
    reason: str

    @property
    def words(self) -> str:
        return f"attention: {TITLES[self.name]}, {self.reason}"


def select_kernel(config: Config, model: Architecture, layout: Layout) -> Choice:
    """The kernel of a run's devices, where its rules allow it and unless the configuration says otherwise.

    Raises UsageError for a kernel that is asked for and cannot be used.
    """
    asked, kernel = config.attention, KERNELS.get(layout.platform)
    if asked == "xla":
        return Choice("xla", "as the configuration says")
    if asked not in ("auto", kernel):
        takes = f"auto, xla or {kernel}" if kernel else "auto or xla"
        raise UsageError(
            f"attention={asked} is not for a {layout.platform}; here it may be {takes}"
        )
    if kernel is None:
        count = len(split_queries(config.model.context, layout.platform))
        parts = f", in {count} blocks of queries" if count > 1 else ""
        return Choice("xla", f"there being no kernel for a {layout.platform}{parts}")
    for holds, fact, need in _rules(kernel, config, model, layout.mesh.devices.flat[0]):
        if not holds and asked == kernel:
            raise UsageError(
                f"attention={kernel} needs {need}, and {fact}; attention=auto takes XLA then"
            )
        if not holds:
            return Choice("xla", f"because {fact}; {TITLES[kernel]} needs {need}")
    return Choice(
        kernel, f"as its rules allow: head_dim {model.head_dim}, {config.model.context} tokens"
    )


def _rules(kernel: str, config: Config, model: Architecture, device: Any) -> list[tuple[bool, str, str]]:
    """(whether it holds, what is the case, what the kernel needs) for each rule.

    cuDNN's as jax._src.cudnn checks them on any GPU; splash attention's compile for v4, v5e, v5p and v6e.
    """
    dropout, compute, size = config.dropout.attention, config.precision.compute, model.head_dim
    context, kind = config.model.context, device.device_kind
    on_tpu = kernel == "splash"
    widest = 256 if on_tpu else 128
    if on_tpu:
        fit = tpu_generation(device) >= 4, f"the device is a {kind}", "TPU v4 or later"
    else:
        fit = (
            compute_capability(device) >= 8.0,
            f"the device is a {kind}",
            "an NVIDIA GPU, Ampere or later",
        )
    rules = [
        fit,
        (dropout == 0, f"dropout.attention is {dropout:g}", "dropout.attention 0"),
        (compute == "bfloat16", f"precision.compute is {compute}", "bfloat16"),
        (
            size % 8 == 0 and size <= widest,
            f"head_dim is {size}",
            f"a multiple of 8 up to {widest}",
        ),
    ]
    if on_tpu:
        rules.append(
            (
                context % BLOCKS[-1] == 0,
                f"model.context is {context}",
                f"a multiple of {BLOCKS[-1]}",
            )
        )
    return rules


def kernel_attention(
    name: str,
    q_BxHxTxD: jax.Array,
    k_BxHxTxD: jax.Array,
    v_BxHxTxD: jax.Array,
    layout: Layout | None,
) -> jax.Array:
    """softmax(q k / sqrt(D)) v over the past by a kernel, each device its own sequences and heads."""
    attention: Callable[..., jax.Array] = {"splash": splash_attention, "cudnn": cudnn_attention}[
        name
    ]
    if layout is not None and layout.mesh.size > 1:
        spec = layout.make_sharding(BATCH_AXES, *COMPUTE_RULES["head"]).spec
        # A kernel says nothing of how its result varies over the mesh, which would be checked.
        attention = jax.shard_map(
            attention,
            mesh=layout.mesh,
            in_specs=(spec, spec, spec),
            out_specs=spec,
            check_vma=False,
        )
    return attention(q_BxHxTxD, k_BxHxTxD, v_BxHxTxD)


def splash_attention(
    q_BxHxTxD: jax.Array, k_BxHxTxD: jax.Array, v_BxHxTxD: jax.Array, interpret: bool = False
) -> jax.Array:
    """By the TPU's kernel, on one device. T is a multiple of 128. interpret: on any device, slowly."""
    _, heads, time, depth = q_BxHxTxD.shape
    block = next(size for size in BLOCKS if time % size == 0)
    names = (
        "block_q",
        "block_kv",
        "block_kv_compute",
        "block_q_dkv",
        "block_kv_dkv",
        "block_kv_dkv_compute",
    )
    sizes = splash.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
    mask = splash.MultiHeadMask([splash.CausalMask((time, time))] * heads)
    kernel = splash.make_splash_mha(
        mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret
    )
    # The kernel itself scales nothing. In bfloat16 the factor alone would be wrong by as much as 1 in 256.
    wide = q_BxHxTxD.astype(jnp.promote_types(q_BxHxTxD.dtype, jnp.float32)) / math.sqrt(depth)
    return jax.vmap(kernel)(wide.astype(q_BxHxTxD.dtype), k_BxHxTxD, v_BxHxTxD)


def cudnn_attention(q_BxHxTxD: jax.Array, k_BxHxTxD: jax.Array, v_BxHxTxD: jax.Array) -> jax.Array:
    """By the GPU's kernel, on one device."""
    q, k, v = (each.swapaxes(1, 2) for each in (q_BxHxTxD, k_BxHxTxD, v_BxHxTxD))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn").swapaxes(
        1, 2
    )
