"""Attention by the kernels of TPUs and GPUs, and the rules for when to use them.

The kernels are splash attention (Pallas) on TPUs and cuDNN's flash attention on NVIDIA GPUs. They
never hold the weights of all pairs of positions. Where a rule forbids them,
`trainer.model.attention` is used, compiled by XLA.

Shapes in names: B batch, Q query head, H key and value head, T time, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax

from growkit.errors import UsageError
from growkit.models.architecture import Architecture
from trainer.config.sections import Config
from trainer.devices.accelerators import compute_capability, tpu_generation
from trainer.devices.sharding import BATCH_AXES, COMPUTE_RULES, Layout
from trainer.model.attention import MIXED, PLAIN, Scores, split_queries
from trainer.model.precision import widen

KERNELS = {"tpu": "splash", "gpu": "cudnn"}
TITLES = {"splash": "Pallas splash attention", "cudnn": "cuDNN flash attention", "xla": "XLA"}
# Block sizes of splash attention: the largest that divides the sequence. 128 is a row of registers
# and the smallest that the kernel takes.
BLOCKS = (512, 256, 128)
Arrays = tuple[jax.Array, jax.Array, jax.Array]
Attend = Callable[..., jax.Array]
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
    if kernel == "cudnn":
        bound = model.number("score_cap")
        rules.append(Rule(bound is None, f"scores are capped at {bound}", "scores without a cap"))
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
    arrays: Arrays,
    layout: Layout | None,
    scores: Scores = PLAIN,
    windows: Sequence[int | None] = (None,),
    kind: jax.Array | None = None,
) -> jax.Array:
    """Attention by a kernel: see `trainer.model.attention`.

    arrays: q [B, Q, T, D], k and v [B, H, T, D]. Each device takes its own sequences and heads.
    windows: those of the model's kinds of layers, of which this layer is number `kind`.
    """
    kernel = KERNEL_FUNCTIONS[name]
    attentions = [
        _spread(partial(kernel, scores=scores, window=window), layout) for window in windows
    ]
    if kind is None:
        return attentions[0](*arrays)
    return jax.lax.switch(kind, attentions, *arrays)


def _spread(attention: Attend, layout: Layout | None) -> Attend:
    """Attention in which each device takes its own sequences and heads."""
    if layout is None or layout.mesh.size == 1:
        return attention
    spec = layout.make_sharding(BATCH_AXES, *COMPUTE_RULES["head"]).spec
    # check_vma compares how values vary over the mesh, which a kernel does not tell.
    return jax.shard_map(
        attention, mesh=layout.mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
    )


def splash_attention(
    q_BxQxTxD: jax.Array,
    k_BxHxTxD: jax.Array,
    v_BxHxTxD: jax.Array,
    interpret: bool = False,
    scores: Scores = PLAIN,
    window: int | None = None,
) -> jax.Array:
    """Attention by the TPU's kernel on one device. T must be a multiple of 128.

    interpret: emulate the kernel, slowly, on any device.
    """
    splash = import_splash()
    _, heads, time, depth = q_BxQxTxD.shape
    shape = (time, time)
    mask = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_select_block_sizes(time),
        attn_logits_soft_cap=scores.cap,
        residual_checkpoint_name=MIXED,
        interpret=interpret,
    )
    # The kernel does not scale. In bfloat16 the factor 1 / sqrt(D) alone would be wrong by up to 1
    # in 256.
    scaled = widen(q_BxQxTxD) / (scores.divisor or math.sqrt(depth))
    return jax.vmap(kernel)(scaled.astype(q_BxQxTxD.dtype), k_BxHxTxD, v_BxHxTxD)


def import_splash() -> Any:
    """The kernel's module. A TPU alone needs it, and its compiler takes long to import."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def _select_block_sizes(time: int) -> Any:
    """The same size for the blocks of queries and of keys, forward and backward."""
    size = next(size for size in BLOCKS if time % size == 0)
    return import_splash().BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def cudnn_attention(
    q_BxQxTxD: jax.Array,
    k_BxHxTxD: jax.Array,
    v_BxHxTxD: jax.Array,
    scores: Scores = PLAIN,
    window: int | None = None,
) -> jax.Array:
    """Attention by the GPU's kernel on one device. It bounds no scores."""
    q_BxTxQxD = q_BxQxTxD.swapaxes(1, 2)
    k_BxTxHxD = k_BxHxTxD.swapaxes(1, 2)
    v_BxTxHxD = v_BxHxTxD.swapaxes(1, 2)
    mixed_BxTxQxD = jax.nn.dot_product_attention(
        q_BxTxQxD,
        k_BxTxHxD,
        v_BxTxHxD,
        scale=1.0 / scores.divisor if scores.divisor else None,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return mixed_BxTxQxD.swapaxes(1, 2)


KERNEL_FUNCTIONS: dict[str, Attend] = {"splash": splash_attention, "cudnn": cudnn_attention}
