"""Plans of growth: axis maps and paddings, resolved, and what follows from them.

A `Plan` is all that growth needs to know: the model before and after, the map of every axis that is
copied, the new size of every axis that is padded, what becomes of the moments, noise.
`growkit.growth.depth` and `growkit.growth.width` make plans from what a user types;
`growkit.entries` records them and reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from growkit.errors import UsageError, did_you_mean, require_type
from growkit.growth.axes import AxisMap
from growkit.growth.choice import Choice
from growkit.growth.head_row import HeadRow
from growkit.growth.separation import RANGE, RMS, parse_noise
from growkit.growth.upcycling import Upcycling
from growkit.growth.vocabulary import FILLS, check_vocabulary
from growkit.models.architecture import Architecture
from growkit.models.fields import Frozen
from growkit.models.notation import Position, Row

# No parameter reads these for all that they do: queries meet keys along head_dim, and probabilities
# sum to 1 along vocab. Copies there are another function whatever their shares.
UNCOPIED = ("head_dim", "vocab")
# What --moments takes; Plan says what each does.
MOMENT_OPTIONS = ("map", "copy", "reset", "nu-only", "first")
# What --rates takes; MUP is explained in `growkit.growth.multipliers`.
KEEP, MUP = RATES = ("keep", "mup")
# Axes on which no fan-in depends.
NO_WIDTH = ("layer", "vocab", "expert")
# 'first' without shares: for averages of normalised steps (see `growkit.growth.tree`), and no
# option of a user's.
FIRST_UNSCALED = "first, unscaled"
# Where a model comes from, for messages about an argument that is none.
MODEL_HINT = "as open_source(path).model or describe_model(table, sizes)"
PLAN_HINT = "as growkit.plan_depth or growkit.plan_width return"


@dataclass(frozen=True)
class Plan:
    """A growth with nothing left open.

    maps: axis -> copies with shares. pads: axis -> new size, see `growkit.growth.padding`. moments:
    'map' (the rule), 'copy' (gathered as they are), 'reset' (zero, and the count too), 'nu-only'
    (mu zero), 'first' (mu and nu by the rule for the first copy of every unit, zero for the other
    copies: SPARKLING's asymmetric reset, arXiv 2602.02472). noise: its standard deviation in units
    of the model's initializer_range, or with the unit 'rms' of the root mean square of each tensor
    that gets it, see `growkit.growth.separation`. notes: what was completed by rule. vocab_fill:
    what new tokens' rows of the embedding hold, 'mean' or 'zero'; see `growkit.growth.vocabulary`.
    vocab_row: their row of the head, where it is not the mean of the old ones.
    experts: what becomes of the gate's choice, where there are more experts. rates: the learning
    rates of the training after it: 'keep' (the factors of exact growth where it is exact) or 'mup'.
    """

    verb: str
    method: str
    model: Architecture
    grown: Architecture
    maps: dict[str, AxisMap]
    pads: dict[str, int] = field(default_factory=dict)
    moments: str = "map"
    noise: float = 0.0
    noise_unit: str = RANGE
    seed: int = 0
    notes: tuple[str, ...] = ()
    vocab_fill: str = "mean"
    vocab_row: HeadRow | None = None
    experts: Choice | None = None
    rates: str = KEEP

    def __post_init__(self) -> None:
        if self.moments not in (*MOMENT_OPTIONS, FIRST_UNSCALED):
            near = did_you_mean(self.moments, MOMENT_OPTIONS)
            raise UsageError(
                f"--moments is one of {', '.join(MOMENT_OPTIONS)}, got {self.moments!r}{near}"
            )
        if self.vocab_fill not in FILLS:
            near = did_you_mean(self.vocab_fill, FILLS)
            raise UsageError(
                f"--vocab-fill is one of {', '.join(FILLS)}, got {self.vocab_fill!r}{near}"
            )
        if self.rates not in RATES:
            near = did_you_mean(self.rates, RATES)
            raise UsageError(f"--rates is one of {', '.join(RATES)}, got {self.rates!r}{near}")
        if not 0 <= self.noise < float("inf"):
            raise UsageError(f"--noise is a number of at least 0, got {self.noise}")

    @cached_property
    def preserved(self) -> bool:
        """Whether the grown model computes the source's function: the old tokens' logits.

        New tokens raise the loss of old ones all the same, see `bound_shift`.
        """
        uniform = self.model.table.uniform_axes
        layers = self.maps.get("layer")
        inserts = layers is not None and bool((layers.share == 0.0).any())
        # Inserted layers add nothing only where something that writes the stream is silenced.
        if inserts and not any(row.writes_stream for row in self.model.table.rows):
            return False
        if "expert" in self.maps and not self._keeps_choice():
            return False
        return all(
            preserves(axis, axis_map, axis in uniform) for axis, axis_map in self.maps.items()
        )

    def _keeps_choice(self) -> bool:
        """Whether a gate chooses all copies of the experts that it chose."""
        if not self.model.family.experts:
            return True
        experts = self.maps["expert"]
        # Groups of experts are runs of neighbours: copies in other places would be other groups.
        tiled = np.array_equal(experts.index, np.arange(len(experts)) % experts.source)
        even = tiled and preserves("expert", experts, uniform=True)
        chosen = self.experts is not None and self.experts.exact
        # Noise sets the scores of copies apart.
        upcycling = self.upcycling
        return even and chosen and not (self.noise and not (upcycling and upcycling.noisy))

    @property
    def upcycling(self) -> Upcycling | None:
        """How a dense model becomes a mixture, None for another growth."""
        return self.experts.upcycling if self.experts else None

    def at(self, row: Row, position: Position) -> Plan:
        """The plan for one new unit of a row's stacked axes: experts may be copied by layer."""
        by_layer = self.experts is not None and bool(self.experts.by_layer)
        if not by_layer or not position or row.stacked[0].name != "layer":
            return self
        assert self.experts is not None
        layer = position[0]
        if "layer" in self.maps:
            layer = int(self.maps["layer"].index[layer])
        experts = self.experts.find_map(layer, self.model.sizes["expert"])
        return replace(self, maps={**self.maps, "expert": experts})

    @property
    def continues(self) -> bool:
        """Whether training goes on exactly as the small model's would, given the multipliers.

        That is so for width by copies alone.
        """
        if self.upcycling:
            return False
        copied = any(len(axis_map) > axis_map.source for axis_map in self.maps.values())
        exact = self.preserved and not self.pads and self.moments == "map" and not self.noise
        # A copy with a share of 0 would have an eps of 0: Adam divides 0 by 0.
        exact = exact and all((axis_map.share > 0.0).all() for axis_map in self.maps.values())
        return copied and exact and "layer" not in self.maps

    @property
    def keeps_first(self) -> bool:
        """Whether moments are kept for the first copy of every unit alone."""
        return self.moments in ("first", FIRST_UNSCALED)

    @property
    def copied_widths(self) -> dict[str, AxisMap]:
        """The maps of axes other than layer that copy some unit more than once."""
        return {
            axis: axis_map
            for axis, axis_map in self.maps.items()
            if axis != "layer" and (axis_map.copies > 1).any()
        }

    @property
    def grown_widths(self) -> tuple[str, ...]:
        """The axes that grow and that a fan-in may depend on."""
        after = self.grown.sizes
        return tuple(
            axis
            for axis, size in self.model.sizes.items()
            if after[axis] != size and axis not in NO_WIDTH
        )

    @property
    def tied_copies(self) -> tuple[str, ...]:
        """The axes whose copies stay equal for ever: equal copies have equal gradients.

        Noise and uneven shares separate copies, and so do the random new columns of a padding that
        they read: those of embed separate all, those of head_dim all but the units of mlp.
        """
        if self.noise or "embed" in self.pads:
            return ()
        if self.upcycling and self.upcycling.router == "random":
            return ()
        separated = set(self.maps) - {"mlp"} if self.pads.keys() - {"vocab"} else set()
        return tuple(
            axis
            for axis, axis_map in self.copied_widths.items()
            if axis not in separated and _has_equal_shares(axis_map)
        )


def set_options(
    plan: Plan,
    moments: str = "map",
    noise: float | str = 0.0,
    seed: int = 0,
    rates: str = KEEP,
) -> Plan:
    """The plan with the options that all growing verbs have.

    noise: a number, or 0.5rms. Raises UsageError for values that make no sense for it, TypeError
    for what is not a plan.
    """
    require_type("plan", plan, Plan, PLAN_HINT)
    require_type("noise", noise, (float, int, str), "as 0.5 or '0.5rms'")
    size, unit = parse_noise(noise)
    plan = replace(plan, moments=moments, noise=size, noise_unit=unit, seed=seed, rates=rates)
    if rates == MUP and not plan.grown_widths:
        raise UsageError(
            f"--rates {MUP} is for growth in width, and this growth makes none; leave it out"
        )
    if plan.upcycling and plan.noise and unit == RMS:
        raise UsageError(
            "the router of a new mixture has no size that noise could be measured by: give --noise "
            "as a number, in units of initializer_range"
        )
    if plan.upcycling and plan.keeps_first:
        raise UsageError(
            "--moments first is for copies beside an original, and the experts made of a dense mlp "
            "are all alike; leave it out, or give --moments reset"
        )
    if plan.noise and not plan.copied_widths:
        raise UsageError(
            "--noise separates the copies of units in width, and this growth makes none; leave it "
            "out"
        )
    if plan.grown.sizes == plan.model.sizes and plan.preserved:
        raise UsageError(
            "nothing grows: the map gives every layer of the source once, in its order"
        )
    return plan


def build_plan(
    verb: str,
    method: str,
    model: Architecture,
    maps: Mapping[str, AxisMap],
    pads: Mapping[str, int] | None = None,
    **options: Any,
) -> Plan:
    """The plan of maps and pads for a model, the grown model worked out from them.

    Raises UsageError for what the family cannot do.
    """
    padded = dict(pads or {})
    _check_possible(model, maps, padded)
    if options.get("experts") and "expert" in maps:
        options["experts"].check(model.layer, maps["expert"])
    # Axes that nobody named keep their size.
    sizes = dict(model.sizes)
    sizes |= {axis: len(axis_map) for axis, axis_map in maps.items()}
    sizes |= padded
    if model.coupled and "embed" not in maps and "embed" not in padded:
        # Where embed is heads x head_dim, more of either makes it wider.
        sizes["embed"] = sizes[model.heads] * sizes.get("group", 1) * sizes["head_dim"]
    eps = None
    if "embed" in padded:
        check_paddable(model)
        # The variance of a padded residual stream shrinks by d/d', and eps with it.
        eps = model.norm_eps * model.embed / padded["embed"]
    grown = model.resize(sizes, eps)
    if "layer" in maps:
        grown = replace(grown, layers=model.map_layers(maps["layer"].index.tolist()))
    choice = options.get("experts")
    if choice is not None:
        stated = {name: value for name, value in choice.fields.items() if name in grown.facts}
        grown = replace(grown, facts=Frozen({**grown.facts, **stated}))
    return Plan(verb, method, model, grown, dict(maps), padded, **options)


def _check_possible(
    model: Architecture, maps: Mapping[str, AxisMap], pads: Mapping[str, int]
) -> None:
    """Raise UsageError for layers that add nothing and for padding where the family has neither."""
    family = model.family
    if family.no_identity and "layer" in maps and (maps["layer"].share == 0.0).any():
        raise UsageError(
            f"a {family.title} model takes no layers that add nothing: {family.no_identity}; copy "
            f"layers instead"
        )
    if "vocab" in family.frozen and "vocab" in maps:
        raise UsageError(f"vocab of a {family.title} model is not copied: {family.frozen['vocab']}")
    if "vocab" in pads:
        check_vocabulary(model)
    if family.unpadded and "embed" in pads:
        raise UsageError(
            f"embed of a {family.title} model grows by whole copies only, not to {pads['embed']}: "
            f"{family.unpadded}; the nearest is {_nearest_multiple(model.embed, pads['embed'])}"
        )


def _nearest_multiple(size: int, asked: int) -> int:
    """The whole multiple of a size, two at least, that is nearest to what was asked."""
    return size * max(2, (asked + size // 2) // size)


def check_paddable(model: Architecture) -> None:
    """Raise UsageError where padding of embed would change the function."""
    for row in model.table.other_norms:
        raise UsageError(
            f"embed cannot be padded: {row.name} averages over {', '.join(row.averages)} and "
            f"shares its eps with the norms over embed, whose eps padding changes; copies "
            f"(a whole multiple of {model.embed}) are exact"
        )
    for row in model.table.rows:
        if model.norm == "layer" and row.role == "norm" and row.writes_stream:
            raise UsageError(
                f"embed cannot be padded: {row.name} writes into the residual stream, and no fill "
                f"of its new entries is the mean of what it writes; copies (a whole multiple of "
                f"{model.embed}) are exact"
            )


def preserves(axis: str, axis_map: AxisMap, uniform: bool) -> bool:
    """Whether a map of this axis keeps the function.

    layer: one copy of each source with share 1, in the sources' order, all others 0. uniform:
    whether a norm averages over the axis; then every unit needs as many copies, with equal shares.
    head_dim and vocab: never. Any other axis: shares that sum to 1 for each source.
    """
    if axis in UNCOPIED:
        return False
    if axis == "layer":
        kept = axis_map.index[axis_map.share == 1.0]
        only_whole = bool(np.isin(axis_map.share, (0.0, 1.0)).all())
        return only_whole and np.array_equal(kept, np.arange(axis_map.source))
    if uniform:
        equal = 1.0 / axis_map.copies[axis_map.index]
        as_many = len(set(axis_map.copies.tolist())) == 1
        return as_many and bool(np.allclose(axis_map.share, equal, rtol=0, atol=1e-12))
    return axis_map.preserves_sums


def _has_equal_shares(axis_map: AxisMap) -> bool:
    return bool(np.allclose(axis_map.share, 1.0 / axis_map.copies[axis_map.index], rtol=1e-9))


def combine_plans(verb: str, plans: list[Plan], model: Architecture) -> Plan:
    """One plan that does what several do, each on axes of its own.

    Raises UsageError when two want the same axis, TypeError for what is not a list of plans.
    """
    require_type("verb", verb, str, "as 'grow', which a lineage names it by")
    require_type("plans", plans, (list, tuple), "of plans, each of axes of its own")
    require_type("model", model, Architecture, MODEL_HINT)
    for plan in plans:
        require_type("a plan of plans", plan, Plan, PLAN_HINT)
    maps: dict[str, AxisMap] = {}
    pads: dict[str, int] = {}
    for plan in plans:
        taken = sorted((plan.maps.keys() | plan.pads.keys()) & (maps.keys() | pads.keys()))
        if taken:
            raise UsageError(f"two growths of the axis {taken[0]!r} at once; grow twice instead")
        maps |= plan.maps
        pads |= plan.pads
    # The words of each part, in the order in which they were asked for.
    method = "; ".join(plan.method for plan in plans)
    notes = tuple(note for plan in plans for note in plan.notes)
    fill = next((plan.vocab_fill for plan in plans if "vocab" in plan.pads), "mean")
    experts = next((plan.experts for plan in plans if plan.experts), None)
    combined = build_plan(verb, method, model, maps, pads, vocab_fill=fill, experts=experts)
    return replace(combined, notes=notes)
