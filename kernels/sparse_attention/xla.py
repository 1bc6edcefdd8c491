"""Sparse attention in plain XLA: a block of queries at a time walks along its tiles, several of them at once.

The softmax is taken online (2205.14135), so that a row of tiles may be long; the trips of a loop are as many as there
are live tiles, and the rest costs nothing. On the way back the probabilities are made again from the log-normalisers;
d_k and d_v are added up tile after tile, always in the same order.

Arrays lie as [parts, heads, blocks, rows, width]: the heads of a part share their keys' places and meet in one product;
the rows of a block of queries are those of all the query heads that a key head serves.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels import dispatch
from kernels.chunks import compute_dtype
from kernels.sparse_attention.form import Form
from kernels.sparse_attention.mask import Mask, maps, predicate
from kernels.sparse_attention.tiles import LIVE, WHOLE, Tiles, allowed

BLOCK_Q, BLOCK_K = 128, 128  # twice as many queries where each head has keys of its own
TOGETHER = 768  # keys that a block of queries meets at once: a window of 512 and what its blocks have beside it


def form(scale: float, mask: Mask, q: jax.Array, k: jax.Array, v: jax.Array, segments: bool) -> Form:
    """The sizes of tiles for q [B, Tq, H, K], k [B, Tk, G, K] and v [B, Tk, G, V], not padded."""
    time_q, time_k = q.shape[1], k.shape[1]
    most_q = BLOCK_Q * (2 if q.shape[2] == k.shape[2] else 1)
    block_q, block_k = (
        _block(time, most, [leaf.sizes[axis] for leaf in maps(mask)])
        for axis, (time, most) in enumerate(((time_q, most_q), (time_k, BLOCK_K)))
    )
    form = Form(scale, predicate(mask), block_q, block_k, time_q, time_k, segments)
    longest = max(int(allowed(form, mask).sum(axis=1).max()), 1)
    steps = -(-longest // max(TOGETHER // block_k, 1))
    return dataclasses.replace(form, together=-(-longest // steps))


def _block(time: int, most: int, maps: list[int]) -> int:
    """At most `most` tokens, and no more than there are, that divide the blocks of all maps."""
    most = min(most, -(-time // 16) * 16)
    return max(n for n in range(1, most + 1) if all(size % n == 0 for size in maps))


class _Part(NamedTuple):
    """Heads that are worked on together, m of them."""

    q: jax.Array  # [m, nq, R, K]
    k: jax.Array  # [m, nk, block_k, K]
    v: jax.Array  # [m, nk, block_k, V]
    q_ids: jax.Array | None  # [nq, block_q]
    k_ids: jax.Array | None  # [nk, block_k]
    column: jax.Array  # [S]
    bits: jax.Array  # [S]
    start: jax.Array  # [nq]: where a row's tiles begin in the list
    live: jax.Array  # [nq]: how many of them are live


class _Keys(NamedTuple):
    """The keys of a few tiles, J in all, and which of them the queries of a row see."""

    column: jax.Array  # [tiles]
    k: jax.Array  # [m, J, K]
    v: jax.Array  # [m, J, V]
    visible: jax.Array  # [block_q, J]


def forward(
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None,
    k_ids: jax.Array | None,
    by_query: Tiles,
    by_key: Tiles,
) -> tuple[jax.Array, jax.Array]:
    """out [B, Tq, H, V] in v's dtype and log_normalizer [B, Tq, H]; `form` tells of the arguments."""
    dtype, precision = compute_dtype(q, k, v)

    def row(part: _Part, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        queries = part.q[:, n].astype(dtype) * form.scale

        def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, highest, total = sums
            keys = _keys(form, dtype, part, n, i)
            scores = _where(keys.visible, jnp.einsum("mrk,mjk->mrj", queries, keys.k, precision=precision), -jnp.inf)
            new = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
            finite = jnp.where(new == -jnp.inf, 0, new)
            weights, kept = jnp.exp(scores - finite), jnp.exp(highest - finite)
            out = out * kept + jnp.einsum("mrj,mjv->mrv", weights, keys.v, precision=precision)
            return out, new, total * kept + jnp.sum(weights, axis=-1, keepdims=True)

        m, rows, _ = queries.shape
        nothing = (
            jnp.zeros((m, rows, v.shape[-1]), dtype),
            jnp.full((m, rows, 1), -jnp.inf, dtype),
            jnp.zeros((m, rows, 1), dtype),
        )
        out, highest, total = lax.fori_loop(0, _steps(form, part, n), step, nothing)
        return (out / jnp.where(total > 0, total, 1)).astype(v.dtype), highest + jnp.log(total)

    parts = _parts(form, q, k, v, q_ids, k_ids, by_query)
    rows = jnp.arange(q.shape[1] // form.block_q)
    out, log_normalizer = lax.map(lambda part: lax.map(lambda n: row(part, n), rows), parts)
    out, log_normalizer = (_joined(jnp.moveaxis(x, 1, 2), q, k.shape[2]) for x in (out, log_normalizer))
    return out, log_normalizer[..., 0]


def backward(
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None,
    k_ids: jax.Array | None,
    by_query: Tiles,
    by_key: Tiles,
    out: jax.Array,
    log_normalizer: jax.Array,
    d_out: jax.Array,
    d_log_normalizer: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """d_q, d_k, d_v in their arrays' dtypes."""
    dtype, precision = compute_dtype(q, k, v)
    shift = jnp.sum(d_out.astype(dtype) * out, axis=-1) - d_log_normalizer
    shift = jnp.where(log_normalizer == -jnp.inf, 0, shift)  # its cotangent may be anything where nothing is seen
    parts = _parts(form, q, k, v, q_ids, k_ids, by_query)
    m = parts.q.shape[1]
    of_queries = [_split(x, m, k.shape[2], form.block_q) for x in (d_out, log_normalizer[..., None], shift[..., None])]

    def attend(arguments: tuple[_Part, list[jax.Array]]) -> tuple[jax.Array, ...]:
        part, of_queries = arguments

        def row(d_keys: tuple[jax.Array, jax.Array], n: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            queries = part.q[:, n].astype(dtype) * form.scale
            d_out, log_normalizer, shift = (x[:, n].astype(dtype) for x in of_queries)

            def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                d_queries, d_k, d_v = sums
                keys = _keys(form, dtype, part, n, i)
                scores = jnp.einsum("mrk,mjk->mrj", queries, keys.k, precision=precision)
                weights = _where(keys.visible, jnp.exp(scores - log_normalizer), 0)
                d_weights = jnp.einsum("mrv,mjv->mrj", d_out, keys.v, precision=precision)
                d_scores = weights * (d_weights - shift)
                d_queries += jnp.einsum("mrj,mjk->mrk", d_scores, keys.k, precision=precision)
                d_k = _add(d_k, keys.column, jnp.einsum("mrj,mrk->mjk", d_scores, queries, precision=precision))
                d_v = _add(d_v, keys.column, jnp.einsum("mrj,mrv->mjv", weights, d_out, precision=precision))
                return d_queries, d_k, d_v

            start = (jnp.zeros(queries.shape, dtype), *d_keys)
            d_queries, d_k, d_v = lax.fori_loop(0, _steps(form, part, n), step, start)
            return (d_k, d_v), (d_queries * form.scale).astype(q.dtype)

        nothing = (jnp.zeros(part.k.shape, dtype), jnp.zeros(part.v.shape, dtype))
        (d_k, d_v), d_q = lax.scan(row, nothing, jnp.arange(q.shape[1] // form.block_q))
        return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)

    d_q, d_k, d_v = lax.map(attend, (parts, of_queries))
    d_q = jnp.moveaxis(d_q, 1, 2)
    return _joined(d_q, q, k.shape[2]), _joined(d_k, k, k.shape[2]), _joined(d_v, v, k.shape[2])


def _steps(form: Form, part: _Part, n: jax.Array) -> jax.Array:
    return -(-part.live[n] // form.together)


def _keys(form: Form, dtype: jnp.dtype, part: _Part, n: jax.Array, i: jax.Array) -> _Keys:
    """Those of the i-th tiles of row n that are worked on together; in the place of tiles past its end its first."""
    place = i * form.together + jnp.arange(form.together)
    live = place < part.live[n]
    place = part.start[n] + jnp.where(live, place, 0)
    column, bits = part.column[place], part.bits[place][:, None]
    t = n * form.block_q + jnp.arange(form.block_q)[:, None, None]
    j = column[:, None] * form.block_k + jnp.arange(form.block_k)
    visible = form.visible(t, j, bits)
    if part.q_ids is not None and part.k_ids is not None:
        visible &= part.q_ids[n][:, None, None] == part.k_ids[column]
    visible = (visible | (bits & WHOLE > 0)) & live[:, None]
    k, v = (x[:, column].reshape(x.shape[0], -1, x.shape[-1]).astype(dtype) for x in (part.k, part.v))
    return _Keys(column, k, v, visible.reshape(form.block_q, -1))


def _where(visible: jax.Array, x: jax.Array, otherwise: float) -> jax.Array:
    """x [m, R, J] where `visible` [block_q, J] for each of the query heads among the rows."""
    heads, rows, keys = x.shape
    by_head = x.reshape(heads, -1, *visible.shape)
    return jnp.where(visible, by_head, otherwise).reshape(heads, rows, keys)


def _add(sums: jax.Array, column: jax.Array, x: jax.Array) -> jax.Array:
    """sums [m, nk, block_k, F] with x [m, J, F] added at the columns of its tiles."""
    heads, _, block, width = sums.shape
    return sums.at[:, column].add(x.reshape(heads, -1, block, width))


def _parts(
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None,
    k_ids: jax.Array | None,
    lists: Tiles,
) -> _Part:
    """All parts, along the first axis: as many heads each as share a list and `dispatch.block_rows` allows."""
    (batch, time, heads, _), groups = q.shape, k.shape[2]
    owners, listed, _ = lists.row.shape
    alike = 1 if listed > 1 else groups if owners != 1 or not isinstance(batch, int) else batch * groups
    most = max(dispatch.block_rows() // (heads // groups * form.block_q), 1)
    m = max(n for n in range(1, min(alike, most) + 1) if alike % n == 0)
    first = (np if isinstance(batch, int) else jnp).arange(batch * groups // m) * m
    owner = (first // groups * listed if owners != 1 else 0) + (first % groups if listed > 1 else 0 * first)
    row, column, bits = (x.reshape(owners * listed, -1)[owner] for x in (lists.row, lists.column, lists.bits))
    blocks = jnp.arange(time // form.block_q)
    start = jax.vmap(lambda row: jnp.searchsorted(row, blocks))(row)
    live = jax.vmap(lambda row, bits: jnp.zeros(len(blocks), int).at[row].add(bits & LIVE))(row, bits)

    def ids_of_parts(ids: jax.Array | None, block: int) -> jax.Array | None:
        return None if ids is None else jnp.repeat(ids.reshape(batch, -1, block), groups, axis=0)[::m]

    return _Part(
        q=_split(q, m, groups, form.block_q),
        k=_split(k, m, groups, form.block_k),
        v=_split(v, m, groups, form.block_k),
        q_ids=ids_of_parts(q_ids, form.block_q),
        k_ids=ids_of_parts(k_ids, form.block_k),
        column=column,
        bits=bits,
        start=start,
        live=live,
    )


def _split(x: jax.Array, m: int, groups: int, block: int) -> jax.Array:
    """[B, T, H, F] → [parts, m, T / block, H / groups * block, F]."""
    batch, time, heads, width = x.shape
    x = x.reshape(batch, time // block, block, groups, heads // groups, width).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, m, time // block, heads // groups * block, width)


def _joined(x: jax.Array, like: jax.Array, groups: int) -> jax.Array:
    """The reverse of `_split`, for as many heads and times as `like` [B, T, H, …] has."""
    batch, time, heads, _ = like.shape
    blocks, width = x.shape[2], x.shape[-1]
    x = x.reshape(batch, groups, blocks, heads // groups, time // blocks, width).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, time, heads, width)
