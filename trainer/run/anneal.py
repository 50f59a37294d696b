"""An annealing: a branch of a run whose learning rate comes down over some more tokens.

The public 760M run ended so: when validation was flat, its author lowered the learning rate by
hand and trained on 5B more tokens. Here the rate comes down linearly, from the last one trained
with to the one asked for, as in the decay of warm-up-stable-decay schedules. This file makes the
configuration of such a branch; training by it is `trainer.run.stages.train`'s.
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
from trainer.config.values import apply_overrides, place_key
from trainer.run.checkpoint import find_last_step
from trainer.run.directory import read_run
from trainer.step.schedule import compute_learning_rate

VERB = "anneal"
# What an annealing takes from the run, or works out itself.
SETTLED = ("model", "grow", "schedule", "optimizer.learning_rate")


def plan_annealing(
    name: str, to: float, tokens: int, overrides: list[str]
) -> tuple[dict[str, Any], Branch]:
    """The configuration values of an annealing of the run `name`, and its branch for the lineage.

    to: the learning rate of the last step. Raises UsageError for what is not a run, a rate that
    would rise, and too few tokens.
    """
    source = open_source(name)
    stored = _read_config(source, name)
    values = _override(stored.to_dict(), overrides)
    rate = compute_current_rate(source, stored)
    if not rate:
        raise UsageError(f"{name} has come to a learning rate of 0, which cannot come down")
    if not 0 <= to <= rate:
        raise UsageError(
            f"--to must lie between 0 and {rate:g}, the learning rate that {name} has come to, "
            f"got {to:g}"
        )
    steps = _count_steps(resolve(values), tokens)
    schedule = {"kind": "linear", "steps": steps, "warmup": 0, "floor": to / rate}
    optimizer = values["optimizer"] | {"learning_rate": rate, "new": _find_new_rate(values)}
    return values | {"schedule": schedule, "optimizer": optimizer}, Branch(VERB, rate, to, tokens)


def _find_new_rate(values: dict[str, Any]) -> dict[str, float]:
    """What stays of optimizer.new: the factor, where new parameters alone are trained.

    After a training of all nothing is new, and no growth begins at an annealing.
    """
    stated = values["optimizer"].get("new") or {}
    kept = values["train"] == "new" and "rate" in stated
    return {"rate": stated["rate"]} if kept else {}


def _count_steps(config: Config, tokens: int) -> int:
    """The whole steps that so many tokens make. Raises UsageError for less than one."""
    step = config.batch.sequences * config.model.context
    if tokens < step:
        raise UsageError(
            f"--tokens {tokens} is less than one step of this run, which is "
            f"{config.batch.sequences} sequences of {config.model.context} tokens; "
            f"give at least {step}"
        )
    return tokens // step


def read_annealing(
    out: str | os.PathLike[str], to: float, tokens: int, overrides: list[str]
) -> tuple[dict[str, Any], Branch] | None:
    """What `plan_annealing` gave when the annealing in `out` was begun.

    None while `out` has no checkpoint. The run it branched from may have gone on, or be gone.
    Raises UsageError when `out` is another run.
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
            f"{out} was begun with --to {branch.to:g} --tokens {branch.tokens}, got {to:g} and "
            f"{tokens}; name another --out"
        )
    return _override(stored.config.to_dict(), overrides), branch


def compute_current_rate(source: Source, config: Config) -> float:
    """The learning rate of a checkpoint's last step, with its plateaus; 0 at step 0."""
    rate = compute_learning_rate(
        config.schedule,
        config.optimizer.learning_rate,
        # schedule_step counts updates done; the last one was taken at one less.
        source.record["schedule_step"] - 1,
        Lineage.read(source.lineage).grown_at,
    )
    reduced = np.asarray(rate * source.record.get("reduction", 1.0))
    # The schedule computes in float32. This takes as few digits as give the same number again.
    return float(str(reduced[()]))


def _read_config(source: Source, name: str) -> Config:
    """The configuration that a checkpoint was trained by, without the growth that it began with."""
    training = Lineage.read(source.lineage).last_as(Training)
    if source.kind != "checkpoint" or training is None:
        raise UsageError(
            f"{name} is not a run's checkpoint, so it has no schedule to come down from; train it "
            f"on with `growkit train CONFIG --from {name}`"
        )
    return resolve({key: value for key, value in training.config.items() if key != "grow"})


def _override(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The values with overrides applied. Raises UsageError for what an annealing settles itself."""
    for override in overrides:
        key = place_key(override.partition("=")[0])
        if any(key == settled or key.startswith(f"{settled}.") for settled in SETTLED):
            raise UsageError(
                f"an annealing takes {key} from the run, or from --to and --tokens; "
                f"it cannot be given"
            )
    return apply_overrides(values, overrides)
