"""What a step lowers, summed over the tokens of a part of a batch: the loss, and what balances.

Shapes in names: B sequences of a part; T time, T1 is T + 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from trainer.model.decoder import ApplyLayers, Decoder
from trainer.model.experts import ROUTED, Routed
from trainer.model.precision import select_wide_dtype
from trainer.step.balance import compute_balance_loss
from trainer.step.loss import sum_token_losses

# Sums over tokens by name: loss; of a mixture balance_loss and load as well.
Sums = dict[str, jax.Array]


def sum_loss(
    network: Decoder,
    params: Any,
    tokens_BxT1: jax.Array,
    key: jax.Array | None,
    mask_B: jax.Array | None = None,
    layers: ApplyLayers | None = None,
    rows: int | None = None,
) -> jax.Array:
    """Sum the loss, nats, of predicting each token from those before it. With a key, dropout is on.

    mask: 1 for the sequences that count, None for all. layers: as `Decoder` takes it. rows: as
    `sum_token_losses` takes it.
    """
    return sum_routed_loss(network, params, tokens_BxT1, key, mask_B, layers, rows)[0]


def sum_routed_loss(
    network: Decoder,
    params: Any,
    tokens_BxT1: jax.Array,
    key: jax.Array | None,
    mask_B: jax.Array | None = None,
    layers: ApplyLayers | None = None,
    rows: int | None = None,
) -> tuple[jax.Array, Routed | None]:
    """`sum_loss`, and what each layer of a mixture routed; None for any other model."""
    rngs = {} if key is None else {"dropout": key}
    # T + 1 tokens give T predictions: each token but the last has a next one.
    inputs_BxT = tokens_BxT1[:, :-1]
    targets_BxT = tokens_BxT1[:, 1:]
    deterministic = key is None
    apply = partial(network.apply, rngs=rngs, head=False, layers=layers)
    routed = None
    if network.computation.experts:
        hidden_BxTxE, collections = apply(
            {"params": params}, inputs_BxT, deterministic, mutable=[ROUTED]
        )
        routed = network.find_routed(collections)
    else:
        hidden_BxTxE = apply({"params": params}, inputs_BxT, deterministic)
    head_VxE = network.head_weight(params)
    if mask_B is None:
        mask_B = jnp.ones(len(tokens_BxT1))
    bound = network.logit_cap
    layout = network.layout
    loss = sum_token_losses(hidden_BxTxE, head_VxE, targets_BxT, mask_B, layout, bound, rows)
    return loss, routed


def sum_objective(
    network: Decoder,
    params: Any,
    tokens_BxT1: jax.Array,
    key: jax.Array | None,
    layers: ApplyLayers | None = None,
    rows: int | None = None,
) -> tuple[jax.Array, Sums]:
    """What a step lowers, summed over tokens, nats, and the sums that it is made of.

    That is the loss, and for a mixture its coefficient times the loss that balances experts, which
    counts once for each token.
    """
    loss, routed = sum_routed_loss(network, params, tokens_BxT1, key, layers=layers, rows=rows)
    gate = network.model.gate
    if gate is None or routed is None:
        return loss, {"loss": loss}
    tokens = len(tokens_BxT1) * (tokens_BxT1.shape[1] - 1)
    balance = compute_balance_loss(routed, tokens) * tokens
    sums = {"loss": loss, "balance_loss": balance, "load": routed.counts}
    return loss + gate.values.get("auxiliary", 0.0) * balance, sums


def start_sums(network: Decoder) -> Sums:
    """Zeros for what `sum_objective` sums."""
    wide = select_wide_dtype(network.precision.compute)
    zero = jnp.zeros((), wide)
    if network.model.gate is None:
        return {"loss": zero}
    experts = (network.model.layer, network.model.sizes["expert"])
    return {"loss": zero, "balance_loss": zero, "load": jnp.zeros(experts, wide)}
