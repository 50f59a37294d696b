"""What a run is: frozen dataclasses, one a section of a configuration.

The defaults are the recipe of a public 760M-parameter GPT grown from 580M: peak learning rate
2.0e-4, 2000 warm-up steps, cosine to 10 %, AdamW (0.9, 0.95) with decay 0.1, dropout 0.1, 0.5M
tokens a batch, bfloat16. A rule for one value stands on its field; `resolve` checks those between
values.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from growkit.errors import UsageError
from growkit.evaluation.catalogue import parse_task_names
from growkit.quantity import parse_count
from trainer.config.build import build_dataclass
from trainer.config.model import Model as Model
from trainer.config.model import build_architecture as build_architecture
from trainer.config.model import build_section as build_section
from trainer.config.rules import (
    check_rules,
    choice,
    choice_or_count,
    count,
    number,
    path,
    text_or_number,
)

DTYPES = ("float32", "bfloat16", "float64")
LARGEST_SEED = 2**31 - 1
MOST_STEPS = 10**9  # what is above was meant as tokens


@dataclass(frozen=True)
class Dropout:
    """Probabilities of dropping."""

    # The outputs of attention and feed-forward in each block.
    hidden: float = number(0.1, at_least=0, below=1)
    attention: float = number(0.1, at_least=0, below=1)  # attention weights
    embedding: float = number(0.0, at_least=0, below=1)  # embedded tokens


@dataclass(frozen=True)
class Precision:
    """Number formats. LayerNorm statistics, softmax, logits and loss are at least float32."""

    params: str = choice("float32", of=DTYPES)  # parameters and the optimizer's moments
    compute: str = choice("bfloat16", of=DTYPES)  # matrix products and activations


@dataclass(frozen=True)
class Data:
    """Token files to train and validate on, by path or pattern."""

    # Weights by path: the share of the sequences drawn from each, in any unit.
    train: dict[str, float] = field(default_factory=dict)
    # weights: as `train` says, equal for a list. proportional: by size, times the weights.
    mix: str = choice("weights", of=("weights", "proportional"))
    # Files to validate on; without them, the last part of each file to train on is held out.
    validation: dict[str, float] | None = None
    held_out: float = number(0.005, at_least=0, below=1)  # fraction of the windows held out
    # Fractions by path: only the first part of that data set is drawn from.
    fraction: dict[str, float] | None = None


@dataclass(frozen=True)
class Batch:
    """The sequences of one step."""

    sequences: int = number(512, at_least=1)  # batch size
    accumulation: int = number(1, at_least=1)  # equal parts computed one after another
    # Batch size in tokens instead, to the nearest whole sequence; 0: `sequences` says it.
    tokens: int = count(0, at_least=0)


@dataclass(frozen=True)
class NewRate:
    """The learning rate of what growth made new, beside the schedule's, which all else has.

    Both multiply Adam's direction, as multipliers do, and not the decay.
    """

    rewarmup: int = count(0, at_least=0)  # steps of linear warm-up from 0, from the growth on
    rate: float = number(1.0, above=0)  # factor


@dataclass(frozen=True)
class Optimizer:
    """AdamW with decoupled decay of weight matrices, and gradient clipping."""

    learning_rate: float = number(2.0e-4, above=0)  # peak
    beta1: float = number(0.9, at_least=0, below=1)  # decay of the first moment
    beta2: float = number(0.95, at_least=0, below=1)  # decay of the second moment
    eps: float = number(1e-8, at_least=0)  # added to the root of the second moment
    weight_decay: float = number(0.1, at_least=0)  # of weight matrices
    clip: float = number(1.0, at_least=0)  # largest global norm of a gradient; 0: no clipping
    # Whether to apply the learning rates, eps and clip weights that exact growth asks for.
    # auto: on after growth in width by copies only, and after growth with rates=mup.
    multipliers: str = choice("auto", of=("auto", "on", "off"))
    new: NewRate = field(default_factory=NewRate)


@dataclass(frozen=True)
class Plateau:
    """When the validation loss is flat, and what then happens to the learning rate.

    The names are those of optax.contrib.reduce_on_plateau.
    """

    # Validations in a row that must fail to be below (1 - rtol) x the best; 0: never flat.
    patience: int = number(0, at_least=0)
    factor: float = number(0.1, above=0, at_most=1)  # multiplies the learning rate from then on
    rtol: float = number(1e-4, at_least=0, below=1)  # relative improvement that counts


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the steps since the last branch point: a warm-up, then `kind`."""

    # cosine, linear: down to `floor` at the last step. constant: stays at the peak.
    # wsd (warm-up, stable, decay): stays at the peak until the last `decay`, then falls linearly.
    kind: str = choice("cosine", of=("cosine", "linear", "wsd", "constant"))
    steps: int = count(82000, at_least=1)  # length of the run
    # Length of the run in tokens instead, in whole steps; 0: `steps` says it.
    tokens: int = count(0, at_least=0)
    warmup: int = count(2000, at_least=0)  # steps of linear warm-up from 0
    # The last learning rate, as a fraction of the peak.
    floor: float = number(0.1, at_least=0, at_most=1)
    decay: float = number(0.1, at_least=0, at_most=1)  # fraction of the steps that wsd decays in
    continued: bool = False  # with --from: go on where the source's schedule stood
    # Steps of an additional linear warm-up after a growth through which the schedule goes on:
    # with `continued`, or by grow.at.
    rewarmup: int = count(0, at_least=0)
    plateau: Plateau = field(default_factory=Plateau)


@dataclass(frozen=True)
class Grow:
    """Growth as the growing verbs make it on disk; empty text means none.

    The options are those of `growkit depth` and `growkit width`, which explain them.
    """

    # When to grow. Empty: the --from model at the start. A number: at that step of this run; below
    # 1, such as 0.8: after that part of its steps.
    # plateau: at the first plateau that schedule.plateau finds; the learning rate then stays.
    at: str = text_or_number()
    map: str = text_or_number()  # depth --map
    depth_method: str = "replicate"  # depth --method
    scale: str = ""  # depth --scale
    embed: str = text_or_number()  # width --embed
    heads: str = text_or_number()  # width --heads
    mlp: str = text_or_number()  # width --mlp
    head_dim: str = text_or_number()  # width --head-dim
    vocab: str = text_or_number()  # --vocab of both
    width_method: str = ""  # width --method
    spread: float = 0.0  # width --spread
    moments: str = "map"  # --moments of both: map, copy, reset, nu-only or first
    noise: float | str = 0.0  # --noise of both: a number, or as 0.5rms
    seed: int = 0  # --seed of both
    rates: str = choice("keep", of=("keep", "mup"))  # --rates of both


@dataclass(frozen=True)
class Checkpoint:
    """When to save a checkpoint, and which ones to keep."""

    every: int = count(1000, at_least=1)  # steps between two saves
    minutes: float = number(30.0, at_least=0)  # minutes between two saves; 0: by steps only
    keep_last: int = number(3, at_least=1)  # how many of the latest to keep
    keep_every: int = count(0, at_least=0)  # keep those of every so many steps; 0: none
    keep_best: bool = True  # keep the one with the lowest validation loss
    ocdbt: bool = False  # Orbax's OCDBT format, for object stores


@dataclass(frozen=True)
class Eval:
    """Validation, and the tasks of `growkit evaluate`, during training."""

    every: int = count(1000, at_least=1)  # steps between two validations
    windows: int = count(256, at_least=1)  # sequences to validate on, the same each time
    tasks: str = ""  # names of tasks, separated by commas; empty: none
    tasks_every: int = count(5000, at_least=1)  # steps between two evaluations on tasks
    data: str = path()  # directory of the tasks' items; empty: download them from the Hub
    limit: int = count(500, at_least=0)  # maximum items per task; 0: all


@dataclass(frozen=True)
class Log:
    """What is logged of a run, and where to."""

    every: int = count(10, at_least=1)  # steps between two rows of metrics
    tensorboard: bool = False  # also write TensorBoard files into the run's directory
    wandb: str = ""  # also log to this project of Weights & Biases
    profile: str = ""  # FIRST:LAST, the steps between which JAX's profiler traces; empty: no trace
    # Seconds without progress after which a process that the others wait for is named; 0: never.
    stalled: float = number(300.0, at_least=0)


@dataclass(frozen=True)
class Mesh:
    """How many devices share the work, in four directions."""

    data: int = number(0, at_least=0)  # parts of the batch; 0: all devices that are left
    fsdp: int = number(1, at_least=1)  # parts of the batch and of each parameter
    expert: int = number(1, at_least=1)  # parts of the batch and of the experts of a mixture
    tensor: int = number(1, at_least=1)  # parts of the heads, the hidden units and the vocabulary
    zero1: bool = True  # split the optimizer state over data too (ZeRO-1)


@dataclass(frozen=True)
class Config:
    """A run."""

    model: Model = field(default_factory=Model)
    dropout: Dropout = field(default_factory=Dropout)
    precision: Precision = field(default_factory=Precision)
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    grow: Grow = field(default_factory=Grow)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    log: Log = field(default_factory=Log)
    # What the backward pass recomputes: nothing (none), all but products with weights (dots), all
    # but attention's result and the mlp's first product (half), or whole blocks (full). auto: the
    # first of these whose step fits the devices' memory.
    remat: str = choice("none", of=("auto", "none", "dots", "half", "full"))
    # The attention kernel. auto: the devices' own where its rules allow; xla: no kernel.
    attention: str = choice("auto", of=("auto", "xla", "splash", "cudnn"))
    # The most tokens whose logits a device holds at once. auto: by the platform; none: no limit.
    loss_chunk: str = choice_or_count("auto", of=("auto", "none"))
    # What is trained. new: only the layers that growth added since all was trained last.
    train: str = choice("all", of=("all", "new"))
    seed: int = number(0, at_least=0, at_most=LARGEST_SEED)  # of weights, data order and dropout

    def to_dict(self) -> dict[str, Any]:
        """Every value as nested dicts."""
        return dataclasses.asdict(self)


def resolve(values: dict[str, Any], takes_model: bool = False) -> Config:
    """The configuration that nested values describe.

    takes_model: the model, and with it the context, is that of --from, so that what is stated in
    tokens is settled when it is known. Raises UsageError for unknown keys, wrong types, and values
    that break a rule.
    """
    config: Config = build_dataclass(Config, values)
    check_rules(config)
    if config.eval.tasks:
        parse_task_names(config.eval.tasks)
    return config if takes_model else settle_sizes(config)


def settle_sizes(config: Config) -> Config:
    """The configuration with a batch and a length in tokens as sequences and steps.

    grow.at is a number then. Raises UsageError for sizes that contradict each other.
    """
    config = dataclasses.replace(config, batch=_settle_batch(config.batch, config.model.context))
    schedule = config.schedule
    if schedule.tokens:
        step = config.batch.sequences * config.model.context
        if schedule.tokens < step:
            raise UsageError(
                f"schedule.tokens ({schedule.tokens:,}) is less than one step, which is "
                f"{config.batch.sequences} sequences of {config.model.context} tokens; give at "
                f"least {step:,}"
            )
        schedule = dataclasses.replace(schedule, steps=schedule.tokens // step)
    _check_schedule(schedule)
    at = _read_growth_time(config.grow.at, schedule)
    grow = dataclasses.replace(config.grow, at=at)
    return dataclasses.replace(config, schedule=schedule, grow=grow)


def resolve_model(values: Any) -> dict[str, Any]:
    """The keys that a model section states, converted to the types of their fields.

    Raises UsageError.
    """
    stated = values or {}
    model = build_dataclass(Model, stated, "model.")
    return {key: getattr(model, key) for key in stated}


def _settle_batch(batch: Batch, context: int) -> Batch:
    """The batch with as many sequences as its tokens make. Raises UsageError."""
    if 0 < batch.tokens < context:
        raise UsageError(
            f"batch.tokens ({batch.tokens:,}) is less than one sequence of {context:,} tokens; "
            f"give at least {context:,}"
        )
    if batch.tokens:
        batch = dataclasses.replace(batch, sequences=round(batch.tokens / context))
    if batch.sequences % batch.accumulation == 0:
        return batch
    if batch.tokens:
        part = batch.accumulation * context
        nearest = max(1, round(batch.tokens / part)) * part
        raise UsageError(
            f"batch.tokens ({batch.tokens:,}) makes {batch.sequences:,} sequences of {context:,} "
            f"tokens, which must be a multiple of batch.accumulation ({batch.accumulation}); the "
            f"nearest that works is batch.tokens={nearest}"
        )
    raise UsageError(
        f"batch.sequences ({batch.sequences}) must be a multiple of "
        f"batch.accumulation ({batch.accumulation})"
    )


def _check_schedule(schedule: Schedule) -> None:
    steps, warmup = schedule.steps, schedule.warmup
    if steps > MOST_STEPS:
        raise UsageError(
            f"schedule.steps must be at most {MOST_STEPS:,}, got {steps:,}; schedule.tokens gives "
            f"the length of a run in tokens"
        )
    if warmup > steps:
        raise UsageError(f"schedule.warmup must be at most schedule.steps ({steps}), got {warmup}")
    decay_steps = round(schedule.decay * steps)
    if schedule.kind == "wsd" and warmup + decay_steps > steps:
        raise UsageError(
            f"schedule.warmup ({warmup} steps) and schedule.decay ({schedule.decay:g} of the "
            f"steps) do not fit into schedule.steps ({steps})"
        )


def _read_growth_time(at: str, schedule: Schedule) -> str:
    """grow.at, with a step such as 20k as digits. Raises UsageError."""
    if not at:
        return at
    if at == "plateau":
        if not schedule.plateau.patience:
            raise UsageError(
                "grow.at=plateau needs schedule.plateau.patience, the validations that make a "
                "plateau"
            )
        return at
    step = _read_step(at, schedule.steps)
    if not 1 <= step < schedule.steps:
        raise UsageError(
            f"grow.at must be a step from 1 to {schedule.steps - 1}, a part of the steps such as "
            f"0.8, or plateau, got {at!r}"
        )
    return str(step)


def _read_step(at: str, steps: int) -> int:
    """A step by its number, or by the part of all steps before it; 0 for what is neither."""
    try:
        part = float(at)
    except ValueError:
        part = math.nan
    if 0 < part < 1:
        return round(part * steps)
    try:
        return parse_count(at, "grow.at")
    except UsageError:
        return 0
