"""Matrix products in the form that the platform computes fastest.

A CPU's compiler copies the left operand of a product when the dimension summed over is not its
last. The copy is not blocked, and slower the wider the operand. The gradients of weights are such
products. Here the narrower operand goes left, and the (small) result is transposed. Other platforms
get the plain product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def matmul_transposed(a: jax.Array, b: jax.Array, platform: str) -> jax.Array:
    """Multiply a^T b: [..., M, N] from a [..., K, M] and b [..., K, N]."""
    if platform != "cpu" or a.shape[-1] <= b.shape[-1]:
        return jnp.einsum("...km,...kn->...mn", a, b)
    # The barriers keep the compiler from turning the product round again.
    narrow = jax.lax.optimization_barrier(b.swapaxes(-1, -2))
    return jax.lax.optimization_barrier(narrow @ a).swapaxes(-1, -2)


def project(x: jax.Array, weight: jax.Array, platform: str) -> jax.Array:
    """Multiply x weight^T: [..., O] from x [..., I] and weight [O, I]."""
    if platform == "cpu":
        return _project(x, weight)
    return jnp.einsum("...i,oi->...o", x, weight)


@jax.custom_vjp
def _project(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, weight)


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _project(x, weight), (x, weight)


def _backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    gradient_NxO = gradient.reshape(-1, gradient.shape[-1])
    x_NxI = x.reshape(-1, x.shape[-1])
    to_x = jnp.einsum("...o,oi->...i", gradient, weight)
    return to_x, matmul_transposed(gradient_NxO, x_NxI, "cpu")


_project.defvjp(_forward, _backward)
