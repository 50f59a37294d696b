"""A network of two matrices whose hidden units are cloned, and optimizer states before and after.

Every hidden unit is there twice after growth: what reads the units (down) carries half of each.
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

import growkit

TABLE = """
up.kernel    /inputs mlp  normal  matrix
down.kernel  /mlp outputs  normal  matrix
"""
SMALL = growkit.describe_model(TABLE, {"inputs": 3, "mlp": 4, "outputs": 2})
PLAN = growkit.plan_width(SMALL, mlp=8)
INPUTS = np.random.default_rng(0).normal(size=(5, 3))
TARGETS = np.random.default_rng(1).normal(size=(5, 2))


def make_params():
    random = np.random.default_rng(2)
    return {
        "up": {"kernel": jnp.asarray(random.normal(size=(3, 4)))},
        "down": {"kernel": jnp.asarray(random.normal(size=(4, 2)))},
    }


def compute(params, inputs=INPUTS):
    return jnp.tanh(inputs @ params["up"]["kernel"]) @ params["down"]["kernel"]


def loss(params):
    return jnp.square(compute(params) - TARGETS).mean()


def feed(optimizer, params, gradients):
    """The state after gradients of fixed parameters, so that only the state is at stake."""
    state = optimizer.init(params)
    for gradient in gradients:
        _, state = optimizer.update(gradient, state, params)
    return state


def list_points():
    """Parameters at which gradients are taken, the same functions small and grown."""
    params = make_params()
    moves = np.random.default_rng(3).normal(scale=0.1, size=(5,))
    return [jax.tree.map(lambda leaf, move=move: leaf * (1 + move), params) for move in moves]


@cache
def take_gradients():
    """(points, gradients) of the small model, and the same of the grown one, in float64."""
    points = list_points()
    grown = [growkit.grow(point, PLAN) for point in points]
    slope = jax.jit(jax.grad(loss))
    return tuple((each, [slope(point) for point in each]) for each in (points, grown))


def feed_both(optimizer, steps=5):
    """(the state of the small model, of the grown model) after the same functions' gradients."""
    (small_points, small), (wide_points, wide) = take_gradients()
    # Without jit, because compiling what is conditional takes longer than all else.
    with jax.disable_jit():
        return (
            feed(optimizer, small_points[0], small[:steps]),
            feed(optimizer, wide_points[0], wide[:steps]),
        )


def states(optimizer, nu="square"):
    """(the grown state, the state of the grown model) after the same functions' gradients."""
    small, wide = feed_both(optimizer)
    return growkit.grow(small, PLAN, nu), wide


def gap(ours, theirs) -> float:
    leaves = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(
        float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max(initial=0.0))
        / max(float(np.abs(np.asarray(b, float)).max(initial=0.0)), 1e-9)
        for a, b in leaves
        if np.ndim(a) > 1
    )


def restore_plainly(node):
    """A state as Orbax restores it without a template: dicts for classes, lists for chains."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return {name: restore_plainly(part) for name, part in node._asdict().items()}
    if isinstance(node, tuple | list):
        return [restore_plainly(part) for part in node]
    if isinstance(node, dict):
        return {name: restore_plainly(part) for name, part in node.items()}
    return node


def list_matrices(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if np.ndim(leaf) > 1]
