"""A head's row for new tokens whose logit stays far below the old ones' on text that was measured.

Among all rows w near the mean of the old ones, the one that lowers log mean exp(w.h - log sum exp
z) over measured hidden states h, found on one half of them and judged on the other. Nothing is
promised for other text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

# The loss of old tokens may move by so much, in nats, on the half that judges.
TARGET = 1e-7
# How strongly a row is held to the mean of the old ones, from first to last, in units of their
# mean square.
STRENGTHS = tuple(30.0 / 3**power for power in range(12))
# Rows of more than so many times the norm of the largest old row are not taken.
LARGEST = 4.0
# How far logits may be from linear in the hidden states, of the largest logit.
RESIDUAL = 1e-3


@dataclass(frozen=True)
class HeadRow:
    """A row, and what it was measured to do.

    numbers: at the source's sizes, in stored order. loss: nats a token by which the new tokens
    together raise the loss of old ones. tokens, text: how many of what it was measured on.
    """

    numbers: tuple[float, ...]
    loss: float
    tokens: int
    text: str


@dataclass(frozen=True)
class Measured:
    """hidden: [tokens, embed], of which logits are linear. sums: [tokens], log sum exp of the
    logits. residual: how far from linear they are, of the largest logit.
    """

    hidden: np.ndarray
    sums: np.ndarray
    residual: float


def solve_hidden(logits: Iterator[np.ndarray], head: np.ndarray) -> Measured:
    """The hidden states that a head [V, embed] makes logits [.., V] of, by least squares."""
    head = head.astype(np.float32)
    gram = np.linalg.pinv(head.T.astype(np.float64) @ head)
    hidden, sums, residual, largest = [], [], 0.0, 0.0
    for part in logits:
        flat = part.reshape(-1, part.shape[-1]).astype(np.float32)
        states = (flat @ head).astype(np.float64) @ gram
        top = flat.max(1, keepdims=True)
        sums.append(np.log(np.exp(flat - top).sum(1, dtype=np.float64)) + top[:, 0])
        residual = max(residual, float(np.abs(states.astype(np.float32) @ head.T - flat).max()))
        largest = max(largest, float(np.abs(flat).max()))
        hidden.append(states)
    return Measured(np.concatenate(hidden), np.concatenate(sums), residual / max(largest, 1e-30))


def find_row(measured: Measured, head: np.ndarray, added: int) -> tuple[np.ndarray, float]:
    """(the row nearest the mean of the old ones that reaches TARGET, its loss on the judging half).

    The last one that is not too large where none reaches it.
    """
    from scipy.optimize import minimize

    rows = head.astype(np.float64)
    mean = rows.mean(0)
    square = float((rows**2).sum(1).mean())
    limit = LARGEST * float(np.sqrt((rows**2).sum(1).max()))
    # Every other token judges, so that both halves are of all parts of the text.
    hidden, sums = measured.hidden[::2], measured.sums[::2]
    best, loss = mean, judge_row(measured, mean, added)
    row = mean
    for strength in STRENGTHS:
        if loss <= TARGET:
            break
        holding = strength / square

        def objective(w: np.ndarray, holding: float = holding) -> tuple[float, np.ndarray]:
            below = hidden @ w - sums
            top = below.max()
            weights = np.exp(below - top)
            total = weights.sum()
            slope = hidden.T @ (weights / total) + 2 * holding * (w - mean)
            value = top + np.log(total / len(sums)) + holding * ((w - mean) ** 2).sum()
            return float(value), slope

        found: Any = minimize(objective, row, jac=True, method="L-BFGS-B", options={"maxiter": 300})
        row = found.x
        if np.linalg.norm(row) > limit:
            break
        there = judge_row(measured, row, added)
        if there < loss:
            best, loss = row, there
    return best, loss


def judge_row(measured: Measured, row: np.ndarray, added: int) -> float:
    """How much `added` tokens of one row raise the loss, on the half that did not find it."""
    hidden, sums = measured.hidden[1::2], measured.sums[1::2]
    return float(np.log1p(added * np.exp(hidden @ row - sums)).mean())
