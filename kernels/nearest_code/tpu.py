"""Nearest-code search and a codebook's statistics as Pallas TPU kernels.

Codes are the rows of a tile and vectors its columns: what is kept of a search, and what comes out, is then one number a
lane. The search walks the codes for a tile of vectors, the statistics walk the vectors for a tile of codes.

The matrix unit multiplies bfloat16 numbers exactly and adds in float32. A float32 number goes in as the three bfloat16
ones that add up to it, side by side in one longer product: less to do than six products, each padded to 128 lanes.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128
SEARCHED_VECTORS, ADDED_VECTORS, CODES = 2048, 512, 256  # of a tile, fewer where they are wide
MAX_WIDTH = 2048


def refusal(dtype: jnp.dtype, vectors: int, width: int) -> str | None:
    """Why these kernels do not serve vectors [vectors, width], or None where they do; `dtype`: of all arguments."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"computes in float32 or bfloat16, these arguments need {dtype}"
    if vectors == 0 or not 1 <= width <= MAX_WIDTH:
        return f"{vectors} vectors of width {width}, needs at least 1 and a width from 1 to {MAX_WIDTH}"
    return None


def _tile(size: int, most: int, width: int) -> int:
    """Rows of [size, width] at a time, so that all tiles fit 16 MiB in two buffers with what is computed of them."""
    most = max(most // pl.cdiv(width, 1024) // LANES, 1) * LANES
    return min(most, pl.cdiv(size, LANES) * LANES)


def _pieces(x: jax.Array, precision: lax.Precision) -> list[jax.Array]:
    """The bfloat16 numbers that add up to x, the largest first: three, or one where x is taken as bfloat16.

    Rounded by `reduce_precision`: a conversion there and back the compiler may leave out.
    """
    pieces = []
    for _ in range(1 if precision == lax.Precision.DEFAULT else 3):
        pieces.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - pieces[-1]
    return [piece.astype(jnp.bfloat16) for piece in pieces]


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    return lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def _search(x_ref: Any, codebook_ref: Any, offset_ref: Any, found_ref: Any, lowest_ref: Any, group_ref: Any) -> None:
    """One tile of codes. x [R, W], codebook [C, W], offset [C, 128] → found [1, R].

    Of every eighth code the lowest score so far waits in `lowest` [8, R], and in `group` which eight it was among.
    """
    n = pl.program_id(1)
    groups = codebook_ref.shape[0] // SUBLANES

    @pl.when(n == 0)
    def _() -> None:
        lowest_ref[...] = jnp.full_like(lowest_ref, jnp.inf)
        group_ref[...] = jnp.zeros_like(group_ref)

    def search(i: Any, _: None) -> None:
        at = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        scores = offset_ref[...] - _dot(codebook_ref[...], x_ref[at, :], (1, 1))
        lowest, group = lowest_ref[:, at], group_ref[:, at]
        for eight in range(groups):
            score = scores[eight * SUBLANES : (eight + 1) * SUBLANES]
            lower = score < lowest
            lowest, group = jnp.where(lower, score, lowest), jnp.where(lower, n * groups + eight, group)
        lowest_ref[:, at], group_ref[:, at] = lowest, group

    lax.fori_loop(0, x_ref.shape[0] // LANES, search, None)

    @pl.when(n == pl.num_programs(1) - 1)
    def _() -> None:
        lowest, group = lowest_ref[...], group_ref[...]
        code = group * SUBLANES + lax.broadcasted_iota(jnp.int32, group.shape, 0)
        least = jnp.min(lowest, axis=0, keepdims=True)
        beaten = jnp.iinfo(jnp.int32).max
        found_ref[...] = jnp.min(jnp.where(lowest == least, code, beaten), axis=0, keepdims=True)


def nearest_code(precision: lax.Precision, x: jax.Array, codebook: jax.Array, offset: jax.Array) -> jax.Array:
    """x [..., D], codebook [M, D], offset [M] → the first m [...] where offset_m - x · c_m is smallest.

    The products of float32 pieces that matter are six: its temporary memory is three times x.
    """
    rows, codes = x.shape[:-1], codebook.shape[0]
    vectors = prod(rows)
    x_pieces, codebook_pieces = _pieces(x.reshape(vectors, -1), precision), _pieces(codebook, precision)
    # Products of smaller pieces are below the rounding of float32.
    pairs = [(i, j) for i in range(len(x_pieces)) for j in range(len(x_pieces) - i)]
    x = jnp.concatenate([x_pieces[i] for i, _ in pairs], axis=1)
    codebook = jnp.concatenate([codebook_pieces[j] for _, j in pairs], axis=1)

    tile_vectors, tile_codes = _tile(vectors, SEARCHED_VECTORS, x.shape[1]), _tile(codes, CODES, x.shape[1])
    code_tiles = pl.cdiv(codes, tile_codes)
    filling = code_tiles * tile_codes - codes
    offset = jnp.pad(offset, (0, filling), constant_values=jnp.inf)
    found = pl.pallas_call(
        _search,
        grid=(pl.cdiv(vectors, tile_vectors), code_tiles),
        in_specs=[
            pl.BlockSpec((tile_vectors, x.shape[1]), lambda v, n: (v, 0)),
            pl.BlockSpec((tile_codes, x.shape[1]), lambda v, n: (n, 0)),
            pl.BlockSpec((tile_codes, LANES), lambda v, n: (n, 0)),
        ],
        out_specs=pl.BlockSpec((1, tile_vectors), lambda v, n: (0, v)),
        out_shape=jax.ShapeDtypeStruct((1, vectors), jnp.int32),
        scratch_shapes=[
            pltpu.VMEM((SUBLANES, tile_vectors), jnp.float32),
            pltpu.VMEM((SUBLANES, tile_vectors), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="nearest_code",
    )(
        x,
        jnp.pad(codebook, ((0, filling), (0, 0))),
        jnp.broadcast_to(offset[:, None], (codes + filling, LANES)),
    )
    return found.reshape(rows)


def _collect(codes_ref: Any, x_ref: Any, sums_ref: Any) -> None:
    """One tile of vectors. codes [1, R], x [R, W] → added to sums [C, W]."""
    codes, vectors = sums_ref.shape[0], x_ref.shape[0]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def collect(i: Any, _: None) -> None:
        at = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        code = pl.program_id(0) * codes + i * LANES + lax.broadcasted_iota(jnp.int32, (LANES, vectors), 0)
        one_hot = jnp.where(codes_ref[...] == code, 1.0, 0.0).astype(jnp.bfloat16)
        sums_ref[at, :] += _dot(one_hot, x_ref[...], (1, 0))

    lax.fori_loop(0, codes // LANES, collect, None)


def code_statistics(size: int, precision: lax.Precision, x: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., D], codes [...] (those of rows left out are `size`) → counts [size], sums [size, D].

    Counts are the sums of a column of ones.
    """
    vectors, width = codes.size, x.shape[-1]
    x = jnp.concatenate([*_pieces(x.reshape(vectors, width), precision), jnp.ones((vectors, 1), jnp.bfloat16)], axis=1)
    tile_vectors, tile_codes = _tile(vectors, ADDED_VECTORS, x.shape[1]), _tile(size, CODES, x.shape[1])
    vector_tiles, code_tiles = pl.cdiv(vectors, tile_vectors), pl.cdiv(size, tile_codes)
    filling = vector_tiles * tile_vectors - vectors
    sums = pl.pallas_call(
        _collect,
        grid=(code_tiles, vector_tiles),
        in_specs=[
            pl.BlockSpec((1, tile_vectors), lambda c, n: (0, n)),
            pl.BlockSpec((tile_vectors, x.shape[1]), lambda c, n: (n, 0)),
        ],
        out_specs=pl.BlockSpec((tile_codes, x.shape[1]), lambda c, n: (c, 0)),
        out_shape=jax.ShapeDtypeStruct((code_tiles * tile_codes, x.shape[1]), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="code_statistics",
    )(
        jnp.pad(codes.reshape(1, vectors), ((0, 0), (0, filling)), constant_values=code_tiles * tile_codes),
        jnp.pad(x, ((0, filling), (0, 0))),
    )[:size]
    return sums[:, -1], sum(sums[:, at : at + width] for at in range(0, x.shape[1] - 1, width))
