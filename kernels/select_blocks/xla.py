"""Block selection in plain XLA: some queries at a time, against the compressed keys that may have ended by then.

Queries are columns: sums over keys and over the phases of a block then add whole rows, which vectorises everywhere.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels.chunks import compute_dtype
from kernels.select_blocks.form import Form, best, phase_major, rank

STRETCHES = 8  # of all time at most: the queries of each meet the same keys
MIN_QUERIES = 16
WIDTH = 256  # scores at once for each row of a block of work


def select_blocks(form: Form, q: jax.Array, k_compressed: jax.Array, begins: jax.Array) -> jax.Array:
    """Canonical arguments → [B, T, G, n] int32, ascending, -1 for none."""
    batch, time = q.shape[:2]
    groups = k_compressed.shape[2]
    dtype, precision = compute_dtype(q, k_compressed)
    blocks = form.blocks(form.start + time)
    keys = phase_major(form, k_compressed.astype(dtype), blocks)
    most = dispatch.fitting(WIDTH * dispatch.block_rows(), batch * groups * blocks * form.ratio)
    size = min(max(most // MIN_QUERIES, 1) * MIN_QUERIES, time)
    pieces = -(-time // size)
    filling = pieces * size - time
    q = jnp.pad(q, ((0, 0), (0, filling), (0, 0), (0, 0)))
    begins = jnp.pad(begins, ((0, 0), (0, filling)), constant_values=form.start + time)

    def select(keys: jax.Array, first: jax.Array) -> jax.Array:
        here = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=1)
        return _select(form, precision, here(q).astype(dtype), keys, here(begins), form.start + first)

    chosen = []
    # Late queries meet nearly all keys: dividing them would only make a larger program.
    length = -(-pieces // max(STRETCHES * time // (form.start + time), 1))
    for start in range(0, pieces, length):
        end = min(start + length, pieces)
        ended = min(form.blocks(form.start + end * size), blocks)
        firsts = size * jnp.arange(start, end, dtype=jnp.int32)
        chosen.append(lax.map(partial(select, keys[:, :, :, :ended]), firsts))
    ids = jnp.moveaxis(jnp.concatenate(chosen), 0, 1)
    return ids.reshape(batch, pieces * size, *ids.shape[3:])[:, :time]


def _select(
    form: Form, precision: lax.Precision, q: jax.Array, keys: jax.Array, begins: jax.Array, first: jax.Array
) -> jax.Array:
    """q [B, R, H, K] from time `first`, keys [B, G, phases, J, K], begins [B, R] → [B, R, G, n]."""
    batch, size, heads, width = q.shape
    _, groups, phases, blocks, _ = keys.shape
    keys = keys.reshape(batch, groups, phases * blocks, width)
    q = q.reshape(batch, size, groups, heads // groups, width).transpose(3, 0, 2, 4, 1)
    block, phase = jnp.arange(blocks, dtype=jnp.int32), jnp.arange(phases, dtype=jnp.int32)
    compressed = (block * phases + phase[:, None]).reshape(-1, 1)
    time, begins = first + jnp.arange(size, dtype=jnp.int32), begins[:, None, None]
    visible = form.visible(compressed, time, begins)

    def add(p: jax.Array, q: jax.Array) -> tuple[jax.Array, None]:
        s = jnp.where(visible, form.scale * jnp.matmul(keys, q, precision=precision), -jnp.inf)
        largest = jnp.max(s, axis=2, keepdims=True)
        weights = jnp.exp(s - jnp.where(largest > -jnp.inf, largest, 0))
        total = jnp.sum(weights, axis=2, keepdims=True)
        return p + weights / jnp.where(total > 0, total, 1), None

    p, _ = lax.scan(add, jnp.zeros((batch, groups, phases * blocks, size), q.dtype), q)  # over a group's heads
    p = p.reshape(batch, groups, phases, blocks, size)
    score = jnp.zeros((batch, groups, blocks, size), q.dtype)
    for shift, place, weight in form.shares():
        if shift < blocks:
            moved = p[:, :, place, : blocks - shift]
            score += weight * jnp.pad(moved, ((0, 0), (0, 0), (shift, 0), (0, 0)))
    forced = {"block_size": form.block_size, "initial": form.initial, "local": form.local}
    ranked = rank(score, block[:, None], time, begins, **forced)
    return best(ranked.transpose(0, 3, 1, 2), form.selected)
