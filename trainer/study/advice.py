"""What published work says about growth: when, from which size, and what it saved.

Only arithmetic on sizes and budgets. Each law stands with its source and the range that it was
fitted in.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log10

from growkit.models.architecture import Architecture
from trainer.study.evidence import Arm

GSTACK = "G_stack (arXiv 2405.15319)"
# G_stack's timing law, equation 2: log10 d = PARAMETERS log10 N + COMPUTE / log10 C + CONSTANT.
# d: tokens to train the source on; N: the target's parameters without embeddings;
# C: training FLOPs of the source and the grown model together.
PARAMETERS, COMPUTE, CONSTANT = 0.88, 163.27, -5.74
# What the law was fitted to, figure 8: {target's parameters: (lowest, highest) budget in FLOPs}.
FITTED = {410e6: (0.8e20, 2.2e20), 1.1e9: (2e20, 7e20), 3e9: (4e20, 12e20)}
# Section 4.2: all of them grew by FACTOR in parameters without embeddings, that is, in layers. The
# best factor lay between the two of BEST_FACTORS.
FACTOR = 4
BEST_FACTORS = 2, 4
LEAST_LAYERS = 2  # from a source of one layer G_stack was worse than from scratch (section 4.2)
# growkit's own limit, not part of the law: a source that takes a larger share of the budget leaves
# too little of it for growth to save anything.
AFFORDABLE_SHARE = 0.5
REWARM = (
    "150 to 250 steps after copies of layers (growkit's guide, docs/operators.md; no law is "
    "published); the 760M run, grown from 580M with a fresh optimizer, took 2000"
)
FLOPS_PER_PARAMETER = 6.0  # of training on a token: 2 forward, 4 backward


@dataclass(frozen=True)
class Size:
    """A model as the laws see it.

    flops_per_token: of training. embed, layers: None where only the number of parameters is known.
    one_layer: FLOPs a token of the same model with one layer. tokens: that it was trained on; None
    for a model that is not trained yet, or where that is not known.
    """

    name: str
    parameters: int
    without_embeddings: int
    flops_per_token: float
    embed: int | None = None
    layers: int | None = None
    one_layer: float | None = None
    tokens: float | None = None

    @classmethod
    def from_count(cls, name: str, parameters: int) -> Size:
        """A bare count of parameters: no embeddings, and 6 FLOPs a parameter and token."""
        return cls(name, parameters, parameters, FLOPS_PER_PARAMETER * parameters)

    @classmethod
    def from_model(cls, name: str, model: Architecture) -> Size:
        """A model of known sizes. An untied head counts as an embedding too."""
        tables = 1 if model.tied else 2
        without_embeddings = model.parameters - tables * model.vocab * model.embed
        flops = model.flops_per_token()
        shallow = model.resize({**model.sizes, "layer": 1}).flops_per_token()
        count = model.parameters
        return cls(name, count, without_embeddings, flops, model.embed, model.layer, shallow)

    @property
    def is_count(self) -> bool:
        """Whether only the number of parameters is known."""
        return self.embed is None


def compute_source_tokens(parameters: float, flops: float) -> float:
    """G_stack's timing law: the tokens to train a source on before it grows to `parameters`.

    parameters: the target's, without embeddings. flops: the budget of both.
    """
    return 10 ** (PARAMETERS * log10(parameters) + COMPUTE / log10(flops) + CONSTANT)


def find_fitted_budgets(parameters: float) -> tuple[float, float] | None:
    """The lowest and highest FLOPs that the timing law was fitted to at a target's size.

    Interpolated in logarithms between two fitted sizes; None for a size outside of them.
    """
    sizes = sorted(FITTED)
    for small, large in zip(sizes, sizes[1:], strict=False):
        if small <= parameters <= large:
            part = log10(parameters / small) / log10(large / small)
            lowest = _interpolate(FITTED[small][0], FITTED[large][0], part)
            highest = _interpolate(FITTED[small][1], FITTED[large][1], part)
            return lowest, highest
    return None


def _interpolate(begin: float, end: float, part: float) -> float:
    """Between two numbers in logarithms; part: 0 for the first, 1 for the second."""
    return begin * (end / begin) ** part


def recommend_layers(layers: int) -> int:
    """The layers of the source that G_stack recommends for a target of so many."""
    return max(LEAST_LAYERS, round(layers / FACTOR))


def recommend_parameters(parameters: int) -> int:
    """The parameters of the source that G_stack recommends, for a target that is a bare count."""
    return max(1, parameters // FACTOR)


@dataclass(frozen=True)
class Claim:
    """A published saving.

    saved: the share of from-scratch's FLOPs saved at the same loss. counts_source: whether the
    source's FLOPs are subtracted from it.
    """

    work: str
    where: str
    saved: float
    counts_source: bool


@dataclass(frozen=True)
class Growth:
    """A source that grows to a target; `flops` trains both, or the target alone from scratch."""

    target: Size
    source: Size
    flops: float

    @property
    def tokens(self) -> float:
        """The tokens of training from scratch."""
        return self.flops / self.target.flops_per_token

    @property
    def has_count(self) -> bool:
        """Whether one of the two is a bare count."""
        return self.source.is_count or self.target.is_count

    @property
    def widens(self) -> bool:
        """Whether the growth is known to be one in width."""
        return not self.has_count and self.source.embed != self.target.embed

    @property
    def factor(self) -> float:
        """The target's parameters over the source's, without embeddings where both are known."""
        if self.has_count:
            return self.target.parameters / self.source.parameters
        return self.target.without_embeddings / self.source.without_embeddings

    @property
    def source_tokens(self) -> float:
        """The tokens that the timing law gives the source."""
        return compute_source_tokens(self.target.without_embeddings, self.flops)

    @property
    def source_flops(self) -> float:
        return self.source_tokens * self.source.flops_per_token

    @property
    def affordable(self) -> bool:
        """Whether the law's source leaves enough of the budget for the target."""
        return self.source_flops <= AFFORDABLE_SHARE * self.flops

    @property
    def target_flops(self) -> float:
        """What the law's source leaves of the budget."""
        return self.flops - self.source_flops

    @property
    def target_tokens(self) -> float:
        """The tokens that the rest of the budget trains the grown model on."""
        return self.target_flops / self.target.flops_per_token

    def list_deviations(self) -> list[str]:
        """Where this question lies outside the range that the timing law was fitted in."""
        found = self._list_range_deviations()
        if round(self.factor) != FACTOR:
            found.append(f"growth by a factor of {self.factor:.2f}, fitted at {FACTOR}")
        if self.widens:
            found.append(
                f"growth in width (embed {self.source.embed} to {self.target.embed}), "
                "fitted in depth alone"
            )
        return found

    def _list_range_deviations(self) -> list[str]:
        """Deviations in the target's size and in the budget."""
        found = []
        count = self.target.without_embeddings
        budgets = find_fitted_budgets(count)
        if budgets is None:
            found.append(
                f"a target of {count:.3g} parameters without embeddings, "
                f"fitted {min(FITTED):.3g} to {max(FITTED):.3g}"
            )
            where = "at any size"
            low = min(low for low, _ in FITTED.values())
            high = max(high for _, high in FITTED.values())
        else:
            where = "at this size"
            low, high = budgets
        if not low <= self.flops <= high:
            found.append(
                f"a budget of {self.flops:.3g} FLOPs, fitted {low:.2g} to {high:.2g} {where}"
            )
        return found

    def compute_flops_to_same_loss(self, saved: float, counts_source: bool) -> float | None:
        """FLOPs to from-scratch's loss, the source's included, if this saving held here.

        saved: the share (0 to 1) of from-scratch's FLOPs that is saved. counts_source: whether the
        source's FLOPs are already subtracted from `saved`; if not, those that the law asks for are
        added, and None is returned where the law asks for too many.
        """
        remaining = (1 - saved) * self.flops
        if counts_source:
            return remaining
        if not self.affordable:
            return None
        return remaining + self.source_flops

    def compute_flops_of_claim(self, claim: Claim) -> float | None:
        """FLOPs to from-scratch's loss if a published saving held here."""
        return self.compute_flops_to_same_loss(claim.saved, claim.counts_source)

    def compute_flops_of_arm(self, arm: Arm) -> float | None:
        """FLOPs to from-scratch's loss if an arm's measured saving held here; None without one."""
        if arm.saved.mean is None:
            return None
        return self.compute_flops_to_same_loss(arm.saved.mean, counts_source=True)


def convert_speedup(speedup: float) -> float:
    """The share of FLOPs saved by a speedup as G_stack reports it (appendix B.2).

    speedup: FLOPs from scratch / FLOPs with growth - 1, so that 1.0 is half of the compute saved.
    """
    return 1 - 1 / (1 + speedup)


CLAIMS = (
    Claim(
        "Gopher (arXiv 2112.11446, G.3.3)",
        "4.5B to 9B, depth x2: about 40 % less compute",
        0.40,
        False,
    ),
    Claim(GSTACK, "1.1B, depth x4, 100B tokens: 49.1 % speedup", convert_speedup(0.491), True),
    Claim(GSTACK, "7B, depth x4, 300B tokens: 54.6 % speedup", convert_speedup(0.546), True),
)
