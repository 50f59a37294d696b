"""What each part of an optax optimizer's state is, and so by which rule it grows.

Averages and sums of gradients grow as Adam's mu does, of squared gradients as its nu, copies of the
parameters as the parameters. A state is known by the name of its class. One that is not known here
is refused if it holds arrays of the parameters' shapes: growing them by a wrong rule would go
unnoticed.

optax.ema's EmaState is taken as an average of gradients, as in a chain. The class is the same where
optax.ema averages parameters; such an average belongs in a tree of its own, which grows as they do.
"""

from __future__ import annotations

from typing import Any

from growkit.errors import GrowkitError
from growkit.growth.padding import MU, NU, VALUE

# The rule of a field that FIELDS does not list. Arrays of parameters in such a field are refused.
UNKNOWN = -1
# An average of steps that were normalised before: of no order in the gradient, so it is copied.
STEPS = -2

# class: field -> rule. Fields that hold no arrays of parameters need no entry.
FIELDS: dict[str, dict[str, int]] = {
    "ScaleByAdamState": {"mu": MU, "nu": NU},
    "ScaleByAmsgradState": {"mu": MU, "nu": NU, "nu_max": NU},
    "ScaleByBeliefState": {"mu": MU, "nu": NU},
    "ScaleByLionState": {"mu": MU},
    "ScaleByAdanState": {"m": MU, "v": MU, "n": NU, "g": MU},
    "ScaleByAdemamixState": {"m1": MU, "m2": MU, "nu": NU},
    "ScaleBySimplifiedAdEMAMixState": {"m": MU, "n": NU},
    "ScaleByRmsState": {"nu": NU},
    "ScaleByRmsWithCountState": {"nu": NU},
    "ScaleByRStdDevState": {"mu": MU, "nu": NU},
    "ScaleByRStdDevWithCountState": {"mu": MU, "nu": NU},
    "ScaleByRssState": {"sum_of_squares": NU},
    "TraceState": {"trace": MU},
    "EmaState": {"ema": MU},
    "ApplyEvery": {"grad_acc": MU},
    "MultiStepsState": {"acc_grads": MU},
    "AccumulateAvgUpdatesState": {"avg_grad": MU},
    "MuonState": {"mu": MU},
    # The Hessian's diagonal is, as a squared gradient, of second order in the parameter's share.
    "SophiaState": {"mu": MU, "nu": NU},
    "ScheduleFreeState": {"z": VALUE},
    "LookaheadParams": {"fast": VALUE, "slow": VALUE},
}
# The counters of steps that belong to averages; `--moments reset` sets them to zero with those.
COUNTERS = {
    "ScaleByAdanState": ("t",),
    "ScaleByAdemamixState": ("count", "count_m2"),
    "ScaleBySimplifiedAdEMAMixState": ("t",),
}
# Why some states cannot grow.
REASONS = {
    "FactoredState": "Adafactor keeps sums over rows and columns, not a number for each parameter",
    "ScaleBySM3State": "SM3 keeps the largest squares of rows and columns",
    "ScaleByNovogradState": "NovoGrad keeps one norm for each array, which growth changes",
    "ScaleByRpropState": "Rprop keeps a step for each number, not an average of gradients",
    "ScaleByAdaDeltaState": "Adadelta keeps squares of past steps, which no rule here covers",
    "ProdigyState": "Prodigy's estimate of the step is a sum over all parameters",
    "DAdaptAdamWState": "D-Adaptation's estimate of the step is a sum over all parameters",
    "MechanicState": "Mechanic's scale is a sum over all parameters",
    "ScaleByLBFGSState": "L-BFGS keeps past steps, whose products growth changes",
    "GaLoreState": "GaLore keeps projections of gradients",
}


def is_optimizer_state(node: Any) -> bool:
    """Whether a node is one of optax's own states."""
    # By name and module, so that optax need not be installed, nor a class of one version be there.
    named = isinstance(node, tuple) and hasattr(node, "_fields")
    return named and type(node).__module__.split(".")[0] == "optax"


def normalises(node: Any) -> bool:
    """Whether a state's transformation divides by the size of gradients: it keeps their squares.

    A chain does so where one of its parts does.
    """
    if is_optimizer_state(node):
        return NU in FIELDS.get(type(node).__name__, {}).values()
    return type(node) is tuple and any(normalises(part) for part in node)


def is_counter(node: Any, field: str) -> bool:
    """Whether a field of an optax state counts the steps of averages that the state keeps."""
    kind = type(node).__name__
    if not is_optimizer_state(node) or kind not in FIELDS:
        return False
    return field in COUNTERS.get(kind, ("count",))


def find_rule(node: Any, field: str, maximum: bool, normalised: bool) -> int:
    """The rule for a field of an optax state: VALUE, MU, NU, STEPS or UNKNOWN.

    maximum: whether nu is Adamax's, the largest absolute gradient, which is of first order.
    normalised: whether a transformation before this one in the chain divides by the size of
    gradients, as RMSprop's does before its momentum.
    """
    kind = type(node).__name__
    rule = FIELDS.get(kind, {}).get(field, UNKNOWN)
    if rule == MU and normalised:
        return STEPS
    if maximum and kind == "ScaleByAdamState" and field == "nu":
        return MU
    return rule


def refuse_unknown(kind: str, field: str) -> GrowkitError:
    """The refusal of a state that holds arrays of parameters under a field that is not known."""
    reason = REASONS.get(kind)
    why = f": {reason}" if reason else ", and what it holds there is not known"
    known = ", ".join(sorted(name.removeprefix("ScaleBy").removesuffix("State") for name in FIELDS))
    return GrowkitError(
        f"the optimizer state {kind} cannot grow (field {field!r}){why}; start that optimizer "
        f"anew after growth, or use one of {known}"
    )
