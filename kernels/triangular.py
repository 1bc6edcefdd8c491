"""Many small unit lower triangular systems at once, by inverting halves: stable, and nearly all matrix products."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

SMALL = 8  # rows; products of smaller matrices are written as sums, which XLA fuses


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def solve(strict: jax.Array, right: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    """X of (I + strict) X = right for strictly lower triangular [..., N, C, C] and [..., N, C, F], C a power of two."""
    return jnp.matmul(_inverse(strict, precision), right, precision=precision)


def _solve_forward(strict: jax.Array, right: jax.Array, precision: jax.lax.Precision) -> Any:
    inverse = _inverse(strict, precision)
    solution = jnp.matmul(inverse, right, precision=precision)
    return solution, (inverse, solution)


def _solve_backward(precision: jax.lax.Precision, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> Any:
    inverse, solution = residuals
    d_right = jnp.matmul(inverse.mT, cotangent, precision=precision)
    return -jnp.tril(jnp.matmul(d_right, solution.mT, precision=precision), -1), d_right


solve.defvjp(_solve_forward, _solve_backward)


def _inverse(strict: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    """(I + strict)^{-1} for [..., N, s, s]."""
    size = strict.shape[-1]
    if size == 1:
        return jnp.ones_like(strict)
    half = size // 2
    halves = jnp.concatenate([strict[..., :half, :half], strict[..., half:, half:]], axis=-3)
    above, below = jnp.split(_inverse(halves, precision), 2, axis=-3)
    low = -_product(_product(below, strict[..., half:, :half], precision), above, precision)
    top = jnp.concatenate([above, jnp.zeros_like(above)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([low, below], axis=-1)], axis=-2)


def _product(a: jax.Array, b: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    if a.shape[-1] < SMALL:
        return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)
    return jnp.matmul(a, b, precision=precision)
