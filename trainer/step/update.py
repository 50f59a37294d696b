"""One step of training and one of evaluation: pure, jitted functions of (state, tokens).

A train step is given its state for good: the state's memory is reused for the result (it is
donated). Where arrays lie on a mesh of devices is part of both programs.

Shapes in names: A parts of a batch, one after another; B sequences of a part; T time, T1 is T + 1.
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
from trainer.config.sections import Config, NewRate, Optimizer, Precision
from trainer.devices.sharding import Layout, make_single_device_layout
from trainer.model.decoder import Decoder
from trainer.model.kernels import select_kernel
from trainer.model.part_scan import PartScan
from trainer.step.balance import compute_load
from trainer.step.loss import read_rows
from trainer.step.objective import Sums, start_sums, sum_loss, sum_objective
from trainer.step.optimizer import Multipliers, adamw, global_norm, select_multipliers_of
from trainer.step.part import ALL, Part
from trainer.step.schedule import (
    encode_new_rate,
    encode_schedule,
    evaluate_new_rate,
    evaluate_schedule,
)

# How many programs a process keeps: for a study's sources and target, and for growth within a run.
PROGRAMS = 16

EvalStep = Callable[[Any, jax.Array, jax.Array], jax.Array]


class State(NamedTuple):
    """All that training changes.

    step counts the updates of this run, schedule_step those since the last branch point. Adam's own
    count, in `optimizer`, is kept through growth.
    """

    params: Any
    optimizer: Any
    step: jax.Array
    schedule_step: jax.Array


def check_precision(config: Config) -> None:
    """Raise UsageError for a float64 that JAX would silently make float32."""
    asked = (config.precision.params, config.precision.compute)
    if "float64" in asked and not jax.config.jax_enable_x64:
        raise UsageError(
            "precision float64 needs JAX's 64-bit mode: set JAX_ENABLE_X64=1 in the environment"
        )


def accumulate_gradients(
    network: Decoder,
    params: Any,
    tokens_AxBxT1: jax.Array,
    key: jax.Array | None,
    part: Part = ALL,
    rows: int | None = None,
) -> tuple[Sums, Any]:
    """The mean losses, and the gradient of what a step lowers, over all A x B sequences.

    Both are summed over the A parts and divided once, so that parts give what the whole batch
    would; but a loss that balances experts is that of each part, as in transformers. part: the
    parameters of which there is a gradient. rows: as `sum_token_losses` takes it.
    """
    table = network.model.table
    trained = part.select(table, params)

    differentiate = jax.value_and_grad(
        partial(_sum_part, network, part, rows, params), has_aux=True
    )
    parts, batch, length = tokens_AxBxT1.shape

    def add(total: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        index, tokens_BxT1 = inputs
        # Each part draws masks of its own, as parts of one batch would.
        part_key = None if key is None else jax.random.fold_in(key, index)
        (_, sums), gradient = differentiate(trained, tokens_BxT1, part_key)
        sums, gradient = jax.tree.map(jnp.add, total, (sums, gradient))
        return (sums, _shard_as_moments(network, gradient, part)), None

    zero_sums = start_sums(network)
    zero_gradient = _shard_as_moments(network, jax.tree.map(jnp.zeros_like, trained), part)
    inputs = (jnp.arange(parts), tokens_AxBxT1)
    total, _ = jax.lax.scan(add, (zero_sums, zero_gradient), inputs)
    # All sequences are full, so that every token counts the same; validation has a mask instead.
    tokens = parts * batch * (length - 1)
    return jax.tree.map(lambda leaf: leaf / tokens, total)


def _sum_part(
    network: Decoder,
    part: Part,
    rows: int | None,
    params: Any,
    trained: Any,
    tokens_BxT1: jax.Array,
    key: jax.Array | None,
) -> tuple[jax.Array, Sums]:
    """What a step lowers, and its sums, as a function of the parameters that are trained."""
    if part.layers is None:
        return sum_objective(network, trained, tokens_BxT1, key, rows=rows)
    # Only layers are trained, and no gradient is computed of what is frozen.
    name = network.computation.layers
    time = tokens_BxT1.shape[1] - 1
    scan = PartScan(network, part.layers, trained[name], params[name], key, time)
    return sum_objective(network, params, tokens_BxT1, key, scan, rows)


def _shard_as_moments(network: Decoder, tree: Any, part: Part) -> Any:
    """Lay out a tree of the trained parameters' structure as the moments are."""
    layout = _layout_of(network)
    shardings = part.tree(network.model.table, layout.moment_sharding)
    return jax.tree.map(layout.constrain, tree, shardings)


def _layout_of(network: Decoder) -> Layout:
    """The layout of a step's network. Only a network that is in no step may have none."""
    if network.layout is None:
        raise ValueError("the network of a step needs a layout: give Decoder its `layout`")
    return network.layout


class TrainStep:
    """(state, tokens [A, B, T+1]) -> (state, metrics), with one run's numbers.

    The state given is donated. Metrics: loss, nats per token; gradient_norm, before the clip;
    learning_rate; of a mixture balance_loss, see `trainer.step.balance`, and load [layer, X], the
    share of a layer's work that each expert had. numbers: arguments of the program, so that runs of
    one model that differ in learning rate, schedule or seed share the program. memory: what the
    program was found to need, for whoever asks again. remat: the policy that the program was made
    with.
    """

    def __init__(self, program: Any, memory: dict[Any, Any], numbers: dict[str, float], remat: str):
        self.program = program
        self.memory = memory
        self.numbers = numbers
        self.remat = remat

    def __call__(
        self, state: State, tokens_AxBxT1: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        return self.program(state, tokens_AxBxT1, self.numbers)

    def trace(self, state: Any, tokens_AxBxT1: Any) -> Any:
        """The program as traced by JAX, ready to be lowered. Nothing is computed."""
        return self.program.trace(state, tokens_AxBxT1, self.numbers)


def make_train_step(
    config: Config,
    model: Architecture,
    multipliers: Multipliers | None = None,
    layout: Layout | None = None,
    grown_at: int | None = None,
    part: Part = ALL,
) -> TrainStep:
    """Make the step of a run whose remat policy is settled.

    layout: None for the first device. grown_at: see `compute_learning_rate`. part: the parameters
    that are trained.
    """
    layout = layout or make_single_device_layout()
    kernel = select_kernel(config, model, layout).name
    network = Decoder(model, config.precision, config.dropout, config.remat, kernel, layout=layout)
    # The learning rate is one of the numbers, and `multipliers` is an argument of its own: neither
    # is part of what identifies a program.
    settings = replace(config.optimizer, learning_rate=1.0, multipliers="auto", new=NewRate())
    # Trees of multipliers cannot be hashed, so their programs are not kept.
    make = _keep_program if multipliers is None else _make_program
    multipliers = select_multipliers_of(multipliers, model, part)
    rows = read_rows(config.loss_chunk)
    program, memory = make(network, settings, config.schedule.kind, multipliers, part, rows)
    numbers = encode_schedule(config.schedule, config.optimizer.learning_rate, grown_at)
    if multipliers is not None and multipliers.new is not None:
        numbers |= encode_new_rate(config.optimizer.new, grown_at)
    return TrainStep(program, memory, numbers | {"seed": config.seed}, config.remat)


def _make_program(
    network: Decoder,
    settings: Optimizer,
    kind: str,
    multipliers: Multipliers | None,
    part: Part,
    rows: int | None,
) -> tuple[Any, dict[Any, Any]]:
    """The jitted step: (state, tokens [A, B, T+1], numbers) -> (state, metrics).

    With it comes an empty dict, its `memory`.
    """
    layout = _layout_of(network)
    state = _describe_state(network.precision, settings, network.model, layout, part)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    program = jax.jit(
        _define_train_step(network, settings, kind, multipliers, part, rows),
        in_shardings=(shardings, layout.batch_sharding(1), layout.replicated),
        out_shardings=(shardings, layout.replicated),
        # Without donation old and new state would be in memory at once: 12 bytes more a parameter
        # in float32.
        donate_argnums=0,
    )
    return program, {}


_keep_program = lru_cache(maxsize=PROGRAMS)(_make_program)


def _define_train_step(
    network: Decoder,
    settings: Optimizer,
    kind: str,
    multipliers: Multipliers | None,
    part: Part,
    rows: int | None,
) -> Callable[[State, jax.Array, dict[str, jax.Array]], tuple[State, dict[str, jax.Array]]]:
    optimizer = adamw(settings, network.model, multipliers, part)
    table = network.model.table
    dropout = network.dropout
    drops = any((dropout.hidden, dropout.attention, dropout.embedding))
    clip_weights = multipliers.clip if multipliers else None
    marked = multipliers is not None and multipliers.new is not None

    def train_step(
        state: State, tokens_AxBxT1: jax.Array, numbers: dict[str, jax.Array]
    ) -> tuple[State, dict[str, jax.Array]]:
        key = None
        if drops:
            # A function of seed and step: a resumed run draws the masks of one that never stopped.
            key = jax.random.fold_in(jax.random.key(numbers["seed"]), state.step)
        losses, gradient = accumulate_gradients(
            network, state.params, tokens_AxBxT1, key, part, rows
        )
        # With ZeRO-1 a device updates the part of the parameters whose moments it has.
        params = _shard_as_moments(network, part.select(table, state.params), part)
        factor = {}
        if marked:
            factor = {"new_factor": evaluate_new_rate(numbers, state.schedule_step)}
        direction, optimizer_state = optimizer.update(gradient, state.optimizer, params, **factor)
        rate = evaluate_schedule(kind, numbers, state.schedule_step)
        updates = jax.tree.map(partial(_scale_update, rate), direction, params)
        norm = global_norm(gradient, clip_weights)
        metrics = losses | {"gradient_norm": norm, "learning_rate": rate}
        if "load" in metrics:
            metrics["load"] = compute_load(metrics["load"])
        params = _shard_as_moments(network, optax.apply_updates(params, updates), part)
        params = part.merge(table, state.params, params)
        return State(params, optimizer_state, state.step + 1, state.schedule_step + 1), metrics

    return train_step


def _scale_update(rate: jax.Array, direction: jax.Array, param: jax.Array) -> jax.Array:
    """What is added to a parameter, in its dtype; multiplied in the rate's, at least float32."""
    return (-rate * direction.astype(rate.dtype)).astype(param.dtype)


def make_eval_step(config: Config, model: Architecture, layout: Layout | None = None) -> EvalStep:
    """Make the jitted validation: (params, tokens [B, T+1], mask [B]) -> loss.

    The loss, nats, is summed over the sequences whose mask is 1.
    """
    layout = layout or make_single_device_layout()
    kernel = select_kernel(config, model, layout).name
    network = Decoder(model, config.precision, kernel=kernel, layout=layout)
    return _keep_eval_step(network, read_rows(config.loss_chunk))


@lru_cache(maxsize=PROGRAMS)
def _keep_eval_step(network: Decoder, rows: int | None) -> EvalStep:
    def eval_step(params: Any, tokens_BxT1: jax.Array, mask_B: jax.Array) -> jax.Array:
        return sum_loss(network, params, tokens_BxT1, None, mask_B, rows=rows)

    layout = _layout_of(network)
    params = network.model.table.tree(layout.parameter_sharding)
    shardings = (params, layout.batch_sharding(), layout.batch_sharding())
    return jax.jit(eval_step, in_shardings=shardings, out_shardings=layout.replicated)


def forget_programs() -> None:
    """Release the programs that this process keeps."""
    _keep_program.cache_clear()
    _keep_eval_step.cache_clear()


def init_state(config: Config, model: Architecture, params: Any, part: Part = ALL) -> State:
    """A state at step 0: these parameters, with moments of zero for the part that is trained."""
    optimizer = adamw(config.optimizer, model, part=part).init(part.select(model.table, params))
    # Two arrays and not one twice, because a buffer can be donated only once.
    step = jnp.zeros((), jnp.int32)
    schedule_step = jnp.zeros((), jnp.int32)
    return State(params, optimizer, step, schedule_step)


def abstract_state(config: Config, model: Architecture, layout: Layout, part: Part = ALL) -> State:
    """The shapes, dtypes and shardings of a state; nothing is computed."""
    return _describe_state(config.precision, config.optimizer, model, layout, part)


def _describe_state(
    precision: Precision, settings: Optimizer, model: Architecture, layout: Layout, part: Part
) -> State:
    dtype = jnp.dtype(precision.params)

    def describe(shard: Callable[[Row], NamedSharding], part: Part) -> dict[str, Any]:
        def make(row: Row) -> jax.ShapeDtypeStruct:
            shape = part.shape(row, row.stacked_shape(model.sizes))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=shard(row))

        return part.tree(model.table, make)

    params = describe(layout.parameter_sharding, ALL)
    moments = describe(layout.moment_sharding, part)
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated)
    optimizer = jax.eval_shape(adamw(settings, model, part=part).init, moments)
    optimizer = optax.tree.set(optimizer, mu=moments, nu=moments, count=counter)
    return State(params, optimizer, counter, counter)
