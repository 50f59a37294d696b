"""One step of training and one of evaluation: pure functions of (state, tokens), jitted, the state donated.

Knows loss, gradients, accumulation and the update; leaves where tokens come from and what becomes of the
state to the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from growkit.neox import NeoX
from trainer.config import Config
from trainer.model import GPTNeoX
from trainer.optimizer import Multipliers, adamw, global_norm, learning_rate


class State(NamedTuple):
    """All that training changes.

    step counts updates of this run; schedule_step counts them from the last branch point, which Adam's own
    count, kept through growth, does not.
    """

    params: Any
    optimizer: Any
    step: jax.Array
    schedule_step: jax.Array


def cross_entropy(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """The loss of every token, nats [B, T], in the logits' precision."""
    picked = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxTxV, axis=-1) - picked


def loss_sum(network: GPTNeoX, params: Any, tokens_BxT1: jax.Array, key: jax.Array | None) -> jax.Array:
    """The summed loss, nats, of predicting each token from those before it; with a key, dropout is on."""
    deterministic = key is None
    rngs = {} if deterministic else {"dropout": key}
    logits = network.apply({"params": params}, tokens_BxT1[:, :-1], deterministic, rngs=rngs)
    return cross_entropy(logits, tokens_BxT1[:, 1:]).sum()


def gradients(network: GPTNeoX, params: Any, tokens_AxBxT1: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Any]:
    """Mean loss and its gradient over all A x B sequences: sums of both over the A parts, divided once."""
    part = jax.value_and_grad(partial(loss_sum, network))
    parts, batch, length = tokens_AxBxT1.shape

    def add(total, inputs):
        index, tokens = inputs
        part_key = None if key is None else jax.random.fold_in(key, index)
        return jax.tree.map(jnp.add, total, part(params, tokens, part_key)), None

    loss_type = jnp.promote_types(network.precision.compute, jnp.float32)
    start = (jnp.zeros((), loss_type), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, start, (jnp.arange(parts), tokens_AxBxT1))
    return jax.tree.map(lambda leaf: leaf / (parts * batch * (length - 1)), total)


def make_train_step(
    config: Config, model: NeoX, multipliers: Multipliers | None = None
) -> Callable[[State, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """The jitted step: (state, tokens [A, B, T+1]) -> (state, metrics); the state given is donated.

    Metrics: loss in nats a token, gradient_norm before the clip, learning_rate.
    """
    network = GPTNeoX(model, config.precision, config.dropout, config.remat)
    optimizer = adamw(config.optimizer, model, multipliers)
    drops = any((config.dropout.hidden, config.dropout.attention, config.dropout.embedding))

    def train_step(state: State, tokens_AxBxT1: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step) if drops else None
        loss, gradient = gradients(network, state.params, tokens_AxBxT1, key)
        direction, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        rate = learning_rate(config.schedule, config.optimizer.learning_rate, state.schedule_step)
        updates = jax.tree.map(lambda update, param: (-rate * update).astype(param.dtype), direction, state.params)
        norm = global_norm(gradient, multipliers.clip if multipliers else None)
        metrics = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
        params = optax.apply_updates(state.params, updates)
        return State(params, optimizer_state, state.step + 1, state.schedule_step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(config: Config, model: NeoX) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The jitted validation: (params, tokens [B, T+1], mask [B]) -> summed loss, nats, of unmasked sequences."""
    network = GPTNeoX(model, config.precision)

    @jax.jit
    def eval_step(params: Any, tokens_BxT1: jax.Array, mask_B: jax.Array) -> jax.Array:
        logits = network.apply({"params": params}, tokens_BxT1[:, :-1])
        return (cross_entropy(logits, tokens_BxT1[:, 1:]) * mask_B[:, None]).sum()

    return eval_step


def initial_state(config: Config, model: NeoX, params: Any) -> State:
    """A state at step 0 with fresh moments around `params`."""
    # Two zeros and not one twice: the state's buffers are donated, each once.
    zeros = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    return State(params, adamw(config.optimizer, model).init(params), *zeros)
