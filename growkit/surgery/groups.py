"""Parameter groups of an optimizer of PyTorch, for the grown model.

PyTorch keeps learning rate, eps and decay by group. 'keep' leaves the groups as they are: every new
parameter is in the group of the one that it copies, so the script that trained the source goes on.
'split' divides them by what growth asks for: a group for each learning rate, eps and weight in the
clipping norm with which training goes on exactly as the source's would (see
`growkit.growth.multipliers`), and one for layers that are new. AdamW's decay is divided by the
factor on the rate, because torch multiplies the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from growkit.checkpoint.optimizer import NAMES, Group, Optimizer, Scalar, list_undecayed
from growkit.errors import GrowkitError, UsageError, did_you_mean
from growkit.growth.multipliers import compute_multipliers
from growkit.growth.new import find_new_layers
from growkit.growth.plan import Plan
from growkit.growth.rule import find_source
from growkit.growth.shares import is_added
from growkit.models.architecture import Architecture
from growkit.models.definition import list_defined
from growkit.models.fused import find_fused
from growkit.models.notation import Row

LAYOUTS = ("keep", "split")
# What a split group states beside torch's own options: the factor on its learning rate, the weight
# of its squared gradients in the norm that is clipped, whether its layers are new, the Trainer's
# step at which the model was grown.
RATE, CLIP, NEW = "growkit_rate", "growkit_clip", "growkit_new"
GROWN_AT = "growkit_grown_at"
# Lists of a schedule with one entry for each group: rates, and what is no rate.
RATES, OTHERS = ("base_lrs", "_last_lr", "min_lrs"), ("lr_lambdas",)


@dataclass(frozen=True)
class Factors:
    """What growth asks of a parameter's group: factors on rate and eps, and on the clip weight."""

    rate: float = 1.0
    eps: float = 1.0
    clip: float = 1.0
    new: bool = False


def grow_groups(optimizer: Optimizer, plan: Plan, layout: str = "keep", step: int = 0) -> Optimizer:
    """The groups, steps and schedule of the grown model.

    layout: 'keep' or 'split'. step: the Trainer's, at which the model is grown. Raises UsageError
    for another layout and for a growth that splits nothing, GrowkitError for what cannot be split.
    """
    check_layout(layout)
    place = optimizer.place
    defined = _list_parameters(optimizer, plan)
    factors = find_factors(plan.grown, defined, [plan]) if layout == "split" else None
    members: dict[tuple[int, Factors], list[str]] = {}
    if factors is None:
        members = {(number, Factors()): [] for number in range(len(optimizer.groups))}
    steps = {}
    for name, row in defined:
        origin = find_origin(plan, row, name)
        key = (place[origin], factors[name] if factors else Factors())
        members.setdefault(key, []).append(name)
        if origin in optimizer.steps:
            steps[name] = _reset(optimizer.steps[origin], plan, row, name)
    ordered = sorted(members.items(), key=lambda item: item[0][0])
    if factors is not None:
        _require_splittable(optimizer, plan, factors)
    groups = [
        _make_group(optimizer.groups[number], names, each if factors else None, step)
        for (number, each), names in ordered
    ]
    schedule = optimizer.schedule
    if factors is not None:
        schedule = _split_schedule(optimizer, [key for key, _ in ordered])
    return replace(optimizer, groups=tuple(groups), steps=steps, schedule=schedule)


def _list_parameters(optimizer: Optimizer, plan: Plan) -> list[tuple[str, Row]]:
    """(name, row) of the grown model's parameters, in the order in which torch numbers them."""
    if optimizer.named:
        return [(name, row) for name, row, _ in plan.grown.table.names(plan.grown.sizes)]
    return list_defined(plan.grown)


def check_layout(layout: str) -> None:
    """Raise UsageError for a layout that is none."""
    if layout not in LAYOUTS:
        near = did_you_mean(layout, LAYOUTS)
        raise UsageError(f"--groups is one of {', '.join(LAYOUTS)}, got {layout!r}{near}")


def find_origin(plan: Plan, row: Row, name: str) -> str:
    """The parameter of the source that a new one copies."""
    position = row.match(name)
    assert position is not None, "a row gives the names that it matches"
    return row.name_at(find_source(plan, row, position))


def find_factors(
    model: Architecture, defined: Sequence[tuple[str, Row]], plans: Sequence[Plan]
) -> dict[str, Factors]:
    """The factors of parameters, by name, after growths one after the other.

    New are the layers of the last one. Raises GrowkitError where they differ within a parameter.
    """
    if not plans:
        return {name: Factors() for name, _ in defined}
    trees = compute_multipliers(model, plans)
    new_layers = find_new_layers(plans[-1:])
    fused = find_fused(model)
    found: dict[str, Factors] = {}
    by_row: dict[tuple[str, ...], list[float]] = {}
    for name, row in defined:
        if row.path not in by_row:
            parts = fused[row.name].parts if row.name in fused else (row,)
            by_row[row.path] = [_get_one(trees[kind], parts) for kind in trees]
        rate, eps, clip = by_row[row.path]
        position = row.match(name)
        layered = bool(row.stacked) and row.stacked[0].name == "layer"
        new = bool(layered and position and position[0] in new_layers)
        found[name] = Factors(rate, eps, clip, new)
    return found


def _get_one(tree: Mapping[str, Any], rows: Sequence[Row]) -> float:
    """The factor of several rows that are one parameter. Raises GrowkitError where they differ."""
    numbers = {get_number(tree, row) for row in rows}
    if len(numbers) > 1:
        raise GrowkitError(
            f"a parameter group has one learning rate, and {rows[0].name} needs another than "
            f"{rows[1].name}, with which it is one parameter"
        )
    return numbers.pop()


def make_groups(
    model: Architecture,
    defined: Sequence[tuple[str, Row]],
    plans: Sequence[Plan],
    options: Mapping[str, Any],
) -> list[Group]:
    """The groups of parameters that have none yet: transformers' Trainer's two.

    They are the parameters that decay, then norms and biases, each in the order of `defined`. After
    growths each is split by what they ask for. options: of a group that decays and has no factors.
    """
    factors = find_factors(model, defined, plans)
    exempt = list_undecayed(defined)[0]
    members: dict[tuple[bool, Factors], list[str]] = {}
    if not plans:
        members = {(False, Factors()): [], (True, Factors()): []}
    for name, _ in defined:
        members.setdefault((name in exempt, factors[name]), []).append(name)
    groups = []
    for (without, each), names in sorted(members.items(), key=lambda item: item[0][0]):
        stated = {**options, "weight_decay": 0.0} if without else dict(options)
        if plans:
            stated = {**multiply_options(stated, each, step=0), NAMES: list(names)}
        groups.append(Group(tuple(names), stated))
    return groups


def get_number(tree: Mapping[str, Any], row: Row) -> float:
    """The factor of a row in a tree. Raises GrowkitError for an array of them."""
    node: Any = tree
    for key in row.path:
        node = node[key]
    if not isinstance(node, float):
        raise GrowkitError(
            f"a parameter group has one learning rate, and the units of {row.name} need several; "
            "grow by whole multiples, without --spread"
        )
    return node


def _require_splittable(optimizer: Optimizer, plan: Plan, factors: Mapping[str, Factors]) -> None:
    """Raise UsageError or GrowkitError where split groups would be wrong or nothing new."""
    if set(factors.values()) == {Factors()}:
        raise UsageError(
            "--groups split divides groups by the factors of growth in width by copies, and by new "
            f"layers; {plan.method} has neither, so leave it out"
        )
    if optimizer.universal is not None:
        raise UsageError(
            "--groups split is for checkpoints of transformers' Trainer; a universal checkpoint of "
            "DeepSpeed keeps its groups"
        )
    if not {"mu", "nu"} <= optimizer.entries.keys():
        raise GrowkitError("--groups split is for Adam and AdamW, which divide by sqrt(nu) + eps")
    for group in optimizer.groups:
        coupled = group.options.get("decoupled_weight_decay") is False
        if coupled and group.options.get("weight_decay"):
            raise GrowkitError(
                "--groups split divides AdamW's weight decay; Adam's, which is added to the "
                "gradients, has no factor with which training goes on exactly"
            )


def _reset(step: Any, plan: Plan, row: Row, name: str) -> Any:
    """A parameter's step after growth: zero where all of its moments begin again.

    PyTorch's Adam corrects the bias of each parameter's moments by a step of its own.
    """
    position = row.match(name)
    assert position is not None, "a row gives the names that it matches"
    again = plan.moments == "reset" or (plan.keeps_first and is_added(plan, row, position))
    if not again:
        return step
    return replace(step, value=0.0) if isinstance(step, Scalar) else 0


def _make_group(group: Group, names: list[str], factors: Factors | None, step: int) -> Group:
    """A group of the grown model. factors: None to keep the options as they are."""
    options = dict(group.options)
    if NAMES in options or factors is not None:
        options[NAMES] = list(names)
    if factors is not None:
        options = multiply_options(options, factors, step)
    return Group(tuple(names), options)


def multiply_options(options: Mapping[str, Any], factors: Factors, step: int) -> dict[str, Any]:
    """The options of a group with the factors of growth applied, and stated."""
    made = dict(options)
    for key, factor in (
        ("lr", factors.rate),
        ("initial_lr", factors.rate),
        ("eps", factors.eps),
        ("weight_decay", 1.0 / factors.rate),
    ):
        if key in made:
            made[key] = scale(made[key], factor)
    made[RATE] = made.get(RATE, 1.0) * factors.rate
    made[CLIP] = made.get(CLIP, 1.0) * factors.clip
    made[NEW] = factors.new
    made[GROWN_AT] = step
    return made


def scale(value: Any, factor: float) -> Any:
    """A number times a factor, in the form that it has; exactly itself for a factor of 1."""
    if factor == 1.0 or value is None:
        return value
    if isinstance(value, Scalar):
        return replace(value, value=value.value * factor)
    return value * factor


def _split_schedule(optimizer: Optimizer, keys: list[tuple[int, Factors]]) -> dict[str, Any] | None:
    """The schedule with one rate for each new group. Raises GrowkitError for one of other parts."""
    if optimizer.schedule is None:
        return None
    made = dict(optimizer.schedule)
    for name, value in made.items():
        if not isinstance(value, list):
            continue
        if name not in (*RATES, *OTHERS) or len(value) != len(optimizer.groups):
            raise GrowkitError(
                f"--groups split writes schedules with one rate for each group, and scheduler.pt "
                f"has the list {name!r}; leave --groups out"
            )
        factor = {key: key[1].rate if name in RATES else 1.0 for key in keys}
        made[name] = [scale(value[key[0]], factor[key]) for key in keys]
    return made
