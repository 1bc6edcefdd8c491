"""Nearest-code search and a codebook's statistics in plain XLA, by blocks of codes.

Rows keep their leading axes, so that they may be split over devices along any of them: nothing but statistics travels.
"""

from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch

MIN_BLOCK, MAX_BLOCK = 64, 1024  # codes


def _block(rows: int, codes: int) -> int:
    """How many codes meet all rows at once: bounds the temporary memory. The fewest where rows are a symbol."""
    most = dispatch.fitting(64 * dispatch.block_rows(), rows)
    return min(max(most, MIN_BLOCK), MAX_BLOCK, -(-codes // 16) * 16)


def nearest_code(precision: lax.Precision, x: jax.Array, codebook: jax.Array, offset: jax.Array) -> jax.Array:
    """x [..., D], codebook [M, D], offset [M] → the first m [...] where offset_m - x · c_m is smallest."""
    rows, (codes, width) = x.shape[:-1], codebook.shape
    block = _block(prod(rows), codes)
    blocks = -(-codes // block)
    filling = blocks * block - codes
    codebook = jnp.pad(codebook, ((0, filling), (0, 0))).reshape(blocks, block, width)
    offset = jnp.pad(offset, (0, filling), constant_values=jnp.inf).reshape(blocks, block)
    x = x.astype(offset.dtype)

    def search(
        found: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        lowest, code = found
        first, codebook, offset = part
        scores = offset - jnp.matmul(x, codebook.T, precision=precision)
        place = lax.broadcasted_iota(jnp.int32, scores.shape, len(rows))
        least = jnp.min(scores, axis=-1, keepdims=True)
        # The first of the smallest in two simple sweeps: XLA does not vectorise argmin on a CPU.
        here = first + jnp.min(jnp.where(scores == least, place, block), axis=-1)
        least = least[..., 0]
        return (jnp.minimum(lowest, least), jnp.where(least < lowest, here, code)), None

    nothing = (jnp.full(rows, jnp.inf, offset.dtype), jnp.zeros(rows, jnp.int32))
    firsts = block * jnp.arange(blocks, dtype=jnp.int32)
    return lax.scan(search, nothing, (firsts, codebook, offset))[0][1]


def code_statistics(size: int, precision: lax.Precision, x: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., D], codes [...] (those of rows left out are `size`) → counts [size], sums [size, D]."""

    def in_order(x: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rows_in_order(size, x, codes)

    def by_products(x: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return one_hot_products(size, precision, x, codes)

    return lax.platform_dependent(x, codes, cpu=in_order, default=by_products)


def rows_in_order(size: int, x: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One row after the other. A CPU does so always; a GPU would add in whatever order its threads arrive."""
    counts = jnp.zeros(size, x.dtype).at[codes].add(1, mode="drop")
    return counts, jnp.zeros((size, x.shape[-1]), x.dtype).at[codes].add(x, mode="drop")


def one_hot_products(
    size: int, precision: lax.Precision, x: jax.Array, codes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Products of x with ones where a row has a code, a block of codes at a time, added in a fixed order."""
    block = _block(codes.size, size)
    axes = tuple(range(codes.ndim))

    def collect(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        one_hot = (codes[..., None] == first + jnp.arange(block)).astype(x.dtype)
        return jnp.sum(one_hot, axis=axes), jnp.tensordot(one_hot, x, (axes, axes), precision=precision)

    counts, sums = lax.map(collect, block * jnp.arange(-(-size // block), dtype=jnp.int32))
    return counts.reshape(-1)[:size], sums.reshape(-1, x.shape[-1])[:size]
