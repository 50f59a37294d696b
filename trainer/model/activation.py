"""Activation functions, each with a backward pass that reads nothing but the input.

They are computed in at least float32, whatever the dtype of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from trainer.model.precision import widen

Function = Callable[[jax.Array], jax.Array]


def define_activation(value: Function, slope: Function) -> Function:
    """The function with this value and this derivative, both of wide numbers."""

    @jax.custom_vjp
    def activate(x: jax.Array) -> jax.Array:
        return value(widen(x)).astype(x.dtype)

    def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return activate(x), x

    def backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
        # The barrier keeps the compiler from saving intermediate values of the forward pass: it is
        # cheaper to read x alone and compute them again.
        wide = widen(jax.lax.optimization_barrier(x))
        return ((widen(gradient) * slope(wide)).astype(x.dtype),)

    activate.defvjp(forward, backward)
    return activate


def _cumulative(x: jax.Array) -> jax.Array:
    """The cumulative normal distribution."""
    return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu(x: jax.Array) -> jax.Array:
    return x * _cumulative(x)


def _gelu_slope(x: jax.Array) -> jax.Array:
    density = jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)
    return _cumulative(x) + x * density


# The approximation of gelu: 0.5 x (1 + tanh(A (x + B x^3))).
A = math.sqrt(2 / math.pi)
B = 0.044715


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1.0 + jnp.tanh(A * (x + B * x * x * x)))


def _gelu_tanh_slope(x: jax.Array) -> jax.Array:
    bent = jnp.tanh(A * (x + B * x * x * x))
    inner = A * (1.0 + 3 * B * jnp.square(x))
    return 0.5 * (1.0 + bent) + 0.5 * x * (1.0 - jnp.square(bent)) * inner


def _silu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(x)


def _silu_slope(x: jax.Array) -> jax.Array:
    sigmoid = jax.nn.sigmoid(x)
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


def _relu_slope(x: jax.Array) -> jax.Array:
    return (x > 0).astype(x.dtype)


# gelu: Hendrycks and Gimpel, arXiv 1606.08415, by erf and by tanh. silu: arXiv 1702.03118.
gelu = define_activation(_gelu, _gelu_slope)
gelu_tanh = define_activation(_gelu_tanh, _gelu_tanh_slope)
silu = define_activation(_silu, _silu_slope)
relu = define_activation(jax.nn.relu, _relu_slope)

# By transformers' names.
ACTIVATIONS: dict[str, Function] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
    "silu": silu,
}
