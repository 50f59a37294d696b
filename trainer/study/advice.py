"""What published work says of growing: when, from which size, and what it saved. Arithmetic on sizes and budgets.

Knows the laws, each with its source and the range it was fitted in, and the savings that were reported. Leaves what a
size is to the axis tables, measurements of one's own to `trainer.study.evidence`, and words to the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log10

GSTACK = "G_stack (arXiv 2405.15319)"
# Equation 2 there: log10 d = PARAMETERS log10 N + COMPUTE / log10 C + CONSTANT. d: tokens to train the source on;
# N: the target's parameters without embeddings; C: training FLOPs, the source's and the grown model's together.
PARAMETERS, COMPUTE, CONSTANT = 0.88, 163.27, -5.74
# What it was fitted to, its figure 8: targets of so many parameters, each at budgets between these FLOPs.
FITTED = {410e6: (0.8e20, 2.2e20), 1.1e9: (2e20, 7e20), 3e9: (4e20, 12e20)}
# Section 4.2 there: all of them grown by this factor in parameters without embeddings, that is in layers; the best
# factor lay between these two.
FACTOR, FACTORS = 4, (2, 4)
# growkit's own limit, no part of the law: a source that takes more of the budget leaves growth nothing to save.
LARGEST_SHARE = 0.5


@dataclass(frozen=True)
class Size:
    """A model by what the laws ask of it. flops_per_token: of training; embed is None where only a count is known."""

    name: str
    parameters: int
    without_embeddings: int
    flops_per_token: float
    embed: int | None = None

    @classmethod
    def from_count(cls, name: str, parameters: int) -> Size:
        """A bare count of parameters: 6 FLOPs for each of them and token, and none of them taken for an embedding's."""
        return cls(name, parameters, parameters, 6.0 * parameters)


def compute_source_tokens(parameters: float, flops: float) -> float:
    """G_stack's timing law: the tokens to train a source on before it grows to `parameters`, at a budget of `flops`."""
    return 10 ** (PARAMETERS * log10(parameters) + COMPUTE / log10(flops) + CONSTANT)


def find_fitted_budgets(parameters: float) -> tuple[float, float] | None:
    """The FLOPs between which the timing law was fitted at a target's size, None beyond the sizes it was fitted to.

    Between two of its sizes the limits are interpolated, in logarithms.
    """
    sizes = sorted(FITTED)
    for small, large in zip(sizes, sizes[1:], strict=False):
        if small <= parameters <= large:
            part = log10(parameters / small) / log10(large / small)
            low, high = (
                a * (b / a) ** part for a, b in zip(FITTED[small], FITTED[large], strict=True)
            )
            return low, high
    return None


@dataclass(frozen=True)
class Growth:
    """A source that grows to a target, both trained within `flops`, what the target takes from scratch."""

    target: Size
    source: Size
    flops: float

    @property
    def tokens(self) -> float:
        """From scratch."""
        return self.flops / self.target.flops_per_token

    @property
    def factor(self) -> float:
        """By which the parameters without embeddings grow; all parameters where one of the sizes is a bare count."""
        if None in (self.source.embed, self.target.embed):
            return self.target.parameters / self.source.parameters
        return self.target.without_embeddings / self.source.without_embeddings

    @property
    def source_tokens(self) -> float:
        return compute_source_tokens(self.target.without_embeddings, self.flops)

    @property
    def source_flops(self) -> float:
        return self.source_tokens * self.source.flops_per_token

    @property
    def affordable(self) -> bool:
        """Whether the law's source leaves enough of the budget for the target."""
        return self.source_flops <= LARGEST_SHARE * self.flops

    @property
    def target_tokens(self) -> float:
        """What the budget leaves the grown model."""
        return (self.flops - self.source_flops) / self.target.flops_per_token

    def list_deviations(self) -> list[str]:
        """In what this question lies outside the range the timing law was fitted in; none when it lies inside."""
        count, sizes = self.target.without_embeddings, sorted(FITTED)
        budgets = find_fitted_budgets(count)
        found = []
        if budgets is None:
            found.append(
                f"a target of {count:.3g} parameters without embeddings, fitted {sizes[0]:.3g} to {sizes[-1]:.3g}"
            )
        low, high = budgets or (min(FITTED.values())[0], max(FITTED.values())[1])
        if not low <= self.flops <= high:
            where = "at this size" if budgets else "at any size"
            found.append(
                f"a budget of {self.flops:.3g} FLOPs, fitted {low:.2g} to {high:.2g} {where}"
            )
        if round(self.factor) != FACTOR:
            found.append(f"growth by a factor of {self.factor:.2f}, fitted at {FACTOR}")
        if self.source.embed != self.target.embed and None not in (
            self.source.embed,
            self.target.embed,
        ):
            found.append(
                f"growth in width (embed {self.source.embed} to {self.target.embed}), fitted in depth alone"
            )
        return found

    def compute_flops_to_same_loss(self, saved: float, counts_source: bool) -> float | None:
        """FLOPs to from-scratch's loss, the source's included, if `saved` (0 to 1) of from-scratch's are saved here.

        counts_source: whether `saved` has the source's in it; if not, the source that the law asks for is added, None
        where it asks too much.
        """
        if counts_source:
            return (1 - saved) * self.flops
        return (1 - saved) * self.flops + self.source_flops if self.affordable else None


@dataclass(frozen=True)
class Claim:
    """A saving that others report, as a part of from-scratch's FLOPs to the same loss; the source's counted or not."""

    work: str
    where: str
    saved: float
    counts_source: bool


def convert_speedup(speedup: float) -> float:
    """G_stack reports FLOPs from scratch / FLOPs with growth - 1 (appendix B.2): 1.0 is half of the compute saved."""
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
