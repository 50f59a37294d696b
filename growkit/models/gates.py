"""How the gate of a mixture chooses and weighs experts: a table's facts and a model's values.

A table file states them:

    [experts]
    gate = sigmoid                     or softmax (over all), softmax-chosen (over the chosen)
    normalised = norm_topk_prob        true, false, or the field that says whether weights sum to 1
    top = num_experts_per_tok          the field of how many experts a token goes through
    groups = n_group                   the fields of groups of experts, of how many are chosen,
    chosen_groups = topk_group
    scaling = routed_scaling_factor    of what multiplies the experts' sum,
    auxiliary = router_aux_loss_coef   and of the coefficient of the auxiliary loss
    also = num_local_experts           another name of the number of experts

`[expert_defaults]` holds what transformers takes for fields that config.json leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from growkit.errors import GrowkitError, UsageError
from growkit.models.fields import Fields, read_number

if TYPE_CHECKING:
    from growkit.models.architecture import Architecture
    from growkit.models.family import Family

SCORES = ("softmax", "softmax-chosen", "sigmoid")
# The facts that name a field. A model may have null for all of them but the first.
FIELDS = ("top", "groups", "chosen_groups", "scaling", "auxiliary")
COUNTS = ("top", "groups", "chosen_groups")


@dataclass(frozen=True)
class Gate:
    """A model's gate. scores: one of SCORES. normalised: whether the chosen weights sum to 1.

    values: by the names of FIELDS; what the model lacks, or has as null, is left out.
    """

    scores: str
    normalised: bool
    values: Mapping[str, Any]

    @property
    def top(self) -> int:
        """How many experts a token goes through."""
        return int(self.values["top"])

    @property
    def shared(self) -> bool:
        """Whether equal experts share the weight of one: scores are divided by a sum over all."""
        return self.normalised or self.scores != "sigmoid"


def read_gate(family: Family, config: Mapping[str, Any]) -> Gate:
    """The gate of a model, from its config.json.

    Raises UsageError for a family without experts or whose table does not state the gate, and
    GrowkitError for values that make no gate.
    """
    if "expert" not in family.fields:
        raise UsageError(f"a {family.title} model has no experts; more of them need a mixture")
    if not family.experts:
        raise UsageError(
            f"how a {family.title} model chooses its experts is not in its table, so their number "
            f"stays"
        )
    stated = family.experts
    fields = Fields(
        {name: value for name, value in config.items() if value is not None},
        {**family.expert_defaults},
    )
    normalised = stated["normalised"]
    values = {name: _read(name, stated[name], fields) for name in FIELDS if name in stated}
    if values["top"] is None:
        raise GrowkitError(f"config.json lacks {stated['top']}, which has no default")
    return Gate(
        scores=stated["gate"],
        normalised=normalised if isinstance(normalised, bool) else bool(fields.get(normalised)),
        values={name: value for name, value in values.items() if value is not None},
    )


def check_choice(model: Architecture) -> None:
    """Raise GrowkitError where a token of a mixture would pass more experts than there are."""
    gate = model.gate
    if gate is None:
        return
    experts = model.sizes["expert"]
    if not 0 < gate.top <= experts:
        raise GrowkitError(
            f"{model.family.experts['top']} is {gate.top}, and there are {experts} experts; "
            f"between 1 and {experts} work"
        )


def _read(name: str, field: str, fields: Fields) -> Any:
    """The value of a field, None where it is null."""
    if fields.get(field) is None:
        return None
    if name in COUNTS:
        return fields.whole(field)
    try:
        return read_number(field, fields.get(field))
    except ValueError as problem:
        raise GrowkitError(f"config.json: {problem}") from None
