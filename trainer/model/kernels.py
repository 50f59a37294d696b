"""Attention by the kernels of TPUs and GPUs, and the rules for when to use them.

The kernels are splash attention (Pallas) on TPUs and cuDNN's flash attention on NVIDIA GPUs. They
never hold the weights of all pairs of positions. Where a rule forbids them,
`trainer.model.attention` is used, compiled by XLA.

Shapes in names: B batch, H head, T time, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from growkit.errors import UsageError
from growkit.models.architecture import Architecture
from trainer.config.sections import Config
from trainer.devices.accelerators import compute_capability, tpu_generation
from trainer.devices.sharding import BATCH_AXES, COMPUTE_RULES, Layout
from trainer.model.attention import split_queries
from trainer.model.precision import widen

KERNELS = {"tpu": "splash", "gpu": "cudnn"}
TITLES = {"splash": "Pallas splash attention", "cudnn": "cuDNN flash attention", "xla": "XLA"}
# Block sizes of splash attention: the largest that divides the sequence. 128 is a row of registers
# and the smallest that the kernel takes.
BLOCKS = (512, 256, 128)
# The widest head, in dimensions, that each kernel takes.
WIDEST_HEADS = {"splash": 256, "cudnn": 128}


@dataclass(frozen=True)
class Choice:
    """How attention is computed. name: xla, splash or cudnn. reason: why, for the log."""

    name: str
    reason: str

    @property
    def words(self) -> str:
        """One line for the log."""
        return f"attention: {TITLES[self.name]}, {self.reason}"


class Rule(NamedTuple):
    """One condition of a kernel: whether it holds, what is the case, and what the kernel needs."""

    holds: bool
    fact: str
    need: str


def select_kernel(config: Config, model: Architecture, layout: Layout) -> Choice:
    """Select the kernel of a run's devices where its rules allow it, else XLA.

    config.attention can ask for XLA or for one kernel. Raises UsageError for a kernel that cannot
    be used.
    """
    asked = config.attention
    kernel = KERNELS.get(layout.platform)
    if asked == "xla":
        return Choice("xla", "as attention=xla asks")
    _check_platform(asked, kernel, layout.platform)
    if kernel is None:
        return Choice("xla", _explain_no_kernel(config, layout.platform))
    for rule in _list_rules(kernel, config, model, layout.mesh.devices.flat[0]):
        if rule.holds:
            continue
        if asked == kernel:
            raise UsageError(
                f"attention={kernel} needs {rule.need}, but {rule.fact}; "
                f"attention=auto uses XLA here"
            )
        return Choice("xla", f"because {rule.fact}; {TITLES[kernel]} needs {rule.need}")
    sizes = f"head_dim {model.head_dim} and context {config.model.context}"
    return Choice(kernel, f"whose rules allow {sizes}")


def _check_platform(asked: str, kernel: str | None, platform: str) -> None:
    """Raise UsageError for another platform's kernel."""
    if asked in ("auto", kernel):
        return
    possible = f"auto, xla or {kernel}" if kernel else "auto or xla"
    raise UsageError(f"attention={asked} does not run on a {platform}; use {possible}")


def _explain_no_kernel(config: Config, platform: str) -> str:
    reason = f"because a {platform} has no kernel of its own"
    count = len(split_queries(config.model.context, platform))
    if count > 1:
        reason += f"; queries are computed in {count} blocks"
    return reason


def _list_rules(kernel: str, config: Config, model: Architecture, device: Any) -> list[Rule]:
    """The rules of a kernel.

    cuDNN's are those that jax._src.cudnn checks on any GPU. Splash attention's were found by
    compiling for v4, v5e, v5p and v6e.
    """
    dropout = config.dropout.attention
    compute = config.precision.compute
    head_dim = model.head_dim
    context = config.model.context
    widest = WIDEST_HEADS[kernel]
    rules = [
        _rule_on_device(kernel, device),
        Rule(dropout == 0, f"dropout.attention is {dropout:g}", "dropout.attention 0"),
        Rule(compute == "bfloat16", f"precision.compute is {compute}", "bfloat16"),
        Rule(
            head_dim % 8 == 0 and head_dim <= widest,
            f"head_dim is {head_dim}",
            f"a multiple of 8 up to {widest}",
        ),
    ]
    if kernel == "splash":
        smallest = BLOCKS[-1]
        multiple = f"a multiple of {smallest}"
        rules.append(Rule(context % smallest == 0, f"model.context is {context}", multiple))
    return rules


def _rule_on_device(kernel: str, device: Any) -> Rule:
    fact = f"the device is a {device.device_kind}"
    if kernel == "splash":
        return Rule(tpu_generation(device) >= 4, fact, "TPU v4 or later")
    return Rule(compute_capability(device) >= 8.0, fact, "an NVIDIA GPU, Ampere or later")


def kernel_attention(
    name: str,
    q_BxHxTxD: jax.Array,
    k_BxHxTxD: jax.Array,
    v_BxHxTxD: jax.Array,
    layout: Layout | None,
) -> jax.Array:
    """softmax(q k / sqrt(D)) v over the past by a kernel.

    Each device takes its own sequences and heads.
    """
    attention: Callable[..., jax.Array] = cudnn_attention
    if name == "splash":
        attention = splash_attention
    if layout is not None and layout.mesh.size > 1:
        spec = layout.make_sharding(BATCH_AXES, *COMPUTE_RULES["head"]).spec
        # check_vma compares how values vary over the mesh, which a kernel does not tell.
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
    """Attention by the TPU's kernel on one device. T must be a multiple of 128.

    interpret: emulate the kernel, slowly, on any device.
    """
    _, heads, time, depth = q_BxHxTxD.shape
    mask = splash.MultiHeadMask([splash.CausalMask((time, time))] * heads)
    kernel = splash.make_splash_mha(
        mask,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_select_block_sizes(time),
        interpret=interpret,
    )
    # The kernel does not scale. In bfloat16 the factor 1 / sqrt(D) alone would be wrong by up to 1
    # in 256.
    scaled = widen(q_BxHxTxD) / math.sqrt(depth)
    return jax.vmap(kernel)(scaled.astype(q_BxHxTxD.dtype), k_BxHxTxD, v_BxHxTxD)


def _select_block_sizes(time: int) -> splash.BlockSizes:
    """The same size for the blocks of queries and of keys, forward and backward."""
    size = next(size for size in BLOCKS if time % size == 0)
    return splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def cudnn_attention(q_BxHxTxD: jax.Array, k_BxHxTxD: jax.Array, v_BxHxTxD: jax.Array) -> jax.Array:
    """Attention by the GPU's kernel on one device."""
    q_BxTxHxD = q_BxHxTxD.swapaxes(1, 2)
    k_BxTxHxD = k_BxHxTxD.swapaxes(1, 2)
    v_BxTxHxD = v_BxHxTxD.swapaxes(1, 2)
    mixed_BxTxHxD = jax.nn.dot_product_attention(
        q_BxTxHxD, k_BxTxHxD, v_BxTxHxD, is_causal=True, implementation="cudnn"
    )
    return mixed_BxTxHxD.swapaxes(1, 2)
