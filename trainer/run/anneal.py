"""An annealing: a branch of a run whose learning rate comes down from where it stood, over so many tokens more.

The public 760M run ended so: when validation was flat, its author lowered the learning rate by hand and trained on
5B more tokens. Here it comes down linearly, from the last rate trained with to the one asked for, as in the decay of
warm-up-stable-decay schedules. Knows what configuration that is; leaves the training to the loop.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from growkit.checkpoint.location import open_source
from growkit.checkpoint.tensor import Source
from growkit.entries import Branch, Training
from growkit.errors import UsageError
from growkit.lineage import Lineage
from trainer.config.sections import Config, resolve
from trainer.config.values import apply_overrides
from trainer.run.checkpoint import find_last_step
from trainer.run.directory import read_run
from trainer.step.schedule import compute_learning_rate

VERB = "anneal"
# What an annealing takes from the run or works out itself.
SETTLED = ("model", "grow", "schedule", "optimizer.learning_rate")


def plan_annealing(
    name: str, to: float, tokens: int, overrides: list[str]
) -> tuple[dict[str, Any], Branch]:
    """The nested configuration values of the annealing of the run `name`, and what its lineage says of the branch.

    to: the rate of the last step. Raises UsageError for what is no run, a rate that would rise, too few tokens.
    """
    source = open_source(name)
    stored = _configuration(source, name)
    values = _overridden(stored.to_dict(), overrides)
    rate = compute_current_rate(source, stored)
    if not rate:
        raise UsageError(f"{name} has come to a learning rate of 0, from which nothing comes down")
    if not 0 <= to <= rate:
        raise UsageError(
            f"--to must lie between 0 and {rate:g}, the learning rate that {name} has come to, got {to:g}"
        )
    config = resolve(values)
    step = config.batch.sequences * config.model.context
    if tokens < step:
        raise UsageError(
            f"--tokens {tokens} is less than one step of this run, which is {config.batch.sequences} sequences of "
            f"{config.model.context} tokens; give at least {step}"
        )
    schedule = {"kind": "linear", "steps": tokens // step, "warmup": 0, "floor": to / rate}
    values |= {"schedule": schedule, "optimizer": values["optimizer"] | {"learning_rate": rate}}
    return values, Branch(VERB, rate, to, tokens)


def read_annealing(
    out: str | os.PathLike, to: float, tokens: int, overrides: list[str]
) -> tuple[dict[str, Any], Branch] | None:
    """What `plan_annealing` gave when the annealing in `out` was begun; None when it has no checkpoint yet.

    The run it branched from may have gone on, or be gone. Raises UsageError when `out` is another run.
    """
    stored = read_run(out)
    if stored is None or find_last_step(out) is None:
        return None
    training = Lineage.read(open_source(str(out)).lineage).last_as(Training)
    branch = training.branch if training else None
    if branch is None or branch.verb != VERB:
        raise UsageError(f"{out} is a run that annealing did not begin; name another --out")
    if (branch.to, branch.tokens) != (to, tokens):
        raise UsageError(
            f"{out} was begun with --to {branch.to:g} --tokens {branch.tokens}, got {to:g} and {tokens}; "
            f"name another --out"
        )
    return _overridden(stored["config"], overrides), branch


def compute_current_rate(source: Source, config: Config) -> float:
    """The learning rate of the last step that a checkpoint was trained with, its plateaus included; 0 at step 0."""
    step = source.record["schedule_step"] - 1
    grown_at = Lineage.read(source.lineage).grown_at
    rate = compute_learning_rate(config.schedule, config.optimizer.learning_rate, step, grown_at)
    # As few digits as give the same number again.
    return float(str(np.asarray(rate * source.record.get("reduction", 1.0))[()]))


def _configuration(source: Source, name: str) -> Config:
    """The configuration that a checkpoint was trained by, without the growth that it began with."""
    training = Lineage.read(source.lineage).last_as(Training)
    if source.kind != "checkpoint" or training is None:
        raise UsageError(
            f"{name} is not a run's checkpoint, so it has no schedule to come down from; train it on with "
            f"`growkit train CONFIG --from {name}`"
        )
    return resolve({key: value for key, value in training.config.items() if key != "grow"})


def _overridden(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    for override in overrides:
        key = override.partition("=")[0]
        if any(key == settled or key.startswith(f"{settled}.") for settled in SETTLED):
            raise UsageError(
                f"an annealing takes {key} from the run, or from --to and --tokens; it cannot be given"
            )
    return apply_overrides(values, overrides)
