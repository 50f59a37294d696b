"""The optimizer across the border: a trainer checkpoint's moments in PyTorch, and the other way.

Moments are copied bit for bit; both sides compute AdamW alike, with eps outside the root. What only
one side states follows from the lineage: the trainer keeps rates and betas in its configuration,
PyTorch in the groups of optimizer.pt. An import writes the groups' options into its entry, so that
an export can give them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.schedule import compute_height, describe_arguments
from growkit import forms
from growkit.checkpoint.files import encode_json
from growkit.checkpoint.optimizer import NAMES, Group, Optimizer, Scalar
from growkit.checkpoint.tensor import SLOTS, Source
from growkit.entries import Conversion, Training
from growkit.errors import GrowkitError, UsageError
from growkit.growth.plan import Plan
from growkit.lineage import Lineage
from growkit.models.definition import list_defined
from growkit.surgery.groups import CLIP, GROWN_AT, NEW, RATE, find_factors, make_groups

# The key of an import's entry that says which optimizer came with the model.
KEY = "optimizer"
# What a group of torch.optim.AdamW states beside rate, betas, eps and decay.
ADAMW = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
ENTRIES = {"mu": "exp_avg", "nu": "exp_avg_sq"}
FLOAT32 = "float32"
# What split groups state of growth, which is in the lineage too.
SPLIT = (NAMES, RATE, CLIP, NEW, GROWN_AT)


@dataclass(frozen=True)
class Settings:
    """What a lineage says of the optimizer that made a source's moments.

    options: of a parameter group that decays and has no factors. entries: slot -> its name in
    PyTorch. wrapper: see `Optimizer`. step: the dtype of a parameter's step, 'number' for a plain
    one, empty for none. config: of the training, empty where the last thing was an import.
    """

    options: Mapping[str, Any]
    entries: Mapping[str, str] = field(default_factory=lambda: dict(ENTRIES))
    wrapper: str = ""
    step: str = FLOAT32
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """The learning rate that the schedule multiplies."""
        return float(self.options.get("initial_lr", self.options["lr"]))


def carries_optimizer(source: Source) -> bool:
    """Whether an import carries the moments that a source has, if it has any."""
    optimizer = source.torch_optimizer
    return optimizer is None or optimizer.universal is None


def state_optimizer(source: Source) -> dict[str, Any]:
    """What an import states of a source's optimizer, in JSON; the moments are copied beside it.

    Raises GrowkitError for an optimizer of which a trainer checkpoint cannot hold all.
    """
    optimizer = source.torch_optimizer
    assert optimizer is not None
    if "nu_max" in optimizer.entries:
        raise GrowkitError(
            f"{source.path} was trained with AMSGrad, whose largest second moments the trainer's "
            "AdamW has no place for; move optimizer.pt elsewhere to import the model alone"
        )
    steps = {step.value if isinstance(step, Scalar) else step for step in optimizer.steps.values()}
    if len(steps) > 1:
        raise GrowkitError(
            f"the parameters of {source.path} took {min(steps):g} to {max(steps):g} steps, and a "
            "trainer checkpoint has one count for all; move optimizer.pt elsewhere to import the "
            "model alone"
        )
    first = next(iter(optimizer.steps.values()), None)
    kind = "" if first is None else "number"
    return {
        "entries": dict(optimizer.entries),
        "wrapper": optimizer.wrapper,
        "step": first.dtype if isinstance(first, Scalar) else kind,
        "options": _find_options(source, optimizer),
    }


def _find_options(source: Source, optimizer: Optimizer) -> dict[str, Any]:
    """The options of the first group, without the factors of growth, as JSON holds them."""
    group = optimizer.groups[0]
    options = {
        key: _plain(value)
        for key, value in group.options.items()
        if key not in SPLIT and _is_plain(value)
    }
    if RATE not in group.options:
        return options
    plans = [growth.plan_within(source.model) for growth in _read(source).growths_owed()]
    if not plans:
        raise GrowkitError(
            f"the groups of {source.path} are split by growth, and no lineage.json there says by "
            "which; copy the one of the grown checkpoint into it"
        )
    factors = find_factors(source.model, list_defined(source.model), plans)[group.names[0]]
    changes = {"lr": factors.rate, "initial_lr": factors.rate, "eps": factors.eps}
    changes["weight_decay"] = 1.0 / factors.rate
    return {
        key: value / changes[key] if key in changes else value for key, value in options.items()
    }


def _read(source: Source) -> Lineage:
    return Lineage.read(source.lineage)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(each, int | float) for each in value)
    return value is None or isinstance(value, bool | int | float | str | Scalar)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Scalar) else value


def find_settings(source: Source) -> Settings:
    """The settings of the optimizer that made a source's moments.

    Raises UsageError for a source without moments, GrowkitError where the lineage has no settings,
    or those of other moments.
    """
    moments = [slot for slot in SLOTS[1:] if slot in source.tensors]
    if not moments:
        raise UsageError(
            f"{source.path} holds no moments of all its parameters, so there is no optimizer to "
            "export; leave --optimizer out"
        )
    settings = _find_stated(source)
    if set(moments) != set(settings.entries):
        raise GrowkitError(
            f"{source.path} holds {' and '.join(moments)}, and its lineage says that the optimizer "
            f"has {' and '.join(settings.entries)}"
        )
    return settings


def _find_stated(source: Source) -> Settings:
    """What the last training or import of a lineage states."""
    for entry in reversed(_read(source).entries):
        try:
            if isinstance(entry, Training):
                return _read_training(entry, source.record)
            if isinstance(entry, Conversion) and KEY in entry.more:
                return _read_import(entry.more[KEY])
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            raise GrowkitError(
                f"the lineage of {source.path} states an optimizer that cannot be read: {problem!r}"
            ) from None
    raise GrowkitError(
        f"the lineage of {source.path} has neither a training nor an import that states learning "
        "rate, betas, eps and decay, which optimizer.pt needs"
    )


def _read_training(entry: Training, record: Mapping[str, Any]) -> Settings:
    """The settings of the trainer's AdamW at the record's place in the schedule."""
    stated = forms.take_object(entry.config, "optimizer")
    names = ("learning_rate", "beta1", "beta2", "eps", "weight_decay")
    rate, beta1, beta2, eps, decay = (forms.take_number(stated, name) for name in names)
    peak = rate * record.get("reduction", 1.0)
    schedule = forms.take_object(entry.config, "schedule")
    options = {
        "lr": peak * compute_height(schedule, record.get("schedule_step", 0)),
        "betas": (beta1, beta2),
        "eps": eps,
        "weight_decay": decay,
        **ADAMW,
        "initial_lr": peak,
    }
    return Settings(options, config=entry.config)


def _read_import(stated: Any) -> Settings:
    """The settings that an import stated."""
    entries = {slot: forms.take_text(stated["entries"], slot) for slot in stated["entries"]}
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in forms.take_object(stated, "options").items()
    }
    forms.take_number(options, "lr")
    wrapper, step = (forms.take_text(stated, name) for name in ("wrapper", "step"))
    return Settings(options, entries, wrapper, step)


def make_optimizer(source: Source, settings: Settings) -> Optimizer:
    """The optimizer of PyTorch that goes on from a source.

    Raises GrowkitError for groups that torch cannot have.
    """
    defined = list_defined(source.model)
    groups = make_groups(source.model, defined, _list_plans(source), settings.options)
    return Optimizer(
        groups=tuple(groups),
        entries=settings.entries,
        locations=dict.fromkeys(settings.entries, "cpu"),
        steps={name: _make_step(settings, source) for name, _ in defined} if settings.step else {},
        wrapper=settings.wrapper,
        schedule=_make_schedule(groups, source),
    )


def _list_plans(source: Source) -> list[Plan]:
    """The growths whose factors the training had, or has from here on."""
    lineage = _read(source)
    training = lineage.last_as(Training)
    if not lineage.multiplied and not (training and training.multipliers):
        return []
    return [growth.plan_within(source.model) for growth in lineage.growths_owed()]


def _make_step(settings: Settings, source: Source) -> Any:
    count = int(source.record.get("count", 0))
    return count if settings.step == "number" else Scalar(settings.step, "cpu", float(count))


def _make_schedule(groups: list[Group], source: Source) -> dict[str, Any]:
    """The state of a LambdaLR of transformers at the same place of the schedule.

    The next update takes the groups' own rates, and those after it the schedule's.
    """
    step = int(source.record.get("schedule_step", 0))
    rates = [group.options["lr"] for group in groups]
    return {
        "base_lrs": [group.options.get("initial_lr", group.options["lr"]) for group in groups],
        # See `convert.schedule`: one step further than the trainer counts.
        "last_epoch": step + 1,
        "_step_count": step + 2,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": rates,
        # Functions, which no state holds: they are made of TrainingArguments.
        "lr_lambdas": [None] * len(groups),
    }


def make_trainer_state(source: Source, settings: Settings) -> bytes:
    """trainer_state.json of a training at the source's step, with an empty log."""
    config = settings.config
    batch = config.get("batch", {})
    size = batch.get("sequences", 8) // max(batch.get("accumulation", 1), 1)
    intervals = {
        "logging_steps": config.get("log", {}).get("every"),
        "eval_steps": config.get("eval", {}).get("every"),
        "save_steps": config.get("checkpoint", {}).get("every"),
    }
    control = ("training_stop", "epoch_stop", "save", "evaluate", "log")
    state = {
        "epoch": 0.0,
        "global_step": int(source.record.get("step", 0)),
        "max_steps": config.get("schedule", {}).get("steps", 0),
        "num_train_epochs": 1,
        # A number in any case: the Trainer divides it.
        "train_batch_size": size,
        "log_history": [],
        # The Trainer looks up its own control here when it saves.
        "stateful_callbacks": {
            "TrainerControl": {
                "args": {f"should_{name}": False for name in control},
                "attributes": {},
            }
        },
    }
    return encode_json(state | {name: value for name, value in intervals.items() if value})


def describe_import(source: Source) -> list[str]:
    """What a user should know of an optimizer of PyTorch that was imported, a sentence each."""
    optimizer = source.torch_optimizer
    if optimizer is None:
        return []
    options = optimizer.groups[0].options
    shown = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum")
    stated = ", ".join(f"{key} {_plain(options[key])}" for key in shown if key in options)
    notes = [
        f"its first group has {stated}; the trainer takes these from its own configuration "
        "(optimizer.learning_rate, beta1, beta2, eps, weight_decay), and the schedule's kind and "
        f"length too: schedule.continued=true goes on at step {source.record['schedule_step']}"
    ]
    if "nu" not in optimizer.entries:
        notes.append(
            "the trainer has AdamW alone and starts both its moments at zero: mu is in the "
            "checkpoint for growth, export and programs of your own"
        )
    elif options.get("decoupled_weight_decay") is False and options.get("weight_decay"):
        notes.append("Adam added its decay to the gradients; the trainer's AdamW decays weights")
    rates = {_plain(group.options.get("lr")) for group in optimizer.groups}
    if len(rates) > 1 and RATE not in options:
        notes.append("its groups have several learning rates; the trainer has one for all")
    return notes


def describe_export(settings: Settings, optimizer: Optimizer) -> list[str]:
    """What a user should know of an optimizer that was exported, a sentence each."""
    notes = [
        "neither training_args.bin nor rng_state.pth is written: the Trainer resumes without them; "
        "it skips the batches of its own data that it counts as seen (ignore_data_skip=True does "
        "not)"
    ]
    if settings.config:
        arguments = describe_arguments(settings.config["schedule"], settings.peak)
        notes.append(f"TrainingArguments of the run's own schedule: {arguments}")
        clip = settings.config["optimizer"].get("clip", 0.0)
        notes.append(f"the run clipped gradients at the norm {clip:g}: max_grad_norm={clip:g}")
    if any(RATE in group.options for group in optimizer.groups):
        notes.append(
            "the groups are split by the factors of growth: build the optimizer from "
            "growkit.torch.param_groups(model, OUT)"
        )
    return notes
