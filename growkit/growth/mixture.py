"""The plan that makes a mixture of experts of a dense model; see `growkit.growth.upcycling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growkit.errors import UsageError, did_you_mean, require_type
from growkit.growth.axes import tile
from growkit.growth.choice import Choice
from growkit.growth.plan import MODEL_HINT, Plan, build_plan
from growkit.growth.upcycling import MOST, ROUTERS, Upcycling
from growkit.models import find_family, list_upcycled
from growkit.models.architecture import Architecture
from growkit.models.family import Family
from growkit.models.upcycling import list_shared

GATES = ("normalised", "softmax")


def plan_mixture(
    model: Architecture,
    config: Mapping[str, Any],
    experts: int,
    top: int | None = None,
    to: str | None = None,
    *,
    every: int = 1,
    granularity: int = 1,
    shared: bool = False,
    router: str | None = None,
    gate: str = "normalised",
    exact: bool = False,
) -> Plan:
    """The plan that makes a mixture of experts of a dense model.

    config: the model's config.json. experts: copies of the mlp. top: experts a token; None for two
    copies. to: the mixture's model type; None for the first that is known for the model's. every,
    granularity, shared, router: as `Upcycling` has them; a router of None is random
    where that is exact, else zero. gate: 'normalised', or 'softmax' over all experts, so that the
    weights of the chosen sum to less than 1. exact: refuse another function. Raises UsageError.
    """
    require_type("model", model, Architecture, MODEL_HINT)
    family = select_mixture(model, to)
    _check_word("--gate", gate, GATES)
    normalised = gate == "normalised"
    router = _choose_router(router, normalised)
    _check_shared(family, shared)
    chosen = _count_chosen(experts, top, granularity)
    layout = (every, granularity, shared, normalised, router)
    upcycling = Upcycling(model.kind, family.kind, *layout, copies=experts, chosen=chosen)
    return _build(model, config, family, upcycling, exact)


def _build(
    model: Architecture,
    config: Mapping[str, Any],
    family: Family,
    upcycling: Upcycling,
    exact: bool,
) -> Plan:
    """The plan of a mixture that is settled. Raises UsageError for one that must be exact."""
    if exact and not upcycling.exact:
        raise UsageError(f"--exact refuses this mixture: {upcycling.describe_gap()}")
    upcycled = upcycling.express(model, config)
    parts = upcycling.granularity
    count, top = upcycling.copies * parts, upcycling.chosen * parts
    stated = family.experts
    fields = {stated["top"]: top}
    if "also" in stated:
        fields[stated["also"]] = count
    choice = Choice((parts, top), upcycling.exact, 0, fields, upcycling)
    words = describe_mixture(model, family, upcycling, len(upcycled.sparse_layers))
    maps = {"expert": tile(parts, count)}
    return build_plan("experts", words, upcycled.model, maps, experts=choice)


def describe_mixture(model: Architecture, family: Family, upcycling: Upcycling, layers: int) -> str:
    """What becomes of the dense model, in words."""
    parts = upcycling.granularity
    count, top = upcycling.copies * parts, upcycling.chosen * parts
    size = "" if parts == 1 else f" of 1/{parts} of its units"
    where = "" if upcycling.every == 1 else f" in {layers} of {model.layer} layers"
    words = (
        f"{model.family.title} -> {family.title}: the mlp as {count} experts{size}, {top} of them "
        f"a token{where}, router {upcycling.router}"
    )
    if list_shared(family):
        words += ", the shared expert is the mlp" if upcycling.shared else ""
        words += "" if upcycling.shared else ", the shared expert adds nothing yet"
    if upcycling.scale != 1.0:
        words += f", down-projections x {upcycling.scale:.4g}"
    return words


def select_mixture(model: Architecture, to: str | None) -> Family:
    """The family of the mixture. Raises UsageError for a type that does not fit."""
    found = list_upcycled(model.kind)
    if "expert" in model.sizes:
        count = model.sizes["expert"]
        raise UsageError(
            f"the source is a {model.family.title} model, a mixture of {count} experts already; "
            f"`growkit experts {count}:{2 * count}` gives it more of them"
        )
    if to is None:
        if not found:
            raise UsageError(
                f"a {model.family.title} model becomes no mixture that growkit knows: "
                f"--from-dense takes {', '.join(list_upcycled())}"
            )
        to = found[0]
    family = find_family(to)
    if family is None or to not in found:
        near = did_you_mean(to, found)
        why = f": {family.upcycling['why']}" if family and "why" in family.upcycling else ""
        known = ", ".join(found) or "no mixture"
        raise UsageError(
            f"a {model.family.title} model becomes {known}, and --to is {to!r}{near}{why}"
        )
    return family


def _count_chosen(experts: int, top: int | None, granularity: int) -> int:
    """How many copies of the mlp a token goes through. Raises UsageError."""
    if granularity < 1:
        raise UsageError(f"--granularity is at least 1, got {granularity}")
    count = experts * granularity
    if experts < 2 or count > MOST:
        raise UsageError(
            f"a mixture has from 2 to {MOST} experts, and this one would have {count}; "
            f"--from-dense 8 makes 8"
        )
    top = min(2, experts) * granularity if top is None else top
    if not 0 < top <= count:
        raise UsageError(
            f"--top asks for {top} experts a token, and there are {count}; between 1 and {count} "
            f"work"
        )
    if top % granularity:
        low = max(granularity, top - top % granularity)
        raise UsageError(
            f"--top {top} is not a multiple of --granularity {granularity}, so a token would miss "
            f"parts of the mlp; --top {low} works"
        )
    return top // granularity


def _choose_router(router: str | None, normalised: bool) -> str:
    """How the router's rows begin; random where that is exact, unless told. Raises UsageError."""
    if router is None:
        return "random" if normalised else "zero"
    _check_word("--router", router, ROUTERS)
    return router


def _check_shared(family: Family, shared: bool) -> None:
    """Raise UsageError for a shared expert that the type does not have."""
    if shared and not list_shared(family):
        raise UsageError(
            f"--shared is for types that have a shared expert, as qwen2_moe, and {family.kind} has "
            f"none"
        )


def _check_word(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise UsageError for a value that is none of those known."""
    if value not in known:
        near = did_you_mean(value, known)
        raise UsageError(f"{option} is one of {', '.join(known)}, got {value!r}{near}")
