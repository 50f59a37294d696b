"""What a study of one's own says, beside the published laws: sentences of one figure each.

Only figures that stand in its results.json. Arms are compared where they differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainer.study.evidence import Arm, Measurement, Study
from trainer.study.laws import BOUNDARY


def describe_study(study: Study) -> Iterator[str]:
    """What saved most, which copies were better, and how growth from one layer did."""
    grown = [arm for arm in study.arms if not arm.control and arm.loss.mean is not None]
    if not grown:
        yield "No arm is finished yet."
        return
    yield _describe_best(study, grown)
    for stacked, replicated in _find_pairs(grown):
        yield _compare_copies(stacked, replicated)
    shallow = [arm for arm in grown if arm.source_layers is not None and arm.source_layers <= 1]
    others = [arm for arm in grown if arm not in shallow]
    if shallow and others:
        one, other = (min(arms, key=_get_loss) for arms in (shallow, others))
        yield (
            f"From one layer, as Bu grows: {one.name} ({format_loss(one.loss)}), "
            f"{_compare(one, other)} the best of the others, {other.name} "
            f"({format_loss(other.loss)})."
        )


def _describe_best(study: Study, grown: Sequence[Arm]) -> str:
    """The arm that saved most with its source counted; without one the arm of the lowest loss."""
    saving = [arm for arm in grown if arm.saved.mean is not None and arm.reached]
    if not saving:
        best = min(grown, key=_get_loss)
        return (
            f"No arm reached from-scratch's loss in all of its runs; nearest is {best.name} "
            f"({format_loss(best.loss)}){_describe_source(study, best)}."
        )
    best = max(saving, key=lambda arm: arm.saved.mean or 0.0)
    least = "at least " if best.at_least else ""
    return (
        f"Best: {best.name} saved {least}{format_saving(best.saved)}, its source counted"
        f"{_describe_source(study, best)}."
    )


def _describe_source(study: Study, arm: Arm) -> str:
    """The factor of an arm's growth and what its source had seen, as far as they are known."""
    words = []
    if arm.source:
        words.append(f"growth by {study.target / arm.source:.3g} in parameters")
    if arm.source_ratio is not None:
        words.append(f"from {arm.source_ratio:.3g} tokens a parameter of the source")
    return f"; {' '.join(words)}" if words else ""


def _find_pairs(arms: Sequence[Arm]) -> Iterator[tuple[Arm, Arm]]:
    """(stacked, replicated) arms from one source of several layers, the same in all else."""
    for stacked in arms:
        for replicated in arms:
            same = (
                (stacked.method, replicated.method) == ("stack", "replicate")
                and stacked.start == replicated.start is not None
                and stacked.beside_method == replicated.beside_method
            )
            if same and (stacked.source_layers or 0) > 1:
                yield stacked, replicated


def _compare_copies(stacked: Arm, replicated: Arm) -> str:
    """Which of the two is better, and whether Wang's boundary says the same."""
    verdict = _compare(stacked, replicated)
    words = (
        f"Stack {verdict} replicate: {stacked.name} ({format_loss(stacked.loss)}), "
        f"{replicated.name} ({format_loss(replicated.loss)})"
    )
    ratio = stacked.source_ratio
    if ratio is None:
        return f"{words}."
    law = "behind" if ratio > BOUNDARY else "ahead of"
    agrees = "as" if verdict == law else "not as"
    return f"{words}, at {ratio:.3g} tokens a parameter of the source: {agrees} Wang has it."


def _compare(one: Arm, other: Arm) -> str:
    """Whether an arm's loss is ahead of another's, behind it, or within their deviations."""
    gap = _get_loss(one) - _get_loss(other)
    if abs(gap) <= max(one.loss.std or 0.0, other.loss.std or 0.0):
        return "level with"
    return "ahead of" if gap < 0 else "behind"


def _get_loss(arm: Arm) -> float:
    assert arm.loss.mean is not None, "arms without a loss are left out"
    return arm.loss.mean


def format_loss(loss: Measurement) -> str:
    """MEAN (RUNS) of a loss, with its deviation."""
    spread = "" if loss.std is None else f" ± {loss.std:.4f}"
    return f"{loss.mean:.4f}{spread}, {count_runs(loss.runs)}"


def format_saving(saving: Measurement) -> str:
    """A share saved, with its deviation and the number of runs."""
    spread = "" if saving.std is None else f" ± {saving.std:.1%}"
    return f"{saving.mean:.1%}{spread} ({count_runs(saving.runs)})"


def count_runs(runs: int) -> str:
    return f"{runs} run" if runs == 1 else f"{runs} runs"
