"""Bricks for the insides of TPU kernels: functions of 2-D float32 tiles that Mosaic lowers, forward and backward.

Mosaic has no running sum, so sums of log decays are products with 0/1 matrices made from iotas, in full float32. As in
`kernels.decay` only the wanted terms are summed and nothing is subtracted. C is the number of tokens of a chunk, a
power of two; a gate of one number a token comes as a row [1, C], a gate of K channels as [C, K].
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Which axis of each operand is summed over; n: as it is, t: transposed.
_CONTRACTED = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot(a: jax.Array, b: jax.Array, form: str, precision: lax.Precision) -> jax.Array:
    """a b ("nn"), a bᵀ ("nt") or aᵀ b ("tn"); the gradients are of these forms again, so nothing gets transposed."""
    left, right = _CONTRACTED[form]
    return lax.dot_general(
        a, b, (((left,), (right,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _dot_forward(a: jax.Array, b: jax.Array, form: str, precision: lax.Precision) -> Any:
    return dot(a, b, form, precision), (a, b)


def _dot_backward(form: str, precision: lax.Precision, operands: Any, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = operands
    if form == "nn":
        return dot(d, b, "nt", precision), dot(a, d, "tn", precision)
    if form == "nt":
        return dot(d, b, "nn", precision), dot(d, a, "tn", precision)
    return dot(b, d, "nt", precision), dot(a, d, "nn", precision)


dot.defvjp(_dot_forward, _dot_backward)


def token_indices(size: int) -> tuple[jax.Array, jax.Array]:
    """[C, C] twice: the token of the row and the token of the column."""
    return lax.broadcasted_iota(jnp.int32, (size, size), 0), lax.broadcasted_iota(jnp.int32, (size, size), 1)


def _parting(i: jax.Array, j: jax.Array, level: int) -> jax.Array:
    """Where i and j lie in the right and the left one of two neighbouring blocks of `level` tokens."""
    apart = i ^ j  # the highest bit tells the level
    return (apart >= level) & (apart < 2 * level) & (i > j)


def _sums(mask: jax.Array, g: jax.Array) -> jax.Array:
    """[C, C] bool and [C, K] → [C, K]: sums of the rows that the mask's rows choose."""
    return dot(mask.astype(jnp.float32), g, "nn", lax.Precision.HIGHEST)


def column(row: jax.Array) -> jax.Array:
    """[1, C] → [C, 1]."""
    i, j = token_indices(row.shape[1])
    return jnp.sum(jnp.where(i == j, row, 0.0), axis=1, keepdims=True)


def chunk_sums(g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of log decays up to and with each token, after it, and in all: [C, 1] or [C, K] twice, [1, 1] or [1, K]."""
    if g.shape[0] == 1:
        i, j = token_indices(g.shape[1])
        upto = jnp.sum(jnp.where(j <= i, g, 0.0), axis=1, keepdims=True)
        after = jnp.sum(jnp.where(j > i, g, 0.0), axis=1, keepdims=True)
        return upto, after, jnp.sum(g, axis=1, keepdims=True)
    i, j = token_indices(g.shape[0])
    return _sums(j <= i, g), _sums(j > i, g), jnp.sum(g, axis=0, keepdims=True)


def pair_decays(g: jax.Array) -> jax.Array:
    """[1, C] log decays → [C, C]: exp(g_{j+1} + … + g_i) at (i, j), i > j; 1 elsewhere."""
    i, j = token_indices(g.shape[1])
    upto = jnp.where(j <= i, g, 0.0)
    return jnp.exp(dot(upto, (i > j).astype(jnp.float32), "nn", lax.Precision.HIGHEST))


def decayed_products(rows: jax.Array, columns: jax.Array, g: jax.Array, precision: lax.Precision) -> jax.Array:
    """[C, K] three times → [C, C]: at (i, j), i > j, sum_k rows_ik columns_jk exp(g_{j+1,k} + … + g_{i,k}); else 0.

    By doubling as in `kernels.decay`: pairs whose tokens lie in the right and the left one of two neighbouring blocks
    of 1, 2, 4, … tokens.
    """
    size = g.shape[0]
    i, j = token_indices(size)
    products = jnp.zeros((size, size), jnp.float32)
    level = 1
    while level < size:
        # In a right block the sum up to i within the block, in a left one that after i.
        within = (i ^ j < level) & (((i & level) != 0) == (j <= i))
        decay = jnp.exp(_sums(within, g))
        products += jnp.where(_parting(i, j, level), dot(rows * decay, columns * decay, "nt", precision), 0.0)
        level *= 2
    return products


def _inverse(a: jax.Array) -> jax.Array:
    """[C, C], strictly lower triangular → (I + a)⁻¹.

    Block by block: [[I + a_11, 0], [a_21, I + a_22]]⁻¹ = [[x_1, 0], [-x_2 a_21 x_1, x_2]], with x_1 and x_2 the inverses
    of the diagonal blocks, of 1, 2, 4, … rows. All intermediate numbers are part of the inverse, unlike those of the
    power series of a, which cancel where keys repeat.
    """
    i, j = token_indices(a.shape[0])
    inverse = (i == j).astype(jnp.float32)
    level = 1
    while level < a.shape[0]:
        corner = jnp.where(_parting(i, j, level), a, 0.0)
        if level > 1:
            corner = dot(dot(inverse, corner, "nn", lax.Precision.HIGHEST), inverse, "nn", lax.Precision.HIGHEST)
        inverse -= corner
        level *= 2
    return inverse


@jax.custom_vjp
def solve(a: jax.Array, b: jax.Array) -> jax.Array:
    """[C, C], strictly lower triangular, and [C, V] → (I + a)⁻¹ b."""
    return dot(_inverse(a), b, "nn", lax.Precision.HIGHEST)


def _solve_forward(a: jax.Array, b: jax.Array) -> Any:
    inverse = _inverse(a)
    solved = dot(inverse, b, "nn", lax.Precision.HIGHEST)
    return solved, (inverse, solved)


def _solve_backward(kept: Any, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse, solved = kept
    d_b = dot(inverse, d, "tn", lax.Precision.HIGHEST)
    i, j = token_indices(inverse.shape[0])
    return jnp.where(i > j, -dot(d_b, solved, "nt", lax.Precision.HIGHEST), 0.0), d_b


solve.defvjp(_solve_forward, _solve_backward)
