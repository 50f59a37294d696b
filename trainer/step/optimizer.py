"""AdamW as growth needs it: clip, Adam, learning-rate multipliers and weight decay.

optax gives the vocabulary and the state, which others find by structure, as in any optax state.
Written here is what its adamw lacks: an eps, a learning-rate multiplier and a clip weight for each
parameter, as one number or one for each unit. With them an exactly grown model trains on exactly as
the small one would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from growkit.models.architecture import Architecture
from trainer.config.sections import Optimizer
from trainer.step.part import ALL, Part


@dataclass(frozen=True)
class Multipliers:
    """Trees with the structure of the parameters; None for all ones.

    Each leaf is broadcastable to its parameter. learning_rate: multiplies Adam's direction, and not
    the decay. eps: multiplies Adam's eps. clip: weighs squared gradients in the global norm.
    """

    learning_rate: Any = None
    eps: Any = None
    clip: Any = None


def select_decayed(model: Architecture, part: Part = ALL) -> dict[str, Any]:
    """A tree of booleans: whether weight decay acts on a parameter, a matrix or an embedding."""
    return part.tree(model.table, lambda row: row.decays)


def select_multipliers_of(
    multipliers: Multipliers | None, model: Architecture, part: Part
) -> Multipliers | None:
    """The multipliers of the parameters that are trained."""
    if multipliers is None:
        return None
    trees = (multipliers.learning_rate, multipliers.eps, multipliers.clip)
    return Multipliers(*(part.select_factors(model.table, tree) for tree in trees))


def global_norm(gradients: Any, weights: Any = None) -> jax.Array:
    """sqrt of the sum, over all elements, of weight x gradient squared."""
    squares = jax.tree.map(jnp.square, gradients)
    if weights is not None:
        squares = jax.tree.map(jnp.multiply, squares, weights)
    return jnp.sqrt(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(squares)))


def clip_by_norm(limit: float, weights: Any = None) -> optax.GradientTransformation:
    """Scale all gradients down together when their weighted global norm exceeds `limit`."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = global_norm(updates, weights)
        # tiny is the smallest normal float: a gradient of zero is divided by it and not by zero.
        scale = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        return jax.tree.map(lambda update: update * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adam(
    beta1: float, beta2: float, eps: float, multipliers: Any = None
) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980), algorithm 1, with its eps multiplied for each parameter.

    The state is optax's own.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mu = optax.tree.update_moment(updates, state.mu, beta1, 1)
        nu = optax.tree.update_moment(updates, state.nu, beta2, 2)
        count = optax.safe_increment(state.count)
        factors = multipliers
        if factors is None:
            factors = jax.tree.map(lambda _: 1.0, mu)
        # eps outside the root, as in Adam's algorithm 1 and in PyTorch: then eps x share is what
        # keeps a copy's direction the source's.
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
    settings: Optimizer,
    model: Architecture,
    multipliers: Multipliers | None = None,
    part: Part = ALL,
) -> optax.GradientTransformation:
    """All of the update but the learning rate.

    The step applies that: new = params - rate x update. part: the parameters that are trained;
    multipliers are of these alone.
    """
    multipliers = multipliers or Multipliers()
    clip = optax.identity()
    if settings.clip:
        clip = clip_by_norm(settings.clip, multipliers.clip)
    # The decay is not multiplied: it acts on the value, which carries the share already.
    scale = optax.identity()
    if multipliers.learning_rate is not None:
        scale = scale_each(multipliers.learning_rate)
    # Always four parts, so that the state has one structure with and without clip and multipliers,
    # and can be handed from one to the other.
    return optax.chain(
        clip,
        scale_by_adam(settings.beta1, settings.beta2, settings.eps, multipliers.eps),
        scale,
        optax.add_decayed_weights(settings.weight_decay, mask=select_decayed(model, part)),
    )
