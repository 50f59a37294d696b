"""One step of training and one of evaluation: pure functions of (state, tokens), jitted, the state donated.

Knows loss, gradients, accumulation, the update and how each lies on a mesh of devices; leaves where tokens come from
and what becomes of the state to the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from growkit.errors import UsageError
from growkit.models.architecture import Architecture
from growkit.models.notation import Row
from trainer.config.sections import Config, Optimizer, Precision
from trainer.devices.sharding import Layout, make_single_device_layout
from trainer.model.decoder import GPTNeoX
from trainer.model.kernels import select_kernel
from trainer.step.loss import sum_token_losses
from trainer.step.optimizer import Multipliers, adamw, global_norm
from trainer.step.schedule import encode_schedule, evaluate_schedule

# Programs of other models that a process keeps: those of a study's sources and target, of a growth within a run.
PROGRAMS = 16


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
    if (
        "float64" in (config.precision.params, config.precision.compute)
        and not jax.config.jax_enable_x64
    ):
        raise UsageError(
            "precision float64 needs JAX's 64-bit mode: set JAX_ENABLE_X64=1 in the environment"
        )


def sum_loss(
    network: GPTNeoX,
    params: Any,
    tokens_BxT1: jax.Array,
    key: jax.Array | None,
    mask_B: jax.Array | None = None,
) -> jax.Array:
    """The summed loss, nats, of predicting each token from those before it; with a key, dropout is on.

    mask: 1 for the sequences that count, None for all.
    """
    rngs = {} if key is None else {"dropout": key}
    hidden = network.apply(
        {"params": params}, tokens_BxT1[:, :-1], key is None, rngs=rngs, head=False
    )
    head = network.head_weight(params)
    mask_B = jnp.ones(len(tokens_BxT1)) if mask_B is None else mask_B
    return sum_token_losses(
        hidden, head, tokens_BxT1[:, 1:], mask_B.astype(jnp.result_type(float)), network.layout
    )


def accumulate_gradients(
    network: GPTNeoX, params: Any, tokens_AxBxT1: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, Any]:
    """Mean loss and its gradient over all A x B sequences: sums of both over the A parts, divided once."""
    part = jax.value_and_grad(partial(sum_loss, network))
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
    return jax.tree.map(layout.constrain, gradient, network.model.table.tree(layout.moment_sharding))


class TrainStep:
    """(state, tokens [A, B, T+1]) -> (state, metrics), with the numbers of one run; the state given is donated.

    Metrics: loss in nats a token, gradient_norm before the clip, learning_rate. The program takes the numbers as
    arguments, so that runs of one model that differ in learning rate, schedule or seed share it. memory: what it was
    found to need, for whoever asks again; remat: the policy it was made with.
    """

    def __init__(self, program: Any, memory: dict[Any, Any], numbers: dict[str, float], remat: str):
        self.program, self.memory, self.numbers, self.remat = program, memory, numbers, remat

    def __call__(
        self, state: State, tokens_AxBxT1: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        return self.program(state, tokens_AxBxT1, self.numbers)

    def trace(self, state: Any, tokens_AxBxT1: Any) -> Any:
        """The program as JAX traced it, from which it is lowered; nothing of it is computed."""
        return self.program.trace(state, tokens_AxBxT1, self.numbers)


def make_train_step(
    config: Config,
    model: Architecture,
    multipliers: Multipliers | None = None,
    layout: Layout | None = None,
    grown_at: int | None = None,
) -> TrainStep:
    """The step of a run, its remat policy settled. layout: None for the first device. grown_at: see `compute_learning_rate`."""
    layout = layout or make_single_device_layout()
    kernel = select_kernel(config, model, layout).name
    network = GPTNeoX(model, config.precision, config.dropout, config.remat, kernel, layout=layout)
    # What the numbers say, and what `multipliers` settles, is no part of the program.
    settings = replace(config.optimizer, learning_rate=1.0, multipliers="auto")
    make = _program if multipliers is None else _program.__wrapped__
    schedule = encode_schedule(config.schedule, config.optimizer.learning_rate, grown_at)
    program, memory = make(network, settings, config.schedule.kind, multipliers)
    return TrainStep(program, memory, schedule | {"seed": config.seed}, config.remat)


@lru_cache(maxsize=PROGRAMS)
def _program(
    network: GPTNeoX, settings: Optimizer, kind: str, multipliers: Multipliers | None
) -> tuple[Any, dict[Any, Any]]:
    """The jitted step: (state, tokens [A, B, T+1], numbers) -> (state, metrics); and a place for what it needs."""
    model, layout, dropout = network.model, network.layout, network.dropout
    optimizer = adamw(settings, model, multipliers)
    drops = any((dropout.hidden, dropout.attention, dropout.embedding))
    places = jax.tree.map(
        lambda leaf: leaf.sharding, _abstract(network.precision, settings, model, layout)
    )

    def train_step(
        state: State, tokens_AxBxT1: jax.Array, run: dict[str, jax.Array]
    ) -> tuple[State, dict]:
        key = jax.random.fold_in(jax.random.key(run["seed"]), state.step) if drops else None
        loss, gradient = accumulate_gradients(network, state.params, tokens_AxBxT1, key)
        # With ZeRO-1 a device updates the part of the parameters whose moments it has.
        params = _as_moments(network, state.params)
        direction, optimizer_state = optimizer.update(gradient, state.optimizer, params)
        rate = evaluate_schedule(kind, run, state.schedule_step)
        updates = jax.tree.map(
            lambda update, param: (-rate * update).astype(param.dtype), direction, params
        )
        norm = global_norm(gradient, multipliers.clip if multipliers else None)
        metrics = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
        params = _as_moments(network, optax.apply_updates(params, updates))
        return State(params, optimizer_state, state.step + 1, state.schedule_step + 1), metrics

    program = jax.jit(
        train_step,
        in_shardings=(places, layout.batch_sharding(1), layout.replicated),
        out_shardings=(places, layout.replicated),
        donate_argnums=0,
    )
    return program, {}


def make_eval_step(
    config: Config, model: Architecture, layout: Layout | None = None
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The jitted validation: (params, tokens [B, T+1], mask [B]) -> summed loss, nats, of unmasked sequences."""
    layout = layout or make_single_device_layout()
    return _evaluation(
        GPTNeoX(
            model, config.precision, kernel=select_kernel(config, model, layout).name, layout=layout
        )
    )


@lru_cache(maxsize=PROGRAMS)
def _evaluation(network: GPTNeoX) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    def eval_step(params: Any, tokens_BxT1: jax.Array, mask_B: jax.Array) -> jax.Array:
        return sum_loss(network, params, tokens_BxT1, None, mask_B)

    layout = network.layout
    places = (network.model.table.tree(layout.parameter_sharding), layout.batch_sharding(), layout.batch_sharding())
    return jax.jit(eval_step, in_shardings=places, out_shardings=layout.replicated)


def forget_programs() -> None:
    """Let go of the programs kept in this process."""
    _program.cache_clear()
    _evaluation.cache_clear()


def init_state(config: Config, model: Architecture, params: Any) -> State:
    """A state at step 0 with fresh moments around `params`."""
    # Two zeros and not one twice: the state's buffers are donated, each once.
    zeros = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    return State(params, adamw(config.optimizer, model).init(params), *zeros)


def abstract_state(config: Config, model: Architecture, layout: Layout) -> State:
    """The shapes, dtypes and places of a state, nothing of it computed."""
    return _abstract(config.precision, config.optimizer, model, layout)


def _abstract(precision: Precision, settings: Optimizer, model: Architecture, layout: Layout) -> State:
    dtype, sizes = jnp.dtype(precision.params), model.sizes

    def lie(place: Callable[[Row], NamedSharding]) -> dict[str, Any]:
        return model.table.tree(
            lambda row: jax.ShapeDtypeStruct(row.stacked_shape(sizes), dtype, sharding=place(row))
        )

    params, moments = lie(layout.parameter_sharding), lie(layout.moment_sharding)
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated)
    optimizer = jax.eval_shape(adamw(settings, model).init, params)
    optimizer = optax.tree.set(optimizer, mu=moments, nu=moments, count=counter)
    return State(params, optimizer, counter, counter)
