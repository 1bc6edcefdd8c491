"""Sums of log decays inside a chunk of time, for the XLA forms, by doubling: pairs of blocks of 1, 2, 4, … tokens.

Decay from token j to a later token i is exp(g_{j+1} + … + g_i). Chunk algorithms usually write it as exp(G_i) exp(-G_j)
with a running sum G; exp(-G_j) overflows for strong gates, and G_i - G_j loses digits for weak gates after strong ones.
Here nothing is subtracted. Where j is in the left and i in the right one of two neighbouring blocks, the decay is
exp(sum after j within its block) · exp(sum up to i within its block): both at most 1, and an underflow only ever
stands for a product that is smaller still. Every pair i > j is split so at exactly one level.

Arrays are [..., C, *] with C a power of two.
"""

import jax
import jax.numpy as jnp


def _pair(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Splits an axis of pairs of blocks into the left and the right ones."""
    axis %= x.ndim
    x = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    return jax.lax.index_in_dim(x, 0, axis + 1, keepdims=False), jax.lax.index_in_dim(x, 1, axis + 1, keepdims=False)


def _corner(left: jax.Array, low: jax.Array, right: jax.Array, fill: float) -> jax.Array:
    """[..., s, s] blocks → [..., 2s, 2s]: [[left, fill], [low, right]]."""
    top = jnp.concatenate([left, jnp.full_like(left, fill)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([low, right], axis=-1)], axis=-2)


def _levels(g: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """[..., C, F] → for blocks of s = 1, 2, …, C tokens: sums up to and with i, and after j, each [..., C/s, s, F]."""
    upto, after = g[..., None, :], jnp.zeros_like(g)[..., None, :]
    levels = [(upto, after)]
    while upto.shape[-3] > 1:
        (upto_l, upto_r), (after_l, after_r) = _pair(upto, -3), _pair(after, -3)
        upto = jnp.concatenate([upto_l, upto_r + upto_l[..., -1:, :]], axis=-2)
        after = jnp.concatenate([after_l + upto_r[..., -1:, :], after_r], axis=-2)
        levels.append((upto, after))
    return levels


def chunk_sums(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., C, F] log decays → sums from the chunk's start to i, and from after j to its end, each [..., C, F]."""
    upto, after = _levels(g)[-1]
    return upto[..., 0, :, :], after[..., 0, :, :]


def pair_sums(g: jax.Array) -> jax.Array:
    """[..., C] log decays → [..., C, C]: g_{j+1} + … + g_i at (i, j), 0 on the diagonal, -inf above it."""
    levels = _levels(g[..., None])
    sums = jnp.zeros_like(g)[..., None, None]
    for upto, after in levels[:-1]:
        low = _pair(upto[..., 0], -2)[1][..., :, None] + _pair(after[..., 0], -2)[0][..., None, :]
        left, right = _pair(sums, -3)
        sums = _corner(left, low, right, -jnp.inf)
    return sums[..., 0, :, :]


def decayed_products(rows: jax.Array, columns: jax.Array, g: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    """[..., C, K] each → [..., C, C]: sum_k rows_ik columns_jk exp(g_{j+1,k} + … + g_{i,k}) where i > j, else 0."""
    products = jnp.zeros((*jnp.broadcast_shapes(rows.shape[:-1], columns.shape[:-1]), 1, 1), g.dtype)
    for upto, after in _levels(g)[:-1]:
        size = upto.shape[-2]
        blocks = (upto.shape[-3], size, g.shape[-1])
        right = _pair(rows.reshape(*rows.shape[:-2], *blocks), -3)[1] * jnp.exp(_pair(upto, -3)[1])
        left = _pair(columns.reshape(*columns.shape[:-2], *blocks), -3)[0] * jnp.exp(_pair(after, -3)[0])
        low = jnp.einsum("...ik,...jk->...ij", right, left, precision=precision)
        above, below = _pair(products, -3)
        products = _corner(above, low, below, 0.0)
    return products[..., 0, :, :]
