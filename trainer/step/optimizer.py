"""AdamW as growth needs it: clip, Adam, learning-rate multipliers and weight decay.

optax gives the vocabulary and the state, which others find by structure, as in any optax state.
Written here is what its adamw lacks: an eps, a learning-rate multiplier and a clip weight for each
parameter, as one number or one for each unit. With them an exactly grown model trains on exactly as
the small one would have. What growth made new may have a learning rate of its own beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from growkit.models.architecture import Architecture
from trainer.config.sections import Optimizer
from trainer.step.part import ALL, Part


@dataclass(frozen=True)
class Multipliers:
    """Trees with the structure of the parameters; None for all ones.

    Each leaf is broadcastable to its parameter. learning_rate: multiplies Adam's direction, and not
    the decay. eps: multiplies Adam's eps. clip: weighs squared gradients in the global norm. new:
    for each parameter the arrays of `growkit.growth.new.mark_new`, which say what of it is new and
    takes the factor of `optimizer.new`; None where the run has no such factor.
    """

    learning_rate: Any = None
    eps: Any = None
    clip: Any = None
    new: Any = None


def select_decayed(model: Architecture, part: Part = ALL) -> dict[str, Any]:
    """A tree of booleans: whether weight decay acts on a parameter, a matrix or an embedding."""
    return part.tree(model.table, lambda row: row.decays)


def select_multipliers_of(
    multipliers: Multipliers | None, model: Architecture, part: Part
) -> Multipliers | None:
    """The multipliers of the parameters that are trained."""
    if multipliers is None:
        return None
    trees = (multipliers.learning_rate, multipliers.eps, multipliers.clip, multipliers.new)
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


def scale_each(multipliers: Any, marks: Any = None) -> optax.GradientTransformationExtraArgs:
    """Multiply every update by its own factor, and what is new of it by the argument `new_factor`.

    multipliers: None for ones. marks: what is new of each, as in `Multipliers`; None for nothing.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, new_factor: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        if multipliers is not None:
            updates = jax.tree.map(jnp.multiply, updates, multipliers)
        if marks is not None:
            updates = jax.tree.map(partial(_scale_new, new_factor), updates, marks)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _scale_new(factor: jax.Array, update: jax.Array, marks: tuple[np.ndarray, ...]) -> jax.Array:
    """An update with its new numbers multiplied, in the factor's dtype, at least float32."""
    if not marks:
        return update
    new = reduce(jnp.logical_or, [jnp.asarray(mark) for mark in marks])
    scaled = (update.astype(factor.dtype) * factor).astype(update.dtype)
    # Chosen and not multiplied by 1, which a compiler may take as one with what follows: old
    # numbers keep their bits.
    return jnp.where(new, scaled, update)


def adamw(
    settings: Optimizer,
    model: Architecture,
    multipliers: Multipliers | None = None,
    part: Part = ALL,
) -> optax.GradientTransformationExtraArgs:
    """All of the update but the learning rate.

    The step applies that: new = params - rate x update. part: the parameters that are trained;
    multipliers are of these alone. Where they mark what is new, `update` takes `new_factor`.
    """
    multipliers = multipliers or Multipliers()
    clip = optax.identity()
    if settings.clip:
        clip = clip_by_norm(settings.clip, multipliers.clip)
    # The decay is not multiplied: it acts on the value, which carries the share already.
    scale = scale_each(multipliers.learning_rate, multipliers.new)
    # Always four parts, so that the state has one structure with and without clip and multipliers,
    # and can be handed from one to the other.
    chain = optax.chain(
        clip,
        scale_by_adam(settings.beta1, settings.beta2, settings.eps, multipliers.eps),
        scale,
        optax.add_decayed_weights(settings.weight_decay, mask=select_decayed(model, part)),
    )
    return optax.with_extra_args_support(chain)
