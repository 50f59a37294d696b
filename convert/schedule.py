"""The trainer's schedule, and the same schedule in the words of transformers.

Both count updates, but the trainer's first update takes the first step of the warm-up, and
transformers' takes step 0, whose rate is 0. A schedule of transformers that stands one step further
gives the same rates from then on; a test compares the two for every kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from growkit import forms

# From the part of the fall that is done, 0 to 1, to the height that is left above the floor.
SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
    "linear": lambda part: 1 - part,
    "wsd": lambda part: 1 - part,
    "constant": lambda part: 1.0,
}


def compute_height(schedule: Mapping[str, Any], step: int) -> float:
    """The learning rate of the update after `step` updates, as a part of the peak.

    schedule: the section of a run's configuration. `trainer.step.schedule` computes the same in
    JAX; without the warm-up after growth. Raises KeyError or ValueError for a section that is none.
    """
    kind = forms.take_text(schedule, "kind")
    steps, warmup = (forms.take_whole(schedule, name) for name in ("steps", "warmup"))
    floor = forms.take_number(schedule, "floor")
    done = step + 1
    if done < warmup:
        return done / warmup
    begin = steps - count_decay(schedule) if kind == "wsd" else warmup
    part = min(max((done - begin) / max(steps - begin, 1), 0.0), 1.0)
    return floor + (1 - floor) * SHAPES[kind](part)


def count_decay(schedule: Mapping[str, Any]) -> int:
    """The steps of the fall at the end of warm-up, stable, decay."""
    steps = forms.take_whole(schedule, "steps")
    return round(forms.take_number(schedule, "decay") * steps)


def describe_arguments(schedule: Mapping[str, Any], peak: float) -> str:
    """The TrainingArguments with which transformers goes through the same schedule."""
    kind, floor = schedule["kind"], schedule["floor"]
    more: dict[str, Any] = {}
    if kind == "cosine":
        name = "cosine_with_min_lr" if floor else "cosine"
        more = {"min_lr_rate": floor} if floor else {}
    elif kind == "linear":
        # transformers' linear schedule has no floor, its polynomial of power 1 has one.
        name = "polynomial" if floor else "linear"
        more = {"power": 1.0, "lr_end": floor * peak} if floor else {}
    elif kind == "wsd":
        name = "warmup_stable_decay"
        decay = count_decay(schedule)
        more = {"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": floor}
    else:
        name = "constant_with_warmup"
    words = f"learning_rate={peak:g}, warmup_steps={schedule['warmup']}, "
    words += f"max_steps={schedule['steps']}, lr_scheduler_type={name!r}"
    return f"{words}, lr_scheduler_kwargs={more}" if more else words
