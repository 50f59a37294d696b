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
from trainer.loss import token_losses_sum
from trainer.model import GPTNeoX, head_weight
from trainer.optimizer import Multipliers, adamw, global_norm
from trainer.schedule import learning_rate


class State(NamedTuple):
    """All that training changes.

    step counts updates of this run; schedule_step counts them from the last branch point, which Adam's own
    count, kept through growth, does not.
    """

    params: Any
    optimizer: Any
    step: jax.Array
    schedule_step: jax.Array


def loss_sum(
    network: GPTNeoX, params: Any, tokens_BxT1: jax.Array, key: jax.Array | None, mask_B: jax.Array | None = None
) -> jax.Array:
    """The summed loss, nats, of predicting each token from those before it; with a key, dropout is on.

    mask: 1 for the sequences that count, None for all.
    """
    rngs = {} if key is None else {"dropout": key}
    hidden = network.apply({"params": params}, tokens_BxT1[:, :-1], key is None, rngs=rngs, head=False)
    head = head_weight(network.model, params).astype(network.precision.compute)
    mask_B = jnp.ones(len(tokens_BxT1)) if mask_B is None else mask_B
    return token_losses_sum(hidden, head, tokens_BxT1[:, 1:], mask_B.astype(jnp.result_type(float)))


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
        return loss_sum(network, params, tokens_BxT1, None, mask_B)

    return eval_step


def initial_state(config: Config, model: NeoX, params: Any) -> State:
    """A state at step 0 with fresh moments around `params`."""
    # Two zeros and not one twice: the state's buffers are donated, each once.
    zeros = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    return State(params, adamw(config.optimizer, model).init(params), *zeros)
