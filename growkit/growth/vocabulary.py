"""Growth of the vocabulary: rows for new tokens, which old text does not use.

New rows of an embedding are the mean of the old ones (or zero), and so are those of a head. For
every hidden state h, log sum_i exp(z_i) >= log V + mean_i z_i (Jensen), and a row that is the mean
of the V old ones has exactly the logit mean_i z_i. So k new tokens add at most log(1 + k/V) to the
loss of an old one, whatever the model is given to read. No rows of new tokens promise less without
a bias. Where the head has one, the new tokens' biases are the mean of the old ones plus
log(V/k) + log(MARGIN), and the loss moves by less than MARGIN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from growkit.errors import UsageError, require_type
from growkit.growth.head_row import HeadRow
from growkit.growth.padding import MU, NU, VALUE, Rule
from growkit.models.notation import Row

if TYPE_CHECKING:
    from growkit.growth.plan import Plan
    from growkit.models.architecture import Architecture

AXIS = "vocab"
FILLS = ("mean", "zero")
# What the new tokens take of the softmax's sum at most, where the head has a bias: a tenth of what
# is called exact, so that rounding the new rows to bfloat16 does not reach it.
MARGIN = 1e-7
# Nats a token by which the loss of old tokens may move in growth that is called exact.
EXACT = 1e-6
LARGEST = 1 << 24

_FORM = re.compile(r"\s*(\+|x|multiple of )?\s*([0-9]{1,9})\s*")


def parse_vocabulary(text: str | int, current: int) -> int:
    """'128256', '+64', 'x128' or 'multiple of 128' as a number of tokens, for `current` of them.

    Raises UsageError for text that is none of these, and for fewer tokens than there are.

    >>> [parse_vocabulary(text, 100) for text in ("128", "+28", "x64", "multiple of 64")]
    [128, 128, 128, 128]
    """
    found = _FORM.fullmatch(str(text))
    if found is None or int(found[2]) == 0:
        raise UsageError(
            f"--vocab takes a number of tokens, as {current + 64}, or +64, or x128 for the next "
            f"multiple of 128; got {text!r}"
        )
    number = int(found[2])
    size = number
    if found[1] == "+":
        size = current + number
    elif found[1]:
        size = -(-current // number) * number
    if size < current:
        raise UsageError(
            f"--vocab {text} is below the source's {current}; growkit only grows models; +64 adds "
            f"64 tokens"
        )
    if size > LARGEST:
        raise UsageError(f"--vocab {text} asks for {size}; growkit makes at most {LARGEST}")
    return size


def plan_vocabulary(model: Architecture, vocab: str | int, fill: str = "mean") -> Plan:
    """The plan that adds tokens to a model's vocabulary, after the old ones.

    vocab: as `parse_vocabulary` takes it. fill: what new rows of the embedding hold, 'mean' of the
    old ones or 'zero'. Raises UsageError for a model whose table has no rows of tokens alone, and
    where nothing is added.
    """
    from growkit.growth.plan import MODEL_HINT, build_plan
    from growkit.models.architecture import Architecture

    require_type("model", model, Architecture, MODEL_HINT)
    if not model.vocab:
        raise UsageError("the vocabulary cannot grow: no row of the model's table has that axis")
    size = parse_vocabulary(vocab, model.vocab)
    if size == model.vocab:
        raise UsageError(
            f"nothing grows: --vocab {vocab} is the {size} tokens that the source has already"
        )
    words = f"vocab {model.vocab} -> {size}, {size - model.vocab} new tokens after the old ones"
    return build_plan("vocab", words, model, {}, {AXIS: size}, vocab_fill=fill)


def add_tokens(
    verb: str, plan: Plan | None, model: Architecture, vocab: str | int, fill: str = "mean"
) -> Plan:
    """A plan with the growth of the vocabulary in it; None for a plan of the vocabulary alone.

    A plan whose model has so many tokens already is told so, and stays. Raises UsageError as
    `plan_vocabulary` does.
    """
    from growkit.growth.plan import combine_plans

    if plan is not None and parse_vocabulary(vocab, model.vocab) == model.vocab:
        note = f"the vocabulary stays: --vocab {vocab} is the source's {model.vocab}"
        return replace(plan, notes=(*plan.notes, note))
    tokens = plan_vocabulary(model, vocab, fill)
    return combine_plans(verb, [tokens] if plan is None else [plan, tokens], model)


def check_vocabulary(model: Architecture) -> None:
    """Raise UsageError where a parameter holds more than tokens along the axis."""
    for row in model.table.rows:
        first = row.blocks[0] if row.blocks else ()
        alone = len(first) == 1 and len(first[0]) == 1
        if AXIS in row.axes and not (alone and first[0][0].name == AXIS):
            raise UsageError(
                f"the vocabulary of a {model.family.title} model cannot grow: {row.name} holds "
                f"other rows beside those of tokens"
            )


def rule_of_tokens(row: Row, moment: int, plan: Plan) -> Rule:
    """What the rows of new tokens hold of one parameter or moment."""
    if moment != VALUE:
        return Rule(1.0, {MU: "zero", NU: "mean"}[moment])
    if plan.vocab_row and row.name == find_head(plan.model).name:
        return Rule(1.0, "given")
    if row.role == "embedding":
        return Rule(1.0, plan.vocab_fill)
    if row.role == "bias":
        old = plan.model.vocab
        added = plan.pads[AXIS] - old
        return Rule(1.0, "mean", shift=math.log(old / added) + math.log(MARGIN))
    return Rule(1.0, "mean")


def find_head(model: Architecture) -> Row:
    """The row whose parameter makes logits: the head, or the embedding where that is the head."""
    rows = [row for row in model.table.rows if AXIS in row.axes]
    heads = [row for row in rows if row.role == "head"]
    return (heads or [row for row in rows if row.role == "embedding"])[0]


def has_bias(model: Architecture) -> bool:
    """Whether the head adds a number to each token's logit."""
    return any(row.role == "bias" and AXIS in row.axes for row in model.table.rows)


def shares_embedding(model: Architecture) -> bool:
    """Whether the head's rows are the embedding's."""
    return not any(row.role == "head" for row in model.table.rows)


def bound_shift(plan: Plan) -> float | None:
    """The most by which the loss of old tokens rises, in nats a token; None where nothing bounds
    it: rows of zeros in a tied head have the logit 0, which may be more than all others, and rows
    that were measured say nothing of other text.
    """
    if AXIS not in plan.pads:
        return 0.0
    if plan.vocab_row:
        return None
    if shares_embedding(plan.model) and plan.vocab_fill == "zero":
        return None
    if has_bias(plan.model):
        return MARGIN
    added = plan.pads[AXIS] - plan.model.vocab
    return math.log1p(added / plan.model.vocab)


def state_function(plan: Plan) -> str:
    """Whether a plan keeps the source's function, in the words of a lineage."""
    if not plan.preserved:
        return "not preserved"
    return describe_shift(plan) or "preserved"


def describe_shift(plan: Plan) -> str:
    """How far growth of the vocabulary is from exact, in words; empty where it is exact, or where
    it does not grow.
    """
    bound = bound_shift(plan)
    if plan.vocab_row:
        found = plan.vocab_row
        return (
            f"measured: new tokens raise the loss of old ones by {found.loss:.1e} nats on "
            f"{found.tokens:,} {found.text}"
        )
    if bound is None:
        return "not exact: nothing bounds how far new tokens raise the loss of old ones"
    if bound <= EXACT:
        return ""
    return f"not exact: new tokens raise the loss of old ones by up to {bound:.1e} nats"


def state_tokens(plan: Plan) -> dict[str, Any] | None:
    """What a lineage says of new tokens; None where there are none."""
    if AXIS not in plan.pads:
        return None
    head = "the embedding" if shares_embedding(plan.model) else "mean"
    stated = {
        "embedding": plan.vocab_fill,
        "head": head,
        "bias": has_bias(plan.model),
        "loss": bound_shift(plan),
    }
    if plan.vocab_row is None:
        return stated
    row = asdict(plan.vocab_row)
    return stated | {"head": "measured", "row": row | {"numbers": list(row["numbers"])}}


def read_row(stored: Mapping[str, Any] | None, model: Architecture) -> HeadRow | None:
    """The row of new tokens that a lineage states. Raises ValueError where it does not fit."""
    if stored is None:
        return None
    numbers = tuple(float(number) for number in stored["numbers"])
    wanted = math.prod(find_head(model).shape(model.sizes)[1:])
    if len(numbers) != wanted or not all(map(math.isfinite, numbers)):
        raise ValueError(f"the row of new tokens has {len(numbers)} numbers, not {wanted}")
    return HeadRow(numbers, float(stored["loss"]), int(stored["tokens"]), str(stored["text"]))
