"""AdamW as growth needs it: clip, Adam, learning-rate multipliers and decay.

optax gives the vocabulary and the state (found structurally, as any optax state); written here is what its
adamw lacks: an eps, a learning-rate multiplier and a clip weight for each parameter, scalar or for each unit,
with which an exactly grown model goes on exactly as the small one would. Knows no model and no data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from growkit.models.architecture import Architecture
from trainer.config.sections import Optimizer


@dataclass(frozen=True)
class Multipliers:
    """Trees of the parameters' structure, their leaves broadcastable to the parameters; None for all ones.

    learning_rate multiplies the Adam direction and leaves decay alone; eps multiplies Adam's eps; clip
    weighs squared gradients in the global norm.
    """

    learning_rate: Any = None
    eps: Any = None
    clip: Any = None


def select_decayed(model: Architecture) -> dict[str, Any]:
    """The parameters' tree of booleans: weight decay acts on matrices and embeddings."""
    return model.table.tree(lambda row: row.decays)


def global_norm(gradients: Any, weights: Any = None) -> jax.Array:
    """sqrt of the sum over all elements of weight x gradient squared."""
    squares = jax.tree.map(jnp.square, gradients)
    if weights is not None:
        squares = jax.tree.map(jnp.multiply, squares, weights)
    return jnp.sqrt(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(squares)))


def clip_by_norm(limit: float, weights: Any = None) -> optax.GradientTransformation:
    """Scale all gradients down together when their weighted global norm exceeds `limit`."""

    def update(updates, state, params=None):
        norm = global_norm(updates, weights)
        scale = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        return jax.tree.map(lambda update: update * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adam(
    beta1: float, beta2: float, eps: float, multipliers: Any = None
) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980), algorithm 1, with its eps multiplied for each parameter; optax's own state."""

    def update(updates, state, params=None):
        mu = optax.tree.update_moment(updates, state.mu, beta1, 1)
        nu = optax.tree.update_moment(updates, state.nu, beta2, 2)
        count = optax.safe_increment(state.count)
        factors = jax.tree.map(lambda _: 1.0, mu) if multipliers is None else multipliers
        direction = jax.tree.map(
            lambda m, v, factor: m / (jnp.sqrt(v) + eps * factor),
            optax.tree.bias_correction(mu, beta1, count),
            optax.tree.bias_correction(nu, beta2, count),
            factors,
        )
        return direction, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam(beta1, beta2, eps).init, update)


def scale_each(multipliers: Any) -> optax.GradientTransformation:
    """Multiply every update by its own factor."""
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, multipliers))


def adamw(
    settings: Optimizer, model: Architecture, multipliers: Multipliers | None = None
) -> optax.GradientTransformation:
    """The whole update but for the learning rate, which the step applies: new = params - rate x update."""
    multipliers = multipliers or Multipliers()
    rates = multipliers.learning_rate
    # Always four parts: the state has one structure, with multipliers and without, so that it can be handed over.
    return optax.chain(
        clip_by_norm(settings.clip, multipliers.clip) if settings.clip else optax.identity(),
        scale_by_adam(settings.beta1, settings.beta2, settings.eps, multipliers.eps),
        optax.identity() if rates is None else scale_each(rates),
        optax.add_decayed_weights(settings.weight_decay, mask=select_decayed(model)),
    )
