"""Sums of log decays inside chunks of time, for the XLA forms, by doubling: pairs of blocks of 1, 2, 4, … tokens.

Decay from token j to a later token i is exp(g_{j+1} + … + g_i). Chunk algorithms usually write it as exp(G_i) exp(-G_j)
with a running sum G; exp(-G_j) overflows for strong gates, and G_i - G_j loses digits for weak gates after strong ones.
Here nothing is subtracted. Where j is in the left and i in the right one of two neighbouring blocks, the decay is
exp(sum after j within its block) · exp(sum up to i within its block): both at most 1, and an underflow only ever
stands for a product that is smaller still. Every pair i > j is split so at exactly one level.

Arrays are [..., N, C, *]: N chunks of C tokens, C a power of two. Blocks of all chunks share one axis, [..., M, s, *]:
XLA's CPU backend (jaxlib 0.10) crashes on products of arrays with many axes.
"""

import jax
import jax.numpy as jnp

SMALL = 4  # tokens; chunks are at least as long


def _pair(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Splits an axis of pairs of blocks into the left and the right ones."""
    axis %= x.ndim
    x = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    return jax.lax.index_in_dim(x, 0, axis + 1, keepdims=False), jax.lax.index_in_dim(x, 1, axis + 1, keepdims=False)


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[..., N, C, F] → [..., M, size, F]."""
    return x.reshape(*x.shape[:-3], -1, size, x.shape[-1])


def _corner(left: jax.Array, low: jax.Array, right: jax.Array, fill: float) -> jax.Array:
    """[..., s, s] blocks → [..., 2s, 2s]: [[left, fill], [low, right]]."""
    top = jnp.concatenate([left, jnp.full_like(left, fill)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([low, right], axis=-1)], axis=-2)


def _levels(g: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """[..., N, C, F] → for blocks of s = 1, 2, …, C tokens: sums up to and with i, and after j, each [..., M, s, F]."""
    upto = _blocks(g, 1)
    after = jnp.zeros_like(upto)
    levels = [(upto, after)]
    while upto.shape[-2] < g.shape[-2]:
        (upto_l, upto_r), (after_l, after_r) = _pair(upto, -3), _pair(after, -3)
        upto = jnp.concatenate([upto_l, upto_r + upto_l[..., -1:, :]], axis=-2)
        after = jnp.concatenate([after_l + upto_r[..., -1:, :], after_r], axis=-2)
        levels.append((upto, after))
    return levels


def chunk_sums(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., N, C, F] log decays → sums from the chunk's start to i, and after j to its end, each [..., N, C, F]."""
    return _levels(g)[-1]


def pair_sums(g: jax.Array) -> jax.Array:
    """[..., N, C, 1] log decays → [..., N, C, C]: g_{j+1} + … + g_i at (i, j), 0 on the diagonal, -inf above it."""
    sums = jnp.zeros_like(_blocks(g, 1))
    for upto, after in _levels(g)[:-1]:
        low = _pair(upto, -3)[1] + _pair(after, -3)[0].mT
        left, right = _pair(sums, -3)
        sums = _corner(left, low, right, -jnp.inf)
    return sums


def decayed_products(rows: jax.Array, columns: jax.Array, g: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    """[..., N, C, K] each → [..., N, C, C]: sum_k rows_ik columns_jk exp(g_{j+1,k} + … + g_{i,k}), i > j, else 0."""
    products = _small_products(_blocks(rows, SMALL), _blocks(columns, SMALL), _blocks(g, SMALL), precision)
    for upto, after in _levels(g)[SMALL.bit_length() - 1 : -1]:
        size = upto.shape[-2]
        right = _pair(_blocks(rows, size), -3)[1] * jnp.exp(_pair(upto, -3)[1])
        left = _pair(_blocks(columns, size), -3)[0] * jnp.exp(_pair(after, -3)[0])
        above, below = _pair(products, -3)
        products = _corner(above, jnp.matmul(right, left.mT, precision=precision), below, 0.0)
    return products


def own_products(rows: jax.Array, columns: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    """[..., C, K] each → [..., C, C]: the diagonal that `decayed_products` leaves out, sum_k rows_ik columns_ik.

    A product with ones: as a sum beside a scan, XLA's CPU backend (jaxlib 0.10 and 0.12) gives garbage for some sizes,
    K = 32 among them, and another with each compilation.
    """
    sums = jnp.matmul(rows * columns, jnp.ones((rows.shape[-1], 1), rows.dtype), precision=precision)
    return sums * jnp.eye(rows.shape[-2], dtype=rows.dtype)


def _small_products(rows: jax.Array, columns: jax.Array, g: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    """`decayed_products` within blocks of SMALL tokens, [..., M, SMALL, K] → [..., M, SMALL, SMALL], by diagonals.

    So small matrix products do not pay. To move every column on by a token takes one multiplication by exp(g). The sum
    over K is a product with ones because XLA's CPU backend vectorises that, and not always a reduction.
    """
    decay, ones = jnp.exp(g), jnp.ones((g.shape[-1], 1), g.dtype)
    shift = [(0, 0, 0)] * (g.ndim - 2) + [(1, -1, 0), (0, 0, 0)]
    products = jnp.zeros((SMALL, SMALL), g.dtype)
    for distance in range(1, SMALL):
        columns = decay * jax.lax.pad(columns, jnp.zeros((), g.dtype), shift)
        diagonal = jnp.matmul(rows * columns, ones, precision=precision)
        products += diagonal * jnp.eye(SMALL, k=-distance, dtype=g.dtype)
    return products
