"""How a dense model becomes a mixture of experts, and what keeps its function.

A dense model is a mixture with one expert, which every token goes through. So it grows as mixtures
do: its expert is copied E times. Where the weights of the chosen experts sum to 1, k equal experts
give what one gives, whichever they are (sparse upcycling, arXiv 2212.05055).

With a granularity G the mlp is G experts of 1/G of its units, all of them chosen, and
down-projections are multiplied by G, because each has 1/G of the weight. Copies of all G parts have
equal rows of the router and are chosen together ("virtual groups", arXiv 2410.07524).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from growkit import forms
from growkit.errors import UsageError
from growkit.models import find_family
from growkit.models.architecture import Architecture
from growkit.models.upcycling import Layout, Upcycled, express_dense

ROUTERS = ("random", "zero")
MOST = 1 << 16
COUNTS = ("every", "granularity", "copies", "chosen")
# A shared expert is weighted by a sigmoid, 1/2 at zero: with the experts it makes 3/2 of the mlp,
# so down-projections take 2/3.
SHARED = 2 / 3


@dataclass(frozen=True)
class Upcycling:
    """How a dense model became a mixture; a lineage records it.

    dense, mixture: model types. every: each how many-th layer has experts. granularity: into how
    many experts the mlp is divided. shared: whether the shared expert is the mlp too; else it adds
    nothing yet. normalised: whether the weights of the chosen sum to 1. router: how its rows begin,
    one of ROUTERS. copies: experts for each part of the mlp; chosen: of these a token.
    """

    dense: str
    mixture: str
    every: int
    granularity: int
    shared: bool
    normalised: bool
    router: str
    copies: int
    chosen: int

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Upcycling:
        """From its JSON object. Raises KeyError and ValueError for what is none."""
        known: dict[str, Any] = {name: forms.take_whole(stored, name, MOST + 1) for name in COUNTS}
        if not all(known.values()):
            raise ValueError(f"{', '.join(COUNTS)} are at least 1")
        known |= {name: forms.take_flag(stored, name) for name in ("shared", "normalised")}
        known |= {name: forms.take_text(stored, name) for name in ("dense", "mixture", "router")}
        made = cls(**known)
        if forms.take_number(stored, "scale") != made.scale:
            raise ValueError(f"scale is {made.scale} by all else that is stated")
        return made

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"scale": self.scale}

    @property
    def scale(self) -> float:
        """What the experts' down-projections are multiplied by."""
        # A softmax over all experts gives each chosen one 1/copies, and not 1/chosen.
        weight = 1.0 if self.normalised else self.copies / self.chosen
        return self.part * self.granularity * weight

    def express(self, model: Architecture, config: Mapping[str, Any]) -> Upcycled:
        """The dense model as the mixture whose experts are copied.

        Raises UsageError for a model that is not of the type.
        """
        family = find_family(self.mixture)
        if family is None or model.kind != self.dense:
            raise UsageError(
                f"the mixture was made of a {self.dense!r} model, and this is a {model.kind!r} "
                f"model"
            )
        layout = Layout(self.granularity, self.every, self.normalised)
        return express_dense(model, config, family, layout)

    @property
    def part(self) -> float:
        """The experts' part of what the dense mlp gives; the shared expert has the rest."""
        return SHARED if self.shared else 1.0

    @property
    def splits_tokens(self) -> bool:
        """Whether some copies are not chosen."""
        return self.chosen < self.copies

    @property
    def noisy(self) -> bool:
        """Whether noise on the router's rows leaves the function as it is.

        Any chosen experts do where all are equal and their weights sum to 1.
        """
        return self.granularity == 1 and (self.normalised or not self.splits_tokens)

    @property
    def exact(self) -> bool:
        """Whether the mixture computes the dense model's function."""
        whole = self.granularity == 1 or self.router == "random" or not self.splits_tokens
        equal = self.normalised or self.router == "zero" or not self.splits_tokens
        return whole and equal

    def describe_gap(self) -> str:
        """Why the function is another one, in words."""
        if not self.normalised and self.router == "random":
            share = self.chosen / self.copies
            return (
                f"not preserved: the weights of the chosen experts do not sum to 1 but to about "
                f"{share:.3g}, more or less by the token; down-projections are multiplied by "
                f"{self.scale:.3g} for the mean, and --router zero makes it exact"
            )
        return (
            f"not preserved: with equal rows of the router, {self.chosen * self.granularity} "
            f"experts a token need not be all {self.granularity} parts of the mlp; --router random "
            f"keeps the parts together"
        )
