"""What each part of an optax optimizer's state is, and so by which rule it grows.

Averages and sums of gradients grow as Adam's mu does, of squared gradients as its nu, copies of the
parameters as the parameters. A state is known by the name of its class, and one that was restored
as a plain dict, as Orbax does, by its keys. One that is not known here is refused if it holds
arrays of the parameters' shapes: growing them by a wrong rule would go unnoticed.

optax.ema's EmaState is taken as an average of gradients, as in a chain. The class is the same where
optax.ema averages parameters; such an average belongs in a tree of its own, which grows as they do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    # What a line search keeps for the next step is the gradient itself.
    "ScaleByBacktrackingLinesearchState": {"grad": MU},
    "ScaleByZoomLinesearchState": {"grad": MU},
    "ScaleByOptimisticGradientState": {"previous_gradient": MU},
    "PerElementMeanAndSumSqDiffGradsState": {"mean_grads": MU, "sum_sq_diff_grads": NU},
    "PerElementMeanAndVarianceEMAState": {"mean_grads_ema": MU, "variance_grads_ema": NU},
    "ScheduleFreeState": {"z": VALUE},
    "LookaheadParams": {"fast": VALUE, "slow": VALUE},
    "SAMState": {"cache": VALUE},
    # One truth for each array.
    "ZeroNansState": {"found_nan": VALUE},
}
# Arrays that are of no parameter, and pass through: keys of random numbers, settings.
PASSED = ("rng_key", "key", "ns_coeffs", "hyperparams")
# For messages: what people use of these.
KNOWN = (
    "Adam (AdamW, NAdam, LAMB), Lion, SGD with momentum, RMSprop, Adagrad, AMSGrad, AdaBelief, "
    "Adan, AdEMAMix, Muon and Sophia"
)
# What optax.ema's state is once it is a plain dict; an average of parameters looks the same.
AVERAGE = "{count, ema}"
# What a plain dict with exactly these keys was before it was saved: of all classes above and below
# that have a field of another name than mu, nu, nu_max, trace and count.
KEYS: dict[frozenset[str], str] = {
    frozenset(keys.split()): kind
    for kind, keys in {
        "ScaleByAdanState": "m v n g t",
        "ScaleByAdemamixState": "count count_m2 m1 m2 nu",
        "ScaleBySimplifiedAdEMAMixState": "t m n",
        "ScaleByRssState": "sum_of_squares",
        AVERAGE: "count ema",
        "ApplyEvery": "count grad_acc",
        "MultiStepsState": "mini_step gradient_step inner_opt_state acc_grads skip_state",
        "MuonState": "count mu ns_coeffs",
        "ScaleByOptimisticGradientState": "is_initial_step previous_gradient",
        "ZeroNansState": "found_nan",
        "AccumulateAvgUpdatesState": "micro_step ready avg_grad",
        "PerElementMeanAndSumSqDiffGradsState": "micro_step ready mean_grads sum_sq_diff_grads",
        "PerElementMeanAndVarianceEMAState": "count ema_decay mean_grads_ema variance_grads_ema",
        # Those of both line searches.
        "ScaleByZoomLinesearchState": "learning_rate value grad info",
        "SophiaState": "count mu nu hessian_fn_state",
        "ScheduleFreeState": "b1 weight_sum step_count max_lr base_optimizer_state z",
        "LookaheadParams": "fast slow",
        "SAMState": "steps_since_sync opt_state adv_state cache",
        "ScaleByDistanceOverGradientsState": "max_dist grad_sum_of_squares init_params",
        "PartitionState": "inner_states",
        "FactoredState": "count v_row v_col v",
        "ScaleByRpropState": "step_sizes prev_updates",
        "ScaleByAdaDeltaState": "e_g e_x",
        "ProdigyState": "exp_avg exp_avg_sq grad_sum params0 estim_lr numerator_weighted count",
        "DAdaptAdamWState": "exp_avg exp_avg_sq grad_sum estim_lr numerator_weighted count",
        "SnapshotState": "measurement",
        "MonitorState": "measurements measure_states",
        "GaLoreState": "count base_optimizer_state projector",
        "MechanicState": "base_optimizer_state count r m v s x0",
        "ScaleByLBFGSState": "count params updates diff_params_memory diff_updates_memory "
        "weights_memory",
        "MadgradState": "count grad_sum_sq s x0",
        "COCOBState": "init_particles cumulative_gradients scale subgradients reward",
        "DoGState": "is_init_step init_params max_dist sum_sq_norm_grads",
        "DoWGState": "init_params weighted_sq_norm_grads estim_sq_dist",
        "MomoState": "exp_avg barf gamma lb count",
        "MomoAdamState": "exp_avg exp_avg_sq barf gamma lb count",
    }.items()
}
# What the keys of a plain dict say where no class does, as in a restored checkpoint and in states
# of one's own. optax's momentum (`trace`) grows as mu does, AMSGrad's `nu_max` as nu.
KEY_MOMENTS = {"mu": MU, "nu": NU, "trace": MU, "nu_max": NU}
# Under these keys the state of a wrapper has the state of what it wraps.
INNER = ("inner_state", "inner_opt_state", "base_optimizer_state")
# The counters of steps that belong to averages; `--moments reset` sets them to zero with those.
COUNTERS = {
    "ScaleByAdanState": ("t",),
    "ScaleByAdemamixState": ("count", "count_m2"),
    "ScaleBySimplifiedAdEMAMixState": ("t",),
}
# The fields of the last two parts of optax.lars's chain: a constant rate or a schedule, momentum.
LARS = ([[], ["trace"]], [["count"], ["trace"]])
# The states of these hold the states of others by label, each for its part of the parameters.
SIDE_BY_SIDE = ("PartitionState", "MultiTransformState")
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
    AVERAGE: "it may be optax.ema's average of gradients or an average of parameters; give the "
    "first in optax's own class, and the second under another name",
    "COCOBState": "COCO-Betting keeps the largest gradients and bets, of no one order in them",
    "DoGState": "DoG's rate is a distance over all parameters, which growth changes",
    "DoWGState": "DoWG's rate is a distance over all parameters, which growth changes",
    "MadgradState": "MADGRAD divides by cube roots, which change steps by no power of the share",
    "ScaleByDistanceOverGradientsState": "its rate is a distance, which growth changes",
    "SnapshotState": "of which order in the gradients a measurement is, is not known",
    "MonitorState": "of which order in the gradients a measurement is, is not known",
    "MomoState": "MoMo's rate is of sums over all parameters",
    "MomoAdamState": "MoMo's rate is of sums over all parameters",
}
# Optimizers of other packages than optax that have many implementations, by their class's name.
PRECONDITIONERS = re.compile("shampoo|soap|psgd|kron", re.IGNORECASE)


def is_optimizer_state(node: Any) -> bool:
    """Whether a node is one of optax's own states."""
    # By name and module, so that optax need not be installed, nor a class of one version be there.
    return is_named_tuple(node) and type(node).__module__.split(".")[0] == "optax"


def is_named_tuple(node: Any) -> bool:
    """Whether a node is of the kind that optax and other packages make states of."""
    return isinstance(node, tuple) and hasattr(node, "_fields")


def is_foreign_state(node: Any, in_optimizer: bool) -> bool:
    """Whether a node is the state of a transformation that is not optax's own.

    in_optimizer: whether it stands in or beside states of optax. Elsewhere a named tuple may be a
    training state of somebody's own, with parameters in it.
    """
    if not is_named_tuple(node) or is_optimizer_state(node):
        return False
    return in_optimizer or PRECONDITIONERS.search(type(node).__name__) is not None


def find_kind(node: Any) -> str:
    """The name of the class of an optax state, also of one that is a plain dict now; "" for none.

    >>> find_kind({"sum_of_squares": {}})
    'ScaleByRssState'
    """
    if is_optimizer_state(node):
        return type(node).__name__
    if isinstance(node, Mapping) and all(isinstance(key, str) for key in node):
        return KEYS.get(frozenset(node), "")
    return ""


def normalises(node: Any) -> bool:
    """Whether a state's transformation divides by the size of gradients: it keeps their squares.

    A chain does so where one of its parts does, and what wraps a state where that does.
    """
    return _keeps(node, NU)


def _keeps(node: Any, rule: int) -> bool:
    """Whether a state, or one in it, keeps moments of a rule: MU or NU."""
    kind = find_kind(node)
    if kind in FIELDS and rule in FIELDS[kind].values():
        return True
    if is_optimizer_state(node) or type(node) in (tuple, list):
        return any(_keeps(part, rule) for part in node)
    if isinstance(node, Mapping):
        within = [node[key] for key in INNER if key in node]
        within += list(node.values()) if is_numbered(node) else []
        found = any(KEY_MOMENTS.get(key) == rule for key in node)
        return found or any(_keeps(part, rule) for part in within)
    return False


def is_numbered(node: Any) -> bool:
    """Whether a dict has the keys "0", "1" and so on: a tuple, as flax's to_state_dict saves it.

    nnx.state has a tuple with whole numbers for keys, and leaves out what holds nothing.

    >>> is_numbered({"1": {}, "0": {}}), is_numbered({0: {}, 2: {}})
    (True, True)
    """
    if not isinstance(node, Mapping) or not node:
        return False
    numbers = all(type(key) is int for key in node)
    return numbers or {*node} == {str(place) for place in range(len(node))}


def is_chain(node: Any, within: str) -> bool:
    """Whether the parts of a container are states of transformations one after another.

    A chain is a tuple, and a list or a numbered dict once it was saved and restored.
    optax.named_chain makes a dict; so does optax.partition, whose states go side by side. within:
    the class of the state around it.
    """
    if type(node) is tuple:
        return True
    if within in SIDE_BY_SIDE and isinstance(node, Mapping):
        return False
    if is_numbered(node):
        return not any(type(part) is tuple or is_optimizer_state(part) for part in node.values())
    if type(node) is list:
        # A list of somebody's own holds states as optax made them: those of several optimizers.
        return not any(type(part) is tuple or is_optimizer_state(part) for part in node)
    return isinstance(node, Mapping) and all(map(is_optimizer_state, node.values()))


def refuse_unordered(node: Any, within: str) -> None:
    """Raise GrowkitError for states under names of which it is not known which came first.

    That is what optax.named_chain's state is once it was restored as plain dicts: with a dict's
    order (saved ones are often sorted) it is lost whether the momentum of one part is of gradients
    that another part had normalised. within: as in `is_chain`.
    """
    if not isinstance(node, Mapping) or find_kind(node) or within in SIDE_BY_SIDE:
        return
    if is_numbered(node) or all(map(is_optimizer_state, node.values())):
        return
    plain = {name: part for name, part in node.items() if isinstance(part, Mapping | list)}
    squares = [name for name, part in plain.items() if normalises(part)]
    others = [name for name, part in plain.items() if name not in squares and _keeps(part, MU)]
    if squares and others:
        raise GrowkitError(
            f"the optimizer states {squares[0]!r} and {others[0]!r} lie in one plain dict, which "
            f"does not tell which of them came first in a chain, and the momentum in {others[0]!r} "
            f"grows by that: restore optax.named_chain's state into its own classes, or give the "
            f"states as a list in the chain's order; states of two optimizers are grown one by one"
        )


def is_counter(kind: str, field: str) -> bool:
    """Whether a field of an optax state counts the steps of averages that the state keeps.

    kind: the state's class, as `find_kind` gives it.
    """
    return kind in FIELDS and field in COUNTERS.get(kind, ("count",))


def find_rule(kind: str, field: str, maximum: bool, normalised: bool) -> int:
    """The rule for a field of an optax state: VALUE, MU, NU, STEPS or UNKNOWN.

    kind: the state's class, as `find_kind` gives it. maximum: whether nu is Adamax's, the largest
    absolute gradient, which is of first order. normalised: whether a transformation before this one
    in the chain divides by the size of gradients, as RMSprop's does before its momentum.
    """
    rule = FIELDS.get(kind, {}).get(field, UNKNOWN)
    if rule == MU and normalised:
        return STEPS
    if maximum and kind == "ScaleByAdamState" and field == "nu":
        return MU
    return rule


def refuse_unknown(kind: str, field: str) -> GrowkitError:
    """The refusal of a state that holds arrays of parameters under a field that is not known."""
    reason = REASONS.get(kind)
    if PRECONDITIONERS.search(kind):
        reason = "it keeps preconditioners, which growth changes"
    why = f": {reason}" if reason else ", and what it holds there is not known"
    return GrowkitError(
        f"the optimizer state {kind} cannot grow (field {field!r}){why}; start that optimizer "
        f"anew after growth, or use one of {KNOWN}"
    )


def refuse_array(kind: str, field: str) -> GrowkitError:
    """The refusal of a state that holds an array where it should hold a tree of parameters."""
    if kind and kind not in FIELDS:
        return refuse_unknown(kind, field)
    return GrowkitError(
        f"the optimizer state {kind or 'in a plain dict'} holds one array under {field!r}, and not "
        f"one for each parameter, as under optax.flatten: which number is whose is not known; "
        f"start that optimizer anew after growth, without optax.flatten"
    )


def refuse_lars(node: Any) -> None:
    """Raise GrowkitError for the state of optax.lars, which is told by the order of its parts.

    Its momentum is of steps that have the norm of their parameters, and stands after the learning
    rate. Such a chain of somebody's own, without a normalisation, is refused as well.
    """
    dense = is_numbered(node) and {*map(int, node)} == set(range(len(node)))
    chain = [node[key] for key in sorted(node, key=int)] if dense else node
    if not isinstance(chain, tuple | list) or is_named_tuple(chain) or len(chain) != 4:
        return
    names = [_list_fields(part) for part in chain]
    # A mask around what keeps nothing, twice: weight decay and the trust ratio.
    masked = names[0] in ([], ["inner_state"]) and names[1] == ["inner_state"]
    if masked and not _list_fields(_get_inner(chain[1])) and names[2:] in LARS:
        raise GrowkitError(
            "the optimizer state cannot grow: it is optax.lars's, or has its parts in the same "
            "order, and LARS's momentum is of steps with the norm of their parameters; start that "
            "optimizer anew after growth, or put optax.trace before the learning rate"
        )


def _list_fields(node: Any) -> list[str] | None:
    """The fields of a state of optax or of a plain dict; None for anything else."""
    if is_optimizer_state(node):
        return list(node._fields)
    return list(node) if isinstance(node, Mapping) else None


def _get_inner(node: Any) -> Any:
    return node["inner_state"] if isinstance(node, Mapping) else node.inner_state
