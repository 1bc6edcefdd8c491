"""Bricks for the insides of TPU kernels: functions of 2-D float32 tiles that Mosaic lowers, forward and backward.

Mosaic has no running sum: log decays are summed by doubling. As in `kernels.decay` only the wanted terms are summed and
nothing is subtracted. C is the number of tokens of a chunk, a power of two; a gate of one number a token comes as a row
[1, C], a gate of K channels as [C, K].
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

SUBLANES = 8
SOLVED_ROWS = 16  # of a triangular system, one after another; larger blocks by matrix products

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


def _parting(level: int, i: jax.Array, j: jax.Array) -> jax.Array:
    """Where i and j lie in the right and the left one of two neighbouring blocks of `level` tokens."""
    apart = i ^ j  # the highest bit tells the level
    return (apart >= level) & (apart < 2 * level) & (i > j)


def _right(level: int, i: jax.Array, j: jax.Array) -> jax.Array:
    return i & level != 0


def _left(level: int, i: jax.Array, j: jax.Array) -> jax.Array:
    return i & level == 0


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _later(x: jax.Array, tokens: int) -> jax.Array:
    """Rows moved on by so many tokens (back where negative), zeros moved in."""
    filling = jnp.zeros((abs(tokens), x.shape[1]), x.dtype)
    parts = [filling, x[:-tokens]] if tokens > 0 else [x[-tokens:], filling]
    return jnp.concatenate(parts, axis=0)


_later.defvjp(lambda x, tokens: (_later(x, tokens), None), lambda tokens, _, d: (_later(d, -tokens),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _swapped(x: jax.Array, level: int) -> jax.Array:
    """Neighbouring blocks of `level` rows in each other's place."""
    size = x.shape[0]
    if level < SUBLANES:
        from_right, from_left = pltpu.roll(x, size - level, 0), pltpu.roll(x, level, 0)
        return only(from_right, partial(_left, level)) + only(from_left, partial(_right, level))
    starts = [start ^ level for start in range(0, size, level)]
    return jnp.concatenate([x[start : start + level] for start in starts], axis=0)


_swapped.defvjp(lambda x, level: (_swapped(x, level), None), lambda level, _, d: (_swapped(d, level),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def only(x: jax.Array, where: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """x where `where(row, column)` of the place holds, else 0; the gradient makes the mask again, keeping none."""
    i, j = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return jnp.where(where(i, j), x, 0.0)


only.defvjp(lambda x, where: (only(x, where), None), lambda where, _, d: (only(d, where),))


def _square(row: jax.Array) -> jax.Array:
    return jnp.broadcast_to(row, (row.shape[1], row.shape[1]))


def column(row: jax.Array) -> jax.Array:
    """[1, C] → [C, 1]."""
    return jnp.sum(only(_square(row), operator.eq), axis=1, keepdims=True)


def diagonal(x: jax.Array) -> jax.Array:
    """[C, 1] → [C, C]."""
    return only(jnp.broadcast_to(x, (x.shape[0], x.shape[0])), operator.eq)


def row_sums(g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[1, C] log decays → sums up to and with each token [C, 1], after it [C, 1], and in all [1, 1]."""
    upto = jnp.sum(only(_square(g), operator.ge), axis=1, keepdims=True)
    after = jnp.sum(only(_square(g), operator.lt), axis=1, keepdims=True)
    return upto, after, jnp.sum(g, axis=1, keepdims=True)


def pair_sums(g: jax.Array) -> jax.Array:
    """[1, C] log decays → [C, C]: g_{j+1} + … + g_i at (i, j), i > j; 0 elsewhere."""
    sums = only(jnp.broadcast_to(column(g), (g.shape[1], g.shape[1])), operator.gt)
    level = 1
    while level < g.shape[1]:
        sums += _later(sums, level)
        level *= 2
    return sums


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _level_products(
    rows: jax.Array, columns: jax.Array, sums: jax.Array, level: int, precision: lax.Precision
) -> jax.Array:
    """[C, K] each → [C, C]: products of rows_i and columns_j, times exp(sums), where i and j part at this level."""
    decay = jnp.exp(sums)
    return only(dot(rows * decay, columns * decay, "nt", precision), partial(_parting, level))


def _level_products_forward(*arguments: Any) -> Any:
    return _level_products(*arguments), arguments[:3]


def _level_products_backward(level: int, precision: lax.Precision, kept: Any, d: jax.Array) -> tuple[jax.Array, ...]:
    rows, columns, sums = kept
    decay = jnp.exp(sums)
    rows, columns = rows * decay, columns * decay
    d = only(d, partial(_parting, level))
    d_rows, d_columns = dot(d, columns, "nn", precision), dot(d, rows, "tn", precision)
    return d_rows * decay, d_columns * decay, d_rows * rows + d_columns * columns


_level_products.defvjp(_level_products_forward, _level_products_backward)


def level_sums(g: jax.Array) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """Sums of log decays [C, K] within blocks of 1, 2, 4, … tokens, by doubling.

    Returns:
      For each size but C, [C, K]: in the right one of two neighbouring blocks the sum up to and with a token, in the
      left one that after it. And for the chunk those up to and with each token [C, K], after it [C, K], in all [1, K].
    """
    upto, after, whole = g, jnp.zeros_like(g), g
    levels = []
    level = 1
    while level < g.shape[0]:
        levels.append(only(upto, partial(_right, level)) + only(after, partial(_left, level)))
        other = _swapped(whole, level)
        upto += only(other, partial(_right, level))
        after += only(other, partial(_left, level))
        whole += other
        level *= 2
    return levels, (upto, after, whole[:1])


def decayed_products(
    rows: jax.Array, columns: jax.Array, levels: Sequence[jax.Array], precision: lax.Precision
) -> jax.Array:
    """[C, K] twice → [C, C]: sum_k rows_ik columns_jk exp(g_{j+1,k} + … + g_{i,k}) where i > j; else 0.

    As in `kernels.decay`, where i and j part at a level the decay is that up to and with i within its block times that
    after j within its own, both in `levels`, those of `level_sums`.
    """
    products = jnp.zeros((rows.shape[0], rows.shape[0]), jnp.float32)
    for n, sums in enumerate(levels):
        products += _level_products(rows, columns, sums, 2**n, precision)
    return products


def _column_of_block(size: int, column: int, i: jax.Array, j: jax.Array) -> jax.Array:
    """Where j is token `column` of i's block of `size` tokens."""
    return j == (i & -size) + column


def _inverse(a: jax.Array) -> jax.Array:
    """[C, C], strictly lower triangular → (I + a)⁻¹.

    Diagonal blocks by substitution, all of them at once; from them larger ones:
    [[I + a_1, 0], [b, I + a_2]]⁻¹ = [[x_1, 0], [-x_2 b x_1, x_2]]. All numbers on the way are part of the inverse,
    unlike those of the power series of a, which cancel where keys repeat.
    """
    size = a.shape[0]
    level = min(SOLVED_ROWS, size)
    inverse = only(jnp.ones_like(a), operator.eq)
    starts = range(0, size, level)
    for row in range(level - 1):
        factors = jnp.sum(only(a, partial(_column_of_block, level, row)), axis=1, keepdims=True)
        solved = [jnp.broadcast_to(inverse[n + row : n + row + 1], (level, size)) for n in starts]
        inverse -= factors * jnp.concatenate(solved, axis=0)
    while level < size:
        corner = dot(inverse, only(a, partial(_parting, level)), "nn", lax.Precision.HIGHEST)
        inverse -= dot(corner, inverse, "nn", lax.Precision.HIGHEST)
        level *= 2
    return inverse


@jax.custom_vjp
def solve(a: jax.Array, sides: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """[C, C], strictly lower triangular, and right-hand sides [C, F] → (I + a)⁻¹ times each."""
    return _solve_forward(a, sides)[0]


def _solve_forward(a: jax.Array, sides: tuple[jax.Array, ...]) -> Any:
    inverse = _inverse(a)
    solved = tuple(dot(inverse, side, "nn", lax.Precision.HIGHEST) for side in sides)
    return solved, (inverse, solved)


def _solve_backward(kept: Any, d_solved: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    inverse, solved = kept
    d_sides = tuple(dot(inverse, d, "tn", lax.Precision.HIGHEST) for d in d_solved)
    products = [dot(d, x, "nt", lax.Precision.HIGHEST) for d, x in zip(d_sides, solved, strict=True)]
    return only(-sum(products[1:], products[0]), operator.gt), d_sides


solve.defvjp(_solve_forward, _solve_backward)
