"""Callbacks of transformers' Trainer for grown models: warm-up of new layers, clipping, lineage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from growkit.checkpoint.files import encode_json, write_atomically
from growkit.checkpoint.hashes import drop_hashes
from growkit.checkpoint.huggingface import LINEAGE, read_lineage
from growkit.errors import UsageError
from growkit.surgery.groups import GROWN_AT, NEW
from growkit.torch.groups import clip_grad_norm_


class Rewarm(TrainerCallback):  # type: ignore[misc]
    """The learning rate of new layers rises from 0 to the schedule's over some steps.

    Copies of layers change the function, and 150 to 250 steps are usual (SPARKLING re-warms the new
    layers alone). The groups must say which layers are new: `--groups split`, and
    `growkit.torch.param_groups`. A run that is resumed goes on where it was.
    """

    def __init__(self, steps: int):
        if steps < 1:
            raise UsageError(f"Rewarm takes a number of steps of at least 1, got {steps}")
        self.steps = steps
        self.rates: list[tuple[dict[str, Any], Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        if not any(group.get(NEW) for group in optimizer.param_groups):
            raise UsageError(
                "no parameter group is of new layers: grow with --groups split, and build the "
                "optimizer from growkit.torch.param_groups"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Multiply the rates of this step."""
        self.rates = []
        for group in kwargs["optimizer"].param_groups:
            if not group.get(NEW):
                continue
            done = state.global_step + 1 - int(group.get(GROWN_AT, 0))
            self.rates.append((group, group["lr"]))
            group["lr"] = group["lr"] * min(1.0, max(0, done) / self.steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the rates back, for schedules that make the next one from the last."""
        for group, rate in self.rates:
            group["lr"] = rate
        self.rates = []


class WeightedClip(TrainerCallback):  # type: ignore[misc]
    """Gradients clipped by the norm that the small model would have; see `clip_grad_norm_`.

    The Trainer's own clipping cannot be weighted: give it max_grad_norm=0.
    """

    def __init__(self, max_norm: float):
        self.max_norm = max_norm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_grad_norm:
            raise UsageError(
                f"the Trainer clips too, by max_grad_norm={args.max_grad_norm}; give it 0 and leave"
                " clipping to WeightedClip"
            )
        if args.fp16:
            raise UsageError(
                "with fp16 gradients are scaled until the step, so WeightedClip cannot clip them; "
                "train in bf16"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clip_grad_norm_(kwargs["optimizer"], self.max_norm)


class KeepLineage(TrainerCallback):  # type: ignore[misc]
    """The lineage of a grown model, in every checkpoint that the Trainer saves of it.

    Which layers are new, and by which factors groups are split, stands there alone. directory: the
    grown model's, or a later checkpoint's that has a lineage. The hashes in it are left out: they
    are of tensors before this training.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        lineage = read_lineage(Path(directory))
        if not lineage:
            raise UsageError(f"{directory} has no {LINEAGE} to keep; name the grown directory")
        self.content = encode_json(drop_hashes(lineage))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and saved.is_dir():
            write_atomically(saved / LINEAGE, self.content)
