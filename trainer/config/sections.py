"""What a run is: frozen dataclasses, filled from the nested values that `trainer.config.values` reads.

The defaults are the recipe of a public 760M-parameter GPT grown from 580M: peak learning rate 2.0e-4, 2000
warm-up steps, cosine to 10 %, AdamW (0.9, 0.95) with decay 0.1, dropout 0.1, 0.5M tokens a batch, bfloat16.
Knows names, types and the rules for values; leaves what they do to others.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from growkit.errors import GrowkitError, UsageError, did_you_mean
from growkit.evaluation.catalogue import parse_task_names
from growkit.models.architecture import Architecture
from growkit.models.gpt_neox import GPT_NEOX


@dataclass(frozen=True)
class Model:
    """Sizes and options of a new model; with --from they are the source's, and those given here must agree.

    context is in tokens and may differ from the source's, rotary positions having no parameters.
    """

    layer: int = 24
    embed: int = 1536
    head: int = 12
    mlp: int = 6144
    vocab: int = 50304
    context: int = 1024
    rotary_pct: float = 0.25
    rotary_base: float = 10000.0
    parallel_residual: bool = True
    tied: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02


@dataclass(frozen=True)
class Dropout:
    """The probability of dropping: each block's two outputs, attention weights, the embedded tokens."""

    hidden: float = 0.1
    attention: float = 0.1
    embedding: float = 0.0


@dataclass(frozen=True)
class Precision:
    """Numbers: parameters and moments; compute. Norm statistics, softmax, logits and loss are at least float32."""

    params: str = "float32"
    compute: str = "bfloat16"


@dataclass(frozen=True)
class Data:
    """Token files by path or pattern, each with a weight, its share of the sequences in any unit.

    Without `validation` the last `held_out` of each is held out. `fraction`, by path: only that much of it is drawn.
    """

    train: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] | None = None
    held_out: float = 0.005
    fraction: dict[str, float] | None = None


@dataclass(frozen=True)
class Batch:
    """Sequences a step, and into how many equal parts they are split to be computed one after another."""

    sequences: int = 512
    accumulation: int = 1


@dataclass(frozen=True)
class Optimizer:
    """AdamW with decoupled decay of weight matrices and a global-norm clip (0 for none).

    multipliers: whether the learning rates, eps and clip weights that exact growth asks for are applied: on, off, or
    auto, which is on after growth in width by copies alone.
    """

    learning_rate: float = 2.0e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    multipliers: str = "auto"


@dataclass(frozen=True)
class Plateau:
    """When validation is flat: `patience` validations in a row (0: never) without one below (1 - rtol) x the best.

    factor: what the learning rate is multiplied by from there on. Names as in optax.contrib.reduce_on_plateau.
    """

    patience: int = 0
    factor: float = 0.1
    rtol: float = 1e-4


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to the peak, then down to `floor` times the peak at `steps`, counted from the last branch point.

    kind: cosine or linear, all the way down; wsd (warm-up, stable, decay), which stays at the peak until the last
    `decay`, a fraction, of the steps, and falls linearly in those; constant, which stays.
    continued: with --from, go on in the source's schedule where it stood instead of beginning again.
    rewarmup: steps of a linear warm-up, on top of the schedule, after a growth through which it goes on: with
    `continued`, or by grow.at.
    """

    kind: str = "cosine"
    steps: int = 82000
    warmup: int = 2000
    floor: float = 0.1
    decay: float = 0.1
    continued: bool = False
    rewarmup: int = 0
    plateau: Plateau = field(default_factory=Plateau)


@dataclass(frozen=True)
class Grow:
    """A growth as the growing verbs would make it on disk; empty text for none.

    at: empty for a growth of the --from model at start; a step of this run; or plateau, the first one that
    schedule.plateau finds, which then grows the model and leaves the learning rate.
    map and depth_method are `growkit depth`'s --map and --method; embed, heads, mlp, head_dim, width_method and spread
    `growkit width`'s; the rest are the options of both.
    """

    at: str = ""
    map: str = ""
    depth_method: str = "replicate"
    embed: str = ""
    heads: str = ""
    mlp: str = ""
    head_dim: str = ""
    width_method: str = ""
    spread: float = 0.0
    moments: str = "map"
    noise: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """When to save (steps; minutes, 0 for never) and what to keep: the last N, every K steps (0: none), the best."""

    every: int = 1000
    minutes: float = 30.0
    keep_last: int = 3
    keep_every: int = 0
    keep_best: bool = True
    ocdbt: bool = False


@dataclass(frozen=True)
class Eval:
    """Validation every `every` steps on `windows` fixed sequences, and tasks of `growkit evaluate` every `tasks_every`.

    tasks: names with commas, empty for none. data: the directory of their items, empty for the Hub. limit: items of
    each at most, 0 for all.
    """

    every: int = 1000
    windows: int = 256
    tasks: str = ""
    tasks_every: int = 5000
    data: str = ""
    limit: int = 500


@dataclass(frozen=True)
class Log:
    """A row of metrics every `every` steps, also to TensorBoard's files in RUN, and to a project of Weights & Biases.

    profile: FIRST:LAST, the steps after which a trace by JAX's profiler begins and ends; empty for none. stalled:
    seconds after which processes that the others wait for are named; 0 for never.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: str = ""
    profile: str = ""
    stalled: float = 300.0


@dataclass(frozen=True)
class Mesh:
    """Devices in three directions: data (0 for all that are left), fsdp (parameters in parts), tensor (heads in parts).

    zero1: whether the optimizer's state is spread over data too, each device keeping and updating a part of it.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    zero1: bool = True


@dataclass(frozen=True)
class Config:
    """A run. attention: auto takes the kernel of the devices where its rules allow, xla none; or splash, or cudnn."""

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
    remat: str = "none"
    attention: str = "auto"
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Every value, resolved."""
        return dataclasses.asdict(self)


def resolve(values: dict[str, Any]) -> Config:
    """The configuration that nested values describe. Raises UsageError for unknown keys and wrong types."""
    config = _build(Config, values, "")
    _check(config)
    return config


def resolve_model(values: Any) -> dict[str, Any]:
    """The keys that a model section states, by the types of their fields. Raises UsageError."""
    stated = values or {}
    model = _build(Model, stated, "model.")
    return {key: getattr(model, key) for key in stated}


def _build(kind: type, values: Any, where: str) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UsageError(f"{where.rstrip('.')} is a section of values, got {values!r}")
    types = typing.get_type_hints(kind)
    for key in values:
        if key not in types:
            near = did_you_mean(str(key), types)
            raise UsageError(
                f"unknown key {where}{key}; the keys here are {', '.join(types)}{near}"
            )
    return kind(
        **{key: _convert(types[key], value, f"{where}{key}") for key, value in values.items()}
    )


def _convert(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{key}.")
    if kind in (dict[str, float], dict[str, float] | None):
        return None if value is None else _weights(value, key)
    if kind is float:
        return _number(value, key)
    if kind is str and type(value) is int and key.startswith("grow."):
        return str(value)
    if type(value) is kind:
        return value
    raise UsageError(f"{key} must be {_wanted(kind)}, got {value!r}")


def _number(value: Any, key: str) -> float:
    """A finite number. YAML reads 2e-4 as text and 1 as a whole number: the field's type decides."""
    if isinstance(value, float | int | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise UsageError(f"{key} must be a number, got {value!r}")


def _wanted(kind: type) -> str:
    return {int: "a whole number", bool: "true or false", str: "text"}[kind]


def _weights(value: Any, key: str) -> dict[str, float]:
    """A path, a list of paths, or {path: weight}."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        value = dict.fromkeys(value, 1.0)
    if not isinstance(value, dict):
        raise UsageError(
            f"{key} must be a path, a list of paths or {{path: weight}}, got {value!r}"
        )
    weights = {
        str(path): _convert(float, weight, f"{key}.{path}") for path, weight in value.items()
    }
    for path, weight in weights.items():
        if weight <= 0:
            raise UsageError(f"{key}: a weight must be above 0, {path} has {weight}")
    return weights


AT_LEAST_ONE = (
    "model.context",
    "batch.sequences",
    "batch.accumulation",
    "mesh.fsdp",
    "mesh.tensor",
    "schedule.steps",
    "checkpoint.every",
    "checkpoint.keep_last",
    "eval.every",
    "eval.windows",
    "eval.tasks_every",
    "log.every",
)
ABOVE_ZERO = (
    "model.layer_norm_eps",
    "model.initializer_range",
    "model.rotary_base",
    "optimizer.learning_rate",
)
AT_LEAST_ZERO = (
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.clip",
    "schedule.warmup",
    "schedule.rewarmup",
    "schedule.plateau.patience",
    "mesh.data",
    "checkpoint.minutes",
    "checkpoint.keep_every",
    "eval.limit",
    "log.stalled",
)
FRACTIONS = (
    "dropout.hidden",
    "dropout.attention",
    "dropout.embedding",
    "data.held_out",
    "schedule.plateau.rtol",
    "optimizer.beta1",
    "optimizer.beta2",
)
LARGEST_SEED = 2**31 - 1
# (keys, what must hold, in words)
RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (AT_LEAST_ONE, lambda value: value >= 1, "be at least 1"),
    (AT_LEAST_ZERO, lambda value: value >= 0, "be at least 0"),
    (ABOVE_ZERO, lambda value: value > 0, "be above 0"),
    (FRACTIONS, lambda value: 0 <= value < 1, "lie in [0, 1)"),
    (("schedule.floor", "schedule.decay"), lambda value: 0 <= value <= 1, "lie in [0, 1]"),
    (("schedule.plateau.factor",), lambda value: 0 < value <= 1, "lie in (0, 1]"),
    (("seed",), lambda value: 0 <= value <= LARGEST_SEED, f"lie between 0 and {LARGEST_SEED}"),
)
CHOICES = {
    "precision.params": ("float32", "bfloat16", "float64"),
    "precision.compute": ("float32", "bfloat16", "float64"),
    "remat": ("auto", "none", "dots", "full"),
    "attention": ("auto", "xla", "splash", "cudnn"),
    "optimizer.multipliers": ("auto", "on", "off"),
    "schedule.kind": ("cosine", "linear", "wsd", "constant"),
}


def _check(config: Config) -> None:
    """The rules for values and between them. Raises UsageError."""
    for keys, holds, words in RANGES:
        for key in keys:
            if not holds(_value(config, key)):
                raise UsageError(f"{key} must {words}, got {_value(config, key)}")
    for key, choices in CHOICES.items():
        if _value(config, key) not in choices:
            near = did_you_mean(_value(config, key), choices)
            raise UsageError(
                f"{key} must be one of {', '.join(choices)}, got {_value(config, key)!r}{near}"
            )
    if config.eval.tasks:
        parse_task_names(config.eval.tasks)
    batch, schedule = config.batch, config.schedule
    if batch.sequences % batch.accumulation:
        raise UsageError(
            f"batch.sequences ({batch.sequences}) must be a multiple of batch.accumulation ({batch.accumulation})"
        )
    if schedule.warmup > schedule.steps:
        raise UsageError(
            f"schedule.warmup must be at most schedule.steps ({schedule.steps}), got {schedule.warmup}"
        )
    if (
        schedule.kind == "wsd"
        and schedule.warmup + round(schedule.decay * schedule.steps) > schedule.steps
    ):
        raise UsageError(
            f"schedule.warmup ({schedule.warmup} steps) and schedule.decay ({schedule.decay:g} of the steps) do not "
            f"fit into schedule.steps ({schedule.steps})"
        )
    _check_growth_time(config.grow.at, schedule)


def _check_growth_time(at: str, schedule: Schedule) -> None:
    if at == "plateau" and not schedule.plateau.patience:
        raise UsageError(
            "grow.at=plateau needs schedule.plateau.patience, the validations that make a plateau"
        )
    if at not in ("", "plateau") and not (at.isdecimal() and 1 <= int(at) < schedule.steps):
        raise UsageError(
            f"grow.at must be a step from 1 to {schedule.steps - 1}, or plateau, got {at!r}"
        )


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def build_architecture(model: Model) -> Architecture:
    """The architecture a model section describes. Raises UsageError for sizes that contradict each other."""
    values = dataclasses.asdict(model)
    values["norm_eps"] = values.pop("layer_norm_eps")
    try:
        return GPT_NEOX.model(**values)
    except GrowkitError as problem:
        raise UsageError(f"the model section asks for what cannot be: {problem}") from None


def build_section(model: Architecture) -> Model:
    """The model section that describes an architecture."""
    return Model(
        layer=model.layer,
        embed=model.embed,
        head=model.head_count,
        mlp=model.mlp,
        vocab=model.vocab,
        context=model.context,
        rotary_pct=model.rotary_pct,
        rotary_base=model.rotary_base,
        parallel_residual=bool(model.options["parallel_residual"]),
        tied=model.tied,
        layer_norm_eps=model.norm_eps,
        initializer_range=model.initializer_range,
    )
