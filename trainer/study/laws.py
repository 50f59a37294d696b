"""Four published findings on growth, each asked the same: when, from what, by which copies.

    timing     G_stack: how many tokens the source is trained on
    late       Bu: a source of zero or one layer, grown once, late, at a constant rate
    boundary   Wang: stack before a source has seen 20 tokens a parameter, replicate in place after
    factor     Mallik: how much larger the target may be

They were measured on other models, schedules and budgets, and they contradict each other;
`find_disagreements` says where. docs/when.md says what was read of each work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from growkit.quantity import format_count
from trainer.study import advice
from trainer.study.advice import GSTACK, Growth

BU = "Bu (arXiv 2511.04981)"
WANG = "Wang (arXiv 2510.08008)"
MALLIK = "Mallik (arXiv 2605.13405)"
# Bu: when to grow, as a share of the steps; what that saves; by how much the loss ended above
# from-scratch's at most (124M; 0.2 % at 7B); the parameters of the models it was measured on.
LATE_SHARE, LATE_SAVING = 0.8, 0.8
LATE_GAP = 0.005
LATE_SIZES = 124e6, 7e9
# Wang: tokens a parameter of the source (the compute that is optimal from scratch, by Chinchilla);
# the depth grew by two.
BOUNDARY, BOUNDARY_FACTOR = 20.0, 2
# Mallik: the factor in parameters that paid most reliably, and the budget, in tokens a parameter of
# the target, up to which gains were largest.
RELIABLE_FACTOR, RELIABLE_BUDGET = 2.0, 20.0
# A factor that is nearer to 2 than this is taken for 2.
NEARLY = 0.25


@dataclass(frozen=True)
class Finding:
    """One law's answer.

    name: timing, late, boundary or factor. says: a sentence on this question. measured: on what.
    outside: where this question lies outside of that. figures: the numbers in `says`, None where
    one is not known.
    """

    name: str
    work: str
    says: str
    measured: str
    outside: list[str] = field(default_factory=list)
    figures: dict[str, float | str | None] = field(default_factory=dict)


def list_findings(growth: Growth) -> list[Finding]:
    """What the four laws say of a growth."""
    return [
        describe_timing(growth),
        describe_late(growth),
        describe_boundary(growth),
        describe_factor(growth),
    ]


def describe_timing(growth: Growth) -> Finding:
    """G_stack's timing law."""
    tokens, share = growth.source_tokens, growth.source_flops / growth.flops
    of_budget = f"{share:.1%} of" if share < 1 else f"{share:.3g} times"
    asked = f"{format_count(tokens)} tokens ({of_budget} the budget)"
    says = f"Grow once the source has seen {asked}, by a factor of {advice.FACTOR}, by stacking."
    if not growth.affordable:
        says = (
            f"No advice: it asks for a source of {asked}, which leaves too little for the target."
        )
    if growth.source.tokens is not None:
        says += f" The source has seen {format_count(growth.source.tokens)}."
    least, most = format_count(min(advice.FITTED)), format_count(max(advice.FITTED))
    return Finding(
        "timing",
        GSTACK,
        says,
        f"targets of {least} to {most}, depth x{advice.FACTOR}, 0.8e20 to 12e20 FLOPs",
        growth.list_deviations(),
        {"source_tokens": tokens, "share_of_flops": share, "factor": advice.FACTOR},
    )


def describe_late(growth: Growth) -> Finding:
    """Bu's late growth from a source of one layer."""
    tokens = LATE_SHARE * growth.tokens
    flops = compute_late_flops(growth)
    cost = "about a fifth of from-scratch's FLOPs (reported)"
    if flops is not None:
        cost = f"{flops / growth.flops:.0%} of from-scratch's FLOPs from one layer"
    outside = []
    low, high = LATE_SIZES
    if not low <= growth.target.parameters <= high:
        outside.append(
            f"a target of {format_count(growth.target.parameters)}, measured "
            f"{format_count(low)} to {format_count(high)}"
        )
    layers = growth.source.layers
    if layers is not None and layers > 1:
        outside.append(f"a source of {layers} layers, measured 0 and 1 (more were worse)")
    if growth.widens:
        outside.append("growth in width, measured in depth alone")
    return Finding(
        "late",
        BU,
        f"Train zero or one layer for {format_count(tokens)} tokens ({LATE_SHARE:.0%} of the "
        f"steps) at a constant rate, then grow once to all layers, go on at that rate, and decay "
        f"at the end: {cost}, for a loss up to {LATE_GAP:.1%} above from-scratch's. Under cosine "
        "it fails past half of the steps.",
        "GPT-2 of 124M and 7B, Llama 3 of 0.25B to 2B at 50 tokens a parameter; wsd, mostly Muon",
        outside,
        {"source_tokens": tokens, "share_of_steps": LATE_SHARE, "flops": flops},
    )


def compute_late_flops(growth: Growth) -> float | None:
    """FLOPs of late growth from one layer, the source's included, over as many tokens as from
    scratch; None where only the target's number of parameters is known.
    """
    shallow = growth.target.one_layer
    if shallow is None:
        return None
    late = LATE_SHARE * shallow + (1 - LATE_SHARE) * growth.target.flops_per_token
    return growth.tokens * late


def count_seen(growth: Growth) -> float | None:
    """The tokens that the source has seen; where that is not known, those of the timing law.

    None where that law has no advice either.
    """
    if growth.source.tokens is not None:
        return growth.source.tokens
    return growth.source_tokens if growth.affordable else None


def compute_ratio(growth: Growth) -> float | None:
    """Tokens a parameter of the source, see `count_seen`."""
    seen = count_seen(growth)
    return None if seen is None else seen / growth.source.parameters


def describe_boundary(growth: Growth) -> Finding:
    """Wang's boundary between stacking and replicating in place."""
    seen, each = count_seen(growth), compute_ratio(growth)
    method = None
    border = format_count(BOUNDARY * growth.source.parameters)
    says = f"Stack before the source has seen {border} tokens, replicate in place after."
    if seen is not None and each is not None:
        past = each > BOUNDARY
        method = "replicate" if past else "stack"
        by = " by the timing law" if growth.source.tokens is None else ""
        says = (
            f"{method.capitalize()} (depth --method {method}): the source has seen "
            f"{format_count(seen)} tokens{by}, {each:.3g} a parameter, "
            f"{'past' if past else 'below'} {BOUNDARY:g}."
        )
    outside = []
    if abs(growth.factor - BOUNDARY_FACTOR) > NEARLY:
        outside.append(f"growth by {growth.factor:.3g}, measured {BOUNDARY_FACTOR}")
    if growth.widens:
        outside.append("growth in width; the boundary is one of depth")
    return Finding(
        "boundary",
        WANG,
        says,
        "mixtures of experts, 3B to 6B; N of activated parameters; source not counted",
        outside,
        {"source_tokens": seen, "tokens_a_parameter": each, "method": method},
    )


def describe_factor(growth: Growth) -> Finding:
    """Mallik's bound on the factor."""
    factor = growth.target.parameters / growth.source.parameters
    each = growth.tokens / growth.target.parameters
    if factor > RELIABLE_FACTOR + NEARLY:
        verdict = (
            f"above {RELIABLE_FACTOR:g}, the most reliable; beyond some bound scratch is better"
        )
    elif factor < RELIABLE_FACTOR - NEARLY:
        verdict = f"below {RELIABLE_FACTOR:g}, the most reliable"
    else:
        verdict = "the most reliable"
    gains = "gains shrink beyond" if each > RELIABLE_BUDGET else "gains are largest below"
    return Finding(
        "factor",
        MALLIK,
        f"Growth by {factor:.3g} in parameters: {verdict}. The budget is {each:.3g} tokens a "
        f"parameter of the target: {gains} {RELIABLE_BUDGET:g}.",
        "dense language models and MLPs; the abstract gives no number for the bound",
        [],
        {"factor": factor, "tokens_a_parameter": each, "bound": None},
    )


def find_disagreements(growth: Growth) -> Iterator[str]:
    """Where the four laws contradict each other on this question, one sentence each."""
    yield (
        "How small a source: G_stack a fourth of the layers, and one layer was worse than from "
        "scratch; Bu one layer or none, and two or more were worse; Mallik half of the parameters."
    )
    early, late = growth.source_tokens, LATE_SHARE * growth.tokens
    gstack = (
        f"after {format_count(early)} tokens, {early / growth.tokens:.0%} of those from scratch"
    )
    if not growth.affordable:
        gstack = "has no advice for so small a budget"
    yield (
        f"When: G_stack {gstack}; Bu after {format_count(late)}, {LATE_SHARE:.0%}, and under wsd "
        "alone; Wang the later the better, its source's compute not counted."
    )
    each = compute_ratio(growth)
    if each is not None and each > BOUNDARY:
        yield (
            f"Which copies: G_stack stacks; Wang replicates in place, as the source has {each:.3g} "
            "tokens a parameter. From one layer (Bu) both are the same."
        )
    budget = growth.tokens / growth.target.parameters
    if budget > RELIABLE_BUDGET:
        yield (
            f"How much: Bu saves about {LATE_SAVING:.0%} at 50 to 100 tokens a parameter; Mallik's "
            f"gains shrink past {RELIABLE_BUDGET:g}, and this budget has {budget:.3g}."
        )


def find_agreements(growth: Growth) -> Iterator[str]:
    """Where laws that could contradict each other do not, one sentence each."""
    each = compute_ratio(growth)
    if each is not None and each <= BOUNDARY:
        yield (
            f"G_stack and Wang both stack: the source has {each:.3g} tokens a parameter, below "
            f"{BOUNDARY:g}."
        )
