"""Matrix products in the form that the backend computes fastest.

On a CPU the compiler lays a product's left operand out anew, by an unblocked copy, when the dimension summed over is
not its last; that copy is the slower, the wider the operand. The gradients of weights are such products. Here the
narrower operand is the left one, and the (small) result is transposed. Other backends get the plain product. Knows
products; leaves what they are for to others.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def matmul_transposed(a: jax.Array, b: jax.Array, platform: str) -> jax.Array:
    """a^T b [..., M, N] of a [..., K, M] and b [..., K, N]."""
    if platform != "cpu" or a.shape[-1] <= b.shape[-1]:
        return jnp.einsum("...km,...kn->...mn", a, b)
    # The barriers keep the compiler from turning the product round again.
    narrow = jax.lax.optimization_barrier(b.swapaxes(-1, -2))
    return jax.lax.optimization_barrier(narrow @ a).swapaxes(-1, -2)


def project(x: jax.Array, weight: jax.Array, platform: str) -> jax.Array:
    """x weight^T [..., O] of x [..., I] and weight [O, I]."""
    return _project(x, weight) if platform == "cpu" else jnp.einsum("...i,oi->...o", x, weight)


@jax.custom_vjp
def _project(x, weight):
    return jnp.einsum("...i,oi->...o", x, weight)


def _forward(x, weight):
    return _project(x, weight), (x, weight)


def _backward(saved, gradient):
    x, weight = saved
    rows = [array.reshape(-1, array.shape[-1]) for array in (gradient, x)]
    return jnp.einsum("...o,oi->...i", gradient, weight), matmul_transposed(*rows, "cpu")


_project.defvjp(_forward, _backward)
