"""Growth at the start of a run or on the way, and what it asks of the training after it.

Plans are growkit's (`growkit.growth.plan`). Here the configuration's section `grow` becomes a
plan, and a lineage's growths become multipliers for the optimizer, a check of the first
validation, and notes for the log.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from growkit.checkpoint.tensor import Source
from growkit.entries import Growth, Training
from growkit.errors import GrowkitError, UsageError
from growkit.growth.depth import plan_depth
from growkit.growth.multipliers import compute_multipliers
from growkit.growth.new import find_new_layers, find_new_units, mark_new
from growkit.growth.plan import Plan, combine_plans, set_options
from growkit.growth.vocabulary import add_tokens
from growkit.growth.width import plan_width
from growkit.lineage import Lineage
from growkit.models.architecture import Architecture
from trainer.config.sections import Config, Dropout, Grow, NewRate, Optimizer, build_section
from trainer.data.corpus import Corpus
from trainer.log.history import GROWN, History
from trainer.run.checkpoint import read_last_lineage
from trainer.step.optimizer import Multipliers
from trainer.step.part import ALL, Part
from trainer.step.plateau import find_plateaus

# By how much a validation loss, in nats a token, may differ after exact growth: what rounding
# explains.
ROUNDING = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-2}


def plan_growth(settings: Grow, model: Architecture) -> Plan | None:
    """The plan of a grow section for this model, None where it grows nothing.

    Raises UsageError for a growth that cannot be, and for options without a growth.
    """
    plan = _plan_sizes(settings, model)
    if settings.vocab:
        plan = add_tokens("grow", plan, model, settings.vocab)
    if plan is not None:
        return set_options(plan, settings.moments, settings.noise, settings.seed, settings.rates)
    if settings == Grow():
        return None
    raise UsageError(
        "the grow section has options but no growth: set grow.map, or grow.embed, heads, mlp, "
        "head_dim or vocab"
    )


def _plan_sizes(settings: Grow, model: Architecture) -> Plan | None:
    """The plan of depth and width, as one, so that every parameter is grown once."""
    plans = []
    if settings.map:
        scale = settings.scale or None
        plans.append(plan_depth(model, settings.map, settings.depth_method, scale))
    elif settings.scale:
        raise UsageError("grow.scale gives shares to copied layers: set grow.map too")
    sizes: dict[str, Any] = {
        "embed": settings.embed or None,
        "heads": settings.heads or None,
        "mlp": settings.mlp or None,
        "head_dim": settings.head_dim or None,
    }
    if any(sizes.values()):
        method = settings.width_method or None
        plans.append(plan_width(model, **sizes, method=method, spread=settings.spread))
    if len(plans) > 1:
        return combine_plans("grow", plans, model)
    return plans[0] if plans else None


def grow_config(config: Config, plan: Plan) -> Config:
    """The configuration after a growth on the way: the grown model, the schedule going on."""
    schedule = replace(config.schedule, continued=True)
    return replace(config, model=build_section(plan.grown), schedule=schedule)


def is_growth_due(config: Config, step: int, history: History) -> bool:
    """Whether the growth on the way comes at this step: at its number, or at the first plateau.

    A step is grown at once it is validated. The last step of a run is not grown at.
    """
    # Grown at the last step, the model would be saved untrained.
    if step == config.schedule.steps or history.find_validation_loss(step) is None:
        return False
    if config.grow.at == "plateau":
        return bool(find_plateaus(history.list_validation_losses(), config.schedule.plateau))
    return step >= int(config.grow.at)


def select_multipliers(setting: str, lineage: Lineage, model: Architecture) -> Multipliers | None:
    """The multipliers to apply to a model that has this lineage behind it, None for none.

    setting: on, off, or auto, which applies them where growth is exact for the training too, or was
    made with rates=mup.
    """
    growths = lineage.growths_owed()
    if setting == "off" or not growths:
        return None
    if setting == "auto" and not lineage.multiplied:
        return None
    plans = [growth.plan_within(model) for growth in growths]
    return Multipliers(**compute_multipliers(model, plans))


def find_multipliers(
    settings: Optimizer, lineage: Lineage, model: Architecture
) -> Multipliers | None:
    """The multipliers that a training applies, and what is new where that has a rate of its own.

    lineage: with the training as its last entry.
    """
    before = lineage.before_last
    setting = "on" if lineage.last_training.multipliers else "off"
    found = select_multipliers(setting, before, model)
    if settings.new == NewRate():
        return found
    new = find_new_units([growth.plan_within(model) for growth in before.growths_new()])
    if not new:
        return found
    marks = model.table.tree(lambda row: mark_new(row, model, new))
    return replace(found or Multipliers(), new=marks)


def find_part(
    config: Config,
    model: Architecture,
    source: Source | None,
    growth: Plan | None,
    out: str | os.PathLike[str],
) -> Part:
    """The parameters that are trained, by what was done to the model before.

    source: None where RUN `out` has a checkpoint, or for a new model. growth: at the start. Raises
    UsageError where train=new or optimizer.new finds nothing new.
    """
    # A run that grows on the way has new parameters from then on.
    has_rate = config.optimizer.new != NewRate() and not config.grow.at
    if config.train == "all" and not has_rate:
        return ALL
    # The last entry of a run's own checkpoint is its own training.
    lineage = Lineage.read(source.lineage) if source else read_last_lineage(out).before_last
    if growth:
        lineage = lineage.followed_by(Growth.of(growth))
    if config.train == "all":
        _require_new(lineage, model)
        return ALL
    return _select_new(config.grow.at, lineage, model)


def _require_new(lineage: Lineage, model: Architecture) -> None:
    """Raise UsageError where optimizer.new is for parameters that there are none of."""
    growths = [growth.plan_within(model) for growth in lineage.growths_new()]
    if find_new_units(growths):
        return
    raise UsageError(
        f"optimizer.new sets the learning rate of what growth added, and nothing is new: "
        f"{_explain_nothing_new(lineage)}; grow first (grow.map, grow.embed, or on disk), or leave "
        "optimizer.new out"
    )


def _explain_nothing_new(lineage: Lineage) -> str:
    """Why a model without new parameters has none."""
    if lineage.growths_new():
        return "the growths before this training added no units"
    if any(isinstance(entry, Growth) for entry in lineage):
        return "all parameters were trained since the model was grown"
    return "no growth came before this training"


def _select_new(at: str, lineage: Lineage, model: Architecture) -> Part:
    """The layers that growth added, which a run with train=new trains.

    at: when the run itself grows; empty for not at all or at the start. lineage: with the growth at
    the start. Raises UsageError where nothing is new.
    """
    if at:
        raise UsageError(
            f"train=new trains layers that growth has added, and with grow.at={at} a run grows "
            "later; grow at the start, or on disk"
        )
    growths = [growth.plan_within(model) for growth in lineage.growths_new()]
    layers = find_new_layers(growths)
    if layers:
        return Part(tuple(sorted(layers)))
    what = _explain_nothing_new(lineage)
    if growths:
        what = "the growths before this training added none (they grew width or vocabulary)"
    raise UsageError(
        f"train=new trains the layers that growth added, and nothing is new: {what}; grow with "
        "`growkit depth` or grow.map, or leave train=new out"
    )


def describe_beginning(lineage: Lineage, step: int) -> str:
    """The first event of a run, or of what follows a growth on the way: which sizes grew."""
    growth = lineage.before_last.last_as(Growth)
    if growth is None:
        return "start"
    sizes = ", ".join(f"{axis} {old} to {new}" for axis, (old, new) in growth.changes.items())
    grown = f"{GROWN}: {sizes}"
    return grown if step else f"start, {grown}"


def describe_growths(lineage: Lineage, model: Architecture, dropout: Dropout) -> Iterator[str]:
    """What the growths before this training mean for it, one sentence each."""
    if lineage.last_training.multipliers:
        exact = "exact growth in width"
        mup = "growth with rates=mup, which is approximate"
        which = exact if lineage.before_last.continues else mup
        yield f"{which}: learning rates, eps and clip weights are multiplied for each parameter"
    tied = find_tied_axes(lineage.before_last, model, dropout)
    if tied:
        yield (
            f"warning: the copies of {', '.join(tied)} have equal gradients and dropout is 0, so "
            f"they stay equal; grow with --noise or --spread, or train with dropout"
        )


def describe_new(config: Config, part: Part, model: Architecture, marked: bool) -> Iterator[str]:
    """What a run trains of what growth added, and with which factor on the learning rate.

    marked: whether new parameters have a factor of their own.
    """
    if part.layers is not None:
        yield f"train=new: {len(part.layers)} of {model.layer} layers are trained"
    if marked:
        new = config.optimizer.new
        warmed = f", from 0 over {new.rewarmup:,} steps" if new.rewarmup else ""
        yield f"optimizer.new: learning rate x {new.rate:g} for what growth added{warmed}"


def find_tied_axes(lineage: Lineage, model: Architecture, dropout: Dropout) -> tuple[str, ...]:
    """The axes whose copies, made by the last growth, will stay equal while there is no dropout."""
    growths = lineage.last_growths()
    if not growths or dropout.hidden or dropout.attention or dropout.embedding:
        return ()
    return growths[-1].plan_within(model).tied_copies


def compute_allowed_gap(config: Config) -> float:
    """Nats a token by which exact growth may move the validation loss, in this run's arithmetic."""
    return max(ROUNDING[config.precision.params], ROUNDING[config.precision.compute])


def count_compared(lineage: Lineage, data: Corpus, source: Mapping[str, Any], own: int) -> int:
    """How many windows to validate on, so that the loss compares with the source's last one.

    After exact growth as many as the source's, where they are of the same data; else this run's
    own. lineage: the source's. source: its record. own: this run's eval.windows.
    """
    theirs = source.get("validation_windows")
    growths = lineage.last_growths()
    exact = bool(growths) and all(growth.preserved for growth in growths)
    trainings = [entry for entry in lineage.entries if isinstance(entry, Training)]
    if not exact or not trainings or theirs == data.validation_fingerprint(own):
        return own
    count = trainings[-1].config.get("eval", {}).get("windows")
    if not isinstance(count, int) or count < 1:
        return own
    return count if data.validation_fingerprint(count) == theirs else own


def compare_with_source(
    lineage: Lineage, loss: float, source: Mapping[str, Any], windows: str, allowed: float
) -> str | None:
    """The first validation loss after exact growth beside the source's last one, as a sentence.

    source: the source's record. windows: the fingerprint of what the validation ran on. None
    where the last growths were not exact, or there were none. Raises GrowkitError where the two
    losses differ by more than `allowed`.
    """
    growths = lineage.last_growths()
    if not growths or not all(growth.preserved for growth in growths):
        return None
    before = source.get("validation_loss")
    if before is None:
        return "growth was exact; the source has no validation loss to compare with"
    if source.get("validation_windows") != windows:
        return (
            "growth was exact; the source has no validation loss on these windows to compare with "
            "(other data, model.context or eval.windows)"
        )
    if abs(loss - before) > allowed:
        raise GrowkitError(
            f"growth was exact, but the validation loss went from {before:.6f} to {loss:.6f}, by "
            f"more than the {allowed:g} that rounding explains; --allow-gap trains on all the same"
        )
    return (
        f"growth was exact: the source's validation loss was {before:.6f}, this one's is {loss:.6f}"
    )
