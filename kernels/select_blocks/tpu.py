"""Block selection as a Pallas TPU kernel.

Queries are the columns of a tile, compressed keys and blocks its rows: softmax, the sums over phases and the search for
the best blocks are then work on whole rows, a number a lane. All compressed keys of a group lie in VMEM; only those
that may have ended by the tile's last query are met. A chunk of keys holds `ratio` phases of as many blocks each.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.chunks import compute_dtype
from kernels.select_blocks.form import Form, phase_major, rank
from kernels.tiles import SUBLANES, dot

LANES = 128
CHUNK = 128  # compressed keys that are multiplied at once, if phases are few
STRIP = 32  # blocks that are worked on at once
MAX_BYTES = 12 * 2**20  # of VMEM
NONE = 2**31 - 1  # instead of a block, after all others


def refusal(form: Form, time: int, heads: int, width: int, dtype: jnp.dtype) -> str | None:
    """Why this kernel does not serve, or None where it does; `heads`: of a group, `dtype`: of all arguments."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"computes in float32 or bfloat16, these arguments need {dtype}"
    if form.compression_block - form.stride > form.block_size:
        return f"takes compressed blocks of at most block_size + stride tokens, got {form.compression_block}"
    rows = _padded_blocks(form, form.start + time)
    lanes = pl.cdiv(width, LANES) * LANES
    tiles = (form.ratio * rows + heads * LANES) * lanes * jnp.dtype(dtype).itemsize * 2
    needed = tiles + (form.ratio + 2) * rows * LANES * 4
    if needed > MAX_BYTES:
        return f"keeps a group's compressed keys and scores in {MAX_BYTES} bytes, these need {needed}"
    return None


def _chunk_blocks(form: Form, time: int) -> int:
    """How many blocks a chunk of compressed keys belongs to."""
    whole = max(pl.cdiv(form.blocks(time), STRIP), 1) * STRIP
    return min(max(CHUNK // form.ratio // STRIP, 1) * STRIP, whole)


def _padded_blocks(form: Form, time: int) -> int:
    chunk = _chunk_blocks(form, time)
    return pl.cdiv(form.blocks(time), chunk) * chunk


def select_blocks(form: Form, q: jax.Array, k_compressed: jax.Array, begins: jax.Array) -> jax.Array:
    """Canonical arguments → [B, T, G, n] int32, ascending, -1 for none."""
    _, precision = compute_dtype(q, k_compressed)
    dtype = jnp.result_type(q, k_compressed)
    batch, time, heads, width = q.shape
    groups = k_compressed.shape[2]
    shared, tiles = heads // groups, pl.cdiv(time, LANES)
    filling = tiles * LANES - time
    q = jnp.pad(q.astype(dtype), ((0, 0), (0, filling), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    q = q.reshape(batch, groups, shared, tiles * LANES, width)
    begins = jnp.pad(begins, ((0, 0), (0, filling)))[:, None]
    ended = form.start + time
    rows, chunk = _padded_blocks(form, ended), _chunk_blocks(form, ended)
    keys = phase_major(form, k_compressed.astype(dtype), rows)
    keys = keys.reshape(batch, groups, form.ratio, rows // chunk, chunk, width).swapaxes(2, 3)
    keys = keys.reshape(batch, groups, rows // chunk, form.ratio * chunk, width)
    ids = pl.pallas_call(
        partial(_select, form, precision),
        grid=(batch, groups, tiles),
        in_specs=[
            pl.BlockSpec((None, 1, LANES), lambda b, g, i: (b, 0, i)),
            pl.BlockSpec((None, None, shared, LANES, width), lambda b, g, i: (b, g, 0, i, 0)),
            pl.BlockSpec((None, None, *keys.shape[2:]), lambda b, g, i: (b, g, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, form.selected, LANES), lambda b, g, i: (b, g, 0, i)),
        out_shape=jax.ShapeDtypeStruct((batch, groups, form.selected, tiles * LANES), jnp.int32),
        scratch_shapes=[
            pltpu.VMEM((*keys.shape[2:4], LANES), jnp.float32),
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((form.selected, LANES), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        name="select_blocks",
    )(begins, q, keys)
    return ids.transpose(0, 3, 1, 2)[:, :time]


def _rows(first: Any, count: int) -> jax.Array:
    """[count, LANES] numbers of rows."""
    return first + lax.broadcasted_iota(jnp.int32, (count, LANES), 0)


def _at(strip: Any) -> Any:
    """Where the rows of a strip lie."""
    return pl.ds(pl.multiple_of(strip * STRIP, STRIP), STRIP)


def _eight(x: jax.Array) -> jax.Array:
    """[rows, LANES] → [rows / 8, 8, LANES]: what is summed over the first axis stays whole registers."""
    return x.reshape(-1, SUBLANES, LANES)


def _select(
    form: Form,
    precision: lax.Precision,
    begins_ref: Any,
    q_ref: Any,
    keys_ref: Any,
    ids_ref: Any,
    s_ref: Any,
    head_ref: Any,
    score_ref: Any,
    found_ref: Any,
) -> None:
    """A tile of queries. begins [1, R], q [heads, R, K], keys [chunks, ratio · blocks, K] → ids [n, R].

    `s` holds a head's scores of compressed keys, `head` its probabilities by block before they are divided by their
    sum, `score` the blocks' scores so far, `found` [n, R] the blocks chosen, the best first.
    """
    first = form.start + pl.program_id(2) * LANES
    time = first + lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    begins = begins_ref[...]
    begun = jnp.minimum(lax.div(first + LANES - 1, form.block_size) + 1, score_ref.shape[0])
    chunk = keys_ref.shape[1] // form.ratio
    strips, chunks = (lax.div(begun + size - 1, size) for size in (STRIP, chunk))

    def clear(strip: Any, _: None) -> None:
        score_ref[_at(strip), :] = jnp.zeros((STRIP, LANES), jnp.float32)

    lax.fori_loop(0, strips, clear, None)

    def add_head(h: Any, _: None) -> None:
        def multiply(c: Any, largest: jax.Array) -> jax.Array:
            s = form.scale * dot(keys_ref[c], q_ref[h], "nt", precision)
            for phase in range(form.ratio):
                rows = slice(phase * chunk, (phase + 1) * chunk)
                compressed = _rows(c * chunk, chunk) * form.ratio + phase
                part = jnp.where(form.visible(compressed, time, begins), s[rows], -jnp.inf)
                s_ref[c, rows, :] = part
                largest = jnp.maximum(largest, jnp.max(_eight(part), axis=0))
            return largest

        nothing = jnp.full((SUBLANES, LANES), -jnp.inf, jnp.float32)
        largest = lax.fori_loop(0, chunks, multiply, nothing)
        largest = jnp.max(largest, axis=0, keepdims=True)
        largest = jnp.where(largest > -jnp.inf, largest, 0.0)

        def share(strip: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total, from_before = carry
            c, within = lax.div(strip, chunk // STRIP), lax.rem(strip, chunk // STRIP)
            phases = []
            for phase in range(form.ratio):
                begin = pl.multiple_of(phase * chunk + within * STRIP, STRIP)
                phases.append(jnp.exp(s_ref[c, pl.ds(begin, STRIP), :] - largest))
                total += jnp.sum(_eight(phases[-1]), axis=0)
            own, after = jnp.zeros((STRIP, LANES), jnp.float32), jnp.zeros((STRIP, LANES), jnp.float32)
            for shift, phase, weight in form.shares():
                if shift:
                    after += weight * phases[phase]
                else:
                    own += weight * phases[phase]
            moved = pltpu.roll(after, 1, 0)
            head_ref[_at(strip), :] = own + jnp.where(_rows(0, STRIP) == 0, from_before, moved)
            return total, after[STRIP - 1 :]

        zeros = jnp.zeros((SUBLANES, LANES), jnp.float32), jnp.zeros((1, LANES), jnp.float32)
        total, _ = lax.fori_loop(0, strips, share, zeros)
        total = jnp.sum(total, axis=0, keepdims=True)
        inverse = 1 / jnp.where(total > 0, total, 1.0)

        def add(strip: Any, _: None) -> None:
            score_ref[_at(strip), :] += head_ref[_at(strip), :] * inverse

        lax.fori_loop(0, strips, add, None)

    lax.fori_loop(0, q_ref.shape[0], add_head, None)

    def order(strip: Any, _: None) -> None:
        options = {"block_size": form.block_size, "initial": form.initial, "local": form.local}
        score_ref[_at(strip), :] = rank(score_ref[_at(strip), :], _rows(strip * STRIP, STRIP), time, begins, **options)

    lax.fori_loop(0, strips, order, None)
    _choose(score_ref, found_ref, strips)
    ids_ref[...] = _ascending(found_ref)


def _choose(score_ref: Any, found_ref: Any, strips: Any) -> None:
    """The blocks of the highest ranks in the first strips of `score`, one after the other, to `found` [n, R].

    Of equal ones the lowest; NONE where none is left. What is chosen is struck out of `score`.
    """

    def choose(n: Any, last: jax.Array) -> jax.Array:
        def search(strip: Any, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            highest, block = found
            rows = _rows(strip * STRIP, STRIP)
            score = jnp.where(rows == last, -jnp.inf, score_ref[_at(strip), :])
            score_ref[_at(strip), :] = score
            for x, row in zip(_eight(score), _eight(rows), strict=True):
                higher = x > highest
                highest, block = jnp.where(higher, x, highest), jnp.where(higher, row, block)
            return highest, block

        nothing = (jnp.full((SUBLANES, LANES), -jnp.inf, jnp.float32), jnp.full((SUBLANES, LANES), NONE))
        highest, block = lax.fori_loop(0, strips, search, nothing)
        best = jnp.max(highest, axis=0, keepdims=True)
        last = jnp.min(jnp.where(highest == best, block, NONE), axis=0, keepdims=True)
        found_ref[pl.ds(n, 1), :] = last
        return last

    lax.fori_loop(0, found_ref.shape[0], choose, jnp.full((1, LANES), NONE))


def _ascending(found_ref: Any) -> jax.Array:
    """[n, R] blocks or NONE → sorted, -1 for NONE: each goes where as many are as are lower."""
    found = found_ref[...]

    def put(n: Any, ids: jax.Array) -> jax.Array:
        block = found_ref[pl.ds(n, 1), :]
        place = jnp.sum((found < block).astype(jnp.int32), axis=0, keepdims=True)
        return jnp.where(_rows(0, found.shape[0]) == place, block, ids)

    ids = lax.fori_loop(0, found.shape[0], put, jnp.full_like(found, NONE))
    return jnp.where(ids == NONE, -1, ids)
