"""What is measured by running the source on some text: a row of the head for new tokens
(--vocab-head measured), and how often each expert is chosen (--choose use).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from growkit.errors import UsageError

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Source
    from growkit.growth.plan import Plan

# Tokens of one sequence, and logits computed at once, at most: 256 MB of float32.
LENGTH = 512
LOGITS = 1 << 26
# Tokens at least; twice the width where that is more.
TOKENS = 8192


def measure_row(source: Source, plan: Plan) -> Plan:
    """The plan with a row of the head that was measured on about TOKENS tokens, on the CPU.

    Raises UsageError where no row is needed, and where logits are not linear in the head's rows.
    """
    from growkit.cli.checking import require_checkable, select_tokens
    from growkit.growth.head_row import RESIDUAL, HeadRow, find_row, solve_hidden
    from growkit.growth.vocabulary import find_head, has_bias

    if "vocab" not in plan.pads:
        raise UsageError("--vocab-head says what new tokens hold, and goes with --vocab")
    if has_bias(plan.model):
        raise UsageError(
            "--vocab-head measured is not needed: the head has a bias, and with it new tokens move "
            "the loss of old ones by less than 1e-7"
        )
    require_checkable(source)
    head = source.tensors["params"][find_head(plan.model).name].read()
    tokens_BxT, text = select_tokens(source, max(TOKENS, 2 * head.shape[-1]))
    measured = solve_hidden(_compute_logits(source, _cut_rows(tokens_BxT)), head)
    if measured.residual > RESIDUAL:
        raise UsageError(
            f"--vocab-head measured takes logits that are linear in the head's rows, and this "
            f"model's are off by {measured.residual:.0e} of the largest, as under a soft cap; "
            f"leave it out"
        )
    added = plan.grown.vocab - plan.model.vocab
    row, loss = find_row(measured, head, added)
    numbers = tuple(float(number) for number in row)
    found = HeadRow(numbers, loss, len(measured.sums) // 2, text)
    return replace(plan, vocab_row=found)


def _cut_rows(tokens_BxT: np.ndarray) -> np.ndarray:
    """The tokens in sequences of at most LENGTH."""
    length = min(LENGTH, tokens_BxT.shape[1])
    ids = tokens_BxT.reshape(-1)
    return ids[: ids.size - ids.size % length].reshape(-1, length)


def _compute_logits(source: Source, tokens_BxT: np.ndarray) -> Iterator[np.ndarray]:
    from growkit.cli.checking import load_function

    compute = load_function(source)
    step = max(1, LOGITS // (tokens_BxT.shape[1] * source.model.vocab))
    for start in range(0, len(tokens_BxT), step):
        yield compute(tokens_BxT[start : start + step])


def measure_use(source: Source, text: str | None) -> np.ndarray:
    """float64 [layer, expert]: how many of about TOKENS tokens go through each, on the CPU.

    text: a file of text or token files; None for a text that comes with Python. Layers without
    experts have zeros. Raises UsageError for a model that is no mixture, or that transformers does
    not load.
    """
    from convert.reference import count_chosen, require_transformers
    from growkit.cli.checked_text import choose_text
    from growkit.cli.description import KINDS, is_loaded_by_transformers
    from growkit.models.gates import read_gate

    gate = read_gate(source.model.family, source.config)
    require_transformers()
    if not is_loaded_by_transformers(source):
        raise UsageError(
            f"--choose use runs the model in transformers, which reads no {KINDS[source.kind]}"
        )
    tokens_BxT = choose_text(source, TOKENS, text, "--choose-text").tokens
    counts = count_chosen(source.here, _cut_rows(tokens_BxT), gate.top)
    model = source.model
    rows = [row for row in model.table.rows if any(part.routes for part in row.parts)]
    layers = [layer for layer in range(model.layer) if model.table.has(rows[0], layer)]
    scores = np.zeros((model.layer, model.sizes["expert"]))
    scores[layers] = counts
    return scores
