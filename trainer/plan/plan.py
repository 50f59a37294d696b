"""The plan of a run: its step compiled for named devices; its memory, FLOPs, time and cost."""

from __future__ import annotations

from dataclasses import dataclass

from growkit.models.architecture import Architecture
from trainer.config.sections import Config
from trainer.model.kernels import Choice, select_kernel
from trainer.plan.compiler import Memory, compile_step, count_product_flops
from trainer.plan.cost import HOUR, estimate_price, estimate_seconds
from trainer.plan.topology import Target


@dataclass(frozen=True)
class Plan:
    """A configuration on its devices.

    mesh: devices along each mesh axis. computed: FLOPs of the matrix products in the step's
    program, including those that rematerialisation computes again; `flops` has the model's own, by
    formula.
    """

    config: Config
    model: Architecture
    target: Target
    mesh: dict[str, int]
    attention: Choice
    memory: Memory
    computed: float

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch.sequences * self.config.model.context

    @property
    def flops(self) -> float:
        """Model FLOPs of a step, forward and backward (PaLM, arXiv 2204.02311, appendix B)."""
        return self.tokens_per_step * self.model.flops_per_token(self.config.model.context)

    def estimate_step_seconds(self, mfu: float) -> float | None:
        """Seconds a step: flops / (mfu x peak of all chips); None where the peak is unknown."""
        return estimate_seconds(self.flops, mfu, self.target.peak)

    def estimate_hours(self, mfu: float) -> float | None:
        """Hours of all steps, without validation and saving; None where the peak is unknown."""
        seconds = self.estimate_step_seconds(mfu)
        if seconds is None:
            return None
        return seconds * self.config.schedule.steps / HOUR

    def estimate_cost(self, mfu: float, price: float) -> float | None:
        """Cost of all steps at a price of a chip and hour; None where the peak is unknown."""
        hours = self.estimate_hours(mfu)
        if hours is None:
            return None
        return estimate_price(hours, self.target.chips, price)


def make_plan(config: Config, target: Target) -> Plan:
    """Compile a configuration's training step for a target.

    Raises UsageError for sizes that cannot be divided over the devices.
    """
    step = compile_step(config, target.devices, target.available)
    return Plan(
        config=step.config,
        model=step.model,
        target=target,
        mesh=dict(step.layout.mesh.shape),
        attention=select_kernel(step.config, step.model, step.layout),
        memory=step.memory,
        computed=count_product_flops(step.jaxpr),
    )
