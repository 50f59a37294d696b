"""The auxiliary loss that keeps the experts of a mixture equally busy, and their loads.

Switch Transformer (arXiv 2101.03961), equations 4 to 6, as transformers' load_balancing_loss_func
has it: X times the sum over experts of (tokens that went through it) x (its mean probability), both
per token and averaged over all layers. It is K, the experts a token, where all are equally busy,
and at most X. The count has no gradient, the probability has.
"""

from __future__ import annotations

import jax

from trainer.model.experts import Routed


def compute_balance_loss(routed_LxX: Routed, tokens: int) -> jax.Array:
    """The auxiliary loss of what each layer routed of so many tokens; no unit."""
    layers, experts = routed_LxX.counts.shape
    rows = layers * tokens
    counts_X = routed_LxX.counts.sum(0) / rows
    scores_X = routed_LxX.scores.sum(0) / rows
    return experts * (counts_X * scores_X).sum()


def compute_load(counts_LxX: jax.Array) -> jax.Array:
    """The share of each layer's work that each expert had, [L, X]; 1/X where all are as busy."""
    return counts_LxX / counts_LxX.sum(-1, keepdims=True)
