"""One step of training and one of evaluation: pure functions of (state, tokens), jitted, the state donated.

Knows loss, gradients, accumulation, the update and how each lies on a mesh of devices; leaves where tokens come from
and what becomes of the state to the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from growkit.errors import UsageError
from growkit.neox import NeoX
from growkit.spec import Row
from trainer.config import Config
from trainer.kernels import chosen
from trainer.loss import token_losses_sum
from trainer.model import GPTNeoX
from trainer.optimizer import Multipliers, adamw, global_norm
from trainer.schedule import learning_rate
from trainer.sharding import Layout, alone


class State(NamedTuple):
    """All that training changes.

    step counts updates of this run; schedule_step counts them from the last branch point, which Adam's own
    count, kept through growth, does not.
    """

    params: Any
    optimizer: Any
    step: jax.Array
    schedule_step: jax.Array


def check_precision(config: Config) -> None:
    """Raise UsageError for a float64 that JAX would silently make float32."""
    if "float64" in (config.precision.params, config.precision.compute) and not jax.config.jax_enable_x64:
        raise UsageError("precision float64 needs JAX's 64-bit mode: set JAX_ENABLE_X64=1 in the environment")


def loss_sum(
    network: GPTNeoX, params: Any, tokens_BxT1: jax.Array, key: jax.Array | None, mask_B: jax.Array | None = None
) -> jax.Array:
    """The summed loss, nats, of predicting each token from those before it; with a key, dropout is on.

    mask: 1 for the sequences that count, None for all.
    """
    rngs = {} if key is None else {"dropout": key}
    hidden = network.apply({"params": params}, tokens_BxT1[:, :-1], key is None, rngs=rngs, head=False)
    head = network.head_weight(params)
    mask_B = jnp.ones(len(tokens_BxT1)) if mask_B is None else mask_B
    return token_losses_sum(hidden, head, tokens_BxT1[:, 1:], mask_B.astype(jnp.result_type(float)), network.layout)


def gradients(network: GPTNeoX, params: Any, tokens_AxBxT1: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Any]:
    """Mean loss and its gradient over all A x B sequences: sums of both over the A parts, divided once."""
    part = jax.value_and_grad(partial(loss_sum, network))
    parts, batch, length = tokens_AxBxT1.shape

    def add(total, inputs):
        index, tokens = inputs
        part_key = None if key is None else jax.random.fold_in(key, index)
        loss, gradient = jax.tree.map(jnp.add, total, part(params, tokens, part_key))
        return (loss, _as_moments(network, gradient)), None

    loss_type = jnp.promote_types(network.precision.compute, jnp.float32)
    start = (jnp.zeros((), loss_type), _as_moments(network, jax.tree.map(jnp.zeros_like, params)))
    total, _ = jax.lax.scan(add, start, (jnp.arange(parts), tokens_AxBxT1))
    return jax.tree.map(lambda leaf: leaf / (parts * batch * (length - 1)), total)


def _as_moments(network: GPTNeoX, gradient: Any) -> Any:
    """A gradient laid out as the moments that take it in."""
    layout = network.layout
    return jax.tree.map(layout.constrain, gradient, network.model.table.tree(layout.moment))


def make_train_step(
    config: Config,
    model: NeoX,
    multipliers: Multipliers | None = None,
    layout: Layout | None = None,
    grown_at: int | None = None,
) -> Callable[[State, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """The jitted step: (state, tokens [A, B, T+1]) -> (state, metrics); the state given is donated.

    Metrics: loss in nats a token, gradient_norm before the clip, learning_rate. layout: None for the first device.
    grown_at: see `learning_rate`.
    """
    layout = layout or alone()
    kernel = chosen(config, model, layout).name
    network = GPTNeoX(model, config.precision, config.dropout, config.remat, kernel, layout=layout)
    optimizer = adamw(config.optimizer, model, multipliers)
    drops = any((config.dropout.hidden, config.dropout.attention, config.dropout.embedding))
    places = state_shardings(config, model, layout)

    def train_step(state: State, tokens_AxBxT1: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step) if drops else None
        loss, gradient = gradients(network, state.params, tokens_AxBxT1, key)
        # With ZeRO-1 a device updates the part of the parameters whose moments it has.
        params = _as_moments(network, state.params)
        direction, optimizer_state = optimizer.update(gradient, state.optimizer, params)
        rate = learning_rate(config.schedule, config.optimizer.learning_rate, state.schedule_step, grown_at)
        updates = jax.tree.map(lambda update, param: (-rate * update).astype(param.dtype), direction, params)
        norm = global_norm(gradient, multipliers.clip if multipliers else None)
        metrics = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
        params = _as_moments(network, optax.apply_updates(params, updates))
        return State(params, optimizer_state, state.step + 1, state.schedule_step + 1), metrics

    return jax.jit(
        train_step,
        in_shardings=(places, layout.batch(1)),
        out_shardings=(places, layout.whole),
        donate_argnums=0,
    )


def make_eval_step(
    config: Config, model: NeoX, layout: Layout | None = None
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The jitted validation: (params, tokens [B, T+1], mask [B]) -> summed loss, nats, of unmasked sequences."""
    layout = layout or alone()
    network = GPTNeoX(model, config.precision, kernel=chosen(config, model, layout).name, layout=layout)

    def eval_step(params: Any, tokens_BxT1: jax.Array, mask_B: jax.Array) -> jax.Array:
        return loss_sum(network, params, tokens_BxT1, None, mask_B)

    places = (model.table.tree(layout.stored), layout.batch(), layout.batch())
    return jax.jit(eval_step, in_shardings=places, out_shardings=layout.whole)


def initial_state(config: Config, model: NeoX, params: Any) -> State:
    """A state at step 0 with fresh moments around `params`."""
    # Two zeros and not one twice: the state's buffers are donated, each once.
    zeros = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    return State(params, adamw(config.optimizer, model).init(params), *zeros)


def abstract_state(config: Config, model: NeoX, layout: Layout) -> State:
    """The shapes, dtypes and places of a state, nothing of it computed."""
    dtype, sizes = jnp.dtype(config.precision.params), model.sizes

    def lie(place: Callable[[Row], NamedSharding]) -> dict[str, Any]:
        return model.table.tree(lambda row: jax.ShapeDtypeStruct(row.stacked_shape(sizes), dtype, sharding=place(row)))

    params, moments = lie(layout.stored), lie(layout.moment)
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.whole)
    optimizer = jax.eval_shape(adamw(config.optimizer, model).init, params)
    optimizer = optax.tree.set(optimizer, mu=moments, nu=moments, count=counter)
    return State(params, optimizer, counter, counter)


def state_shardings(config: Config, model: NeoX, layout: Layout) -> State:
    """Where every array of a state lies: parameters, moments, and the counters on every device."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, model, layout))
