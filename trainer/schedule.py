"""The learning rate as a function of the step: warm-up, one of a few shapes, and a warm-up once more after growth.

Written out and not taken from optax.schedules because a run's first update takes the first warm-up step and its
last one ends at the floor exactly; the tests hold it against optax's. Knows no optimizer and no files.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from trainer.config import Schedule

# From the part of the fall that is done, 0 to 1, to the height above the floor that is left, 1 to 0.
SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda part: 0.5 * (1 + jnp.cos(jnp.pi * part)),
    "linear": lambda part: 1 - part,
    "wsd": lambda part: 1 - part,
    "constant": jnp.ones_like,
}


def learning_rate(schedule: Schedule, peak: float, step: jax.Array | int, grown_at: int | None = None) -> jax.Array:
    """The rate of the update after `step` updates since the branch point: step 0 takes the first warm-up step.

    grown_at: the step of this schedule at which the model was grown, from which schedule.rewarmup counts; None for
    no growth within the schedule.
    """
    step = jnp.asarray(step + 1, jnp.result_type(float))
    warm = step / max(schedule.warmup, 1)
    begin = schedule.steps - round(schedule.decay * schedule.steps) if schedule.kind == "wsd" else schedule.warmup
    part = jnp.clip((step - begin) / max(schedule.steps - begin, 1), 0.0, 1.0)
    after = schedule.floor + (1 - schedule.floor) * SHAPES[schedule.kind](part)
    rate = peak * jnp.where(step < schedule.warmup, warm, after)
    if grown_at is not None and schedule.rewarmup:
        rate *= jnp.clip((step - grown_at) / schedule.rewarmup, 0.0, 1.0)
    return rate
