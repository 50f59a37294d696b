"""The learning rate as a function of the step: warm-up, a shape, another warm-up after growth.

Not taken from optax.schedules, because here the first update takes the first warm-up step and the
last update ends at the floor exactly. The tests compare it with optax's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trainer.config.sections import NewRate, Schedule

# From the part of the fall that is done, 0 to 1, to the height above the floor that is left, 1 to
# 0.
SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda part: 0.5 * (1 + jnp.cos(jnp.pi * part)),
    "linear": lambda part: 1 - part,
    "wsd": lambda part: 1 - part,
    "constant": jnp.ones_like,
}


def encode_schedule(
    schedule: Schedule, peak: float, grown_at: int | None = None
) -> dict[str, float]:
    """The numbers of a schedule that `evaluate_schedule` reads: all of it but its kind.

    Arguments as in `compute_learning_rate`.
    """
    # Where the fall begins: after the warm-up, or for wsd the last part `decay` of all steps.
    begin = schedule.warmup
    if schedule.kind == "wsd":
        begin = schedule.steps - round(schedule.decay * schedule.steps)
    # Without growth: a warm-up of one step that ended long ago.
    grown, rewarmup = -1, 1
    if grown_at is not None and schedule.rewarmup:
        grown, rewarmup = grown_at, schedule.rewarmup
    return {
        "peak": peak,
        "warmup": max(schedule.warmup, 1),
        "begin": begin,
        "length": max(schedule.steps - begin, 1),
        "floor": schedule.floor,
        "grown_at": grown,
        "rewarmup": rewarmup,
    }


def evaluate_schedule(kind: str, numbers: Mapping[str, Any], step: jax.Array | int) -> jax.Array:
    """The rate of the update after `step` updates since the branch point.

    Step 0 takes the first warm-up step. The numbers may be traced, so that one program serves every
    schedule of a kind.
    """
    # Counted from 1, so that the first update has a rate above 0 and the last one the floor.
    done = jnp.asarray(step + 1, jnp.result_type(float))
    part = jnp.clip((done - numbers["begin"]) / numbers["length"], 0.0, 1.0)
    after = numbers["floor"] + (1 - numbers["floor"]) * SHAPES[kind](part)
    # Below the warm-up the rate rises linearly; `after` is then not read, though it is computed.
    height = jnp.where(done < numbers["warmup"], done / numbers["warmup"], after)
    # 1 long after growth, and 1 always where nothing grew (see `encode_schedule`).
    again = jnp.clip((done - numbers["grown_at"]) / numbers["rewarmup"], 0.0, 1.0)
    return numbers["peak"] * height * again


def encode_new_rate(settings: NewRate, grown_at: int | None) -> dict[str, float]:
    """The numbers that `evaluate_new_rate` reads.

    grown_at: as in `compute_learning_rate`; None for a schedule that was begun since the growth,
    whose first step then counts as the growth's.
    """
    grown, rewarmup = -1, 1
    if settings.rewarmup:
        grown, rewarmup = grown_at or 0, settings.rewarmup
    return {"new_rate": settings.rate, "new_from": grown, "new_rewarmup": rewarmup}


def evaluate_new_rate(numbers: Mapping[str, Any], step: jax.Array | int) -> jax.Array:
    """The factor on the rate of new parameters, of the update after `step` updates."""
    # Counted from 1, as in `evaluate_schedule`: the first update has a rate above 0.
    done = jnp.asarray(step + 1, jnp.result_type(float))
    warmed = jnp.clip((done - numbers["new_from"]) / numbers["new_rewarmup"], 0.0, 1.0)
    return numbers["new_rate"] * warmed


def compute_learning_rate(
    schedule: Schedule, peak: float, step: jax.Array | int, grown_at: int | None = None
) -> jax.Array:
    """The rate of a schedule with this peak at a step.

    grown_at: the step of this schedule at which the model was grown, from which schedule.rewarmup
    counts; None for no growth within the schedule.
    """
    return evaluate_schedule(schedule.kind, encode_schedule(schedule, peak, grown_at), step)
