"""Selected attention in plain XLA: a few tiles at once, as a batch of matrix products."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels.chunks import compute_dtype
from kernels.selected_attention import stretches
from kernels.selected_attention.form import Form
from kernels.selected_attention.routing import Routes
from kernels.selected_attention.stretches import Cotangents, Queries

ROWS = 128  # of a tile

_put = lax.dynamic_update_index_in_dim


def forward(form: Form, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    return stretches.forward(form, _forward_tiles, ROWS, _tiles_at_once(), *arrays)


def backward(form: Form, *arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return stretches.backward(form, _backward_tiles, ROWS, _tiles_at_once(), *arrays)


def _tiles_at_once() -> int:
    return max(dispatch.block_rows() // ROWS, 1)


def _forward_tiles(
    form: Form, routes: Routes, queries: Queries, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    dtype, precision = compute_dtype(queries.q, k, v)
    einsum = partial(jnp.einsum, precision=precision)
    block, query = _at_once(routes)

    def step(n: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores = _scores(form, queries, k, block[n], query[n])
        highest = jnp.max(scores, axis=-1, keepdims=True)
        highest = jnp.where(highest == -jnp.inf, 0, highest)
        weights = jnp.exp(scores - highest)
        # On the CPU a product with ones is faster than a sum over the last axis.
        total = einsum("crj,j->cr", weights, jnp.ones(form.block_size, dtype))
        out = einsum("crj,cjv->crv", weights, v[block[n]].astype(dtype))
        out /= jnp.where(total > 0, total, 1)[..., None]
        outs, log_normalizers = results
        return _put(outs, out, n, 0), _put(log_normalizers, highest[..., 0] + jnp.log(total), n, 0)

    heads = queries.q.shape[1]
    rows = *query.shape[:2], query.shape[2] * heads
    nothing = jnp.zeros((*rows, v.shape[-1]), dtype), jnp.full(rows, -jnp.inf, dtype)
    out, log_normalizer = lax.fori_loop(0, _steps(routes, block), step, nothing)
    return out.reshape(-1, heads, v.shape[-1]), log_normalizer.reshape(-1, heads)


def _backward_tiles(
    form: Form,
    routes: Routes,
    queries: Queries,
    cotangents: Cotangents,
    k: jax.Array,
    v: jax.Array,
    d_k: jax.Array,
    d_v: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    dtype, precision = compute_dtype(queries.q, k, v)
    einsum = partial(jnp.einsum, precision=precision)
    block, query = _at_once(routes)

    def step(n: jax.Array, results: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        d_q, d_k, d_v = results
        scores = _scores(form, queries, k, block[n], query[n])
        weights = jnp.exp(scores - _rows(cotangents.log_normalizer[..., None], query[n]))
        d_out = _rows(cotangents.d_out, query[n]).astype(dtype)
        d_weights = einsum("crv,cjv->crj", d_out, v[block[n]].astype(dtype))
        d_scores = form.scale * weights * (d_weights - _rows(cotangents.delta[..., None], query[n]))
        d_k = d_k.at[block[n]].add(einsum("crj,crk->cjk", d_scores, _rows(queries.q, query[n]).astype(dtype)))
        d_v = d_v.at[block[n]].add(einsum("crj,crv->cjv", weights, d_out))
        return _put(d_q, einsum("crj,cjk->crk", d_scores, k[block[n]].astype(dtype)), n, 0), d_k, d_v

    heads, width = queries.q.shape[1:]
    d_q = jnp.zeros((*query.shape[:2], query.shape[2] * heads, width), dtype)
    d_q, d_k, d_v = lax.fori_loop(0, _steps(routes, block), step, (d_q, d_k, d_v))
    return d_q.reshape(-1, heads, width), d_k, d_v


def _at_once(routes: Routes) -> tuple[jax.Array, jax.Array]:
    """Blocks [S / c, c] and queries [S / c, c, m] of c tiles at once."""
    tiles = _tiles_at_once()
    return routes.block.reshape(-1, tiles), routes.query.reshape(-1, tiles, routes.query.shape[1])


def _steps(routes: Routes, block: jax.Array) -> jax.Array:
    """How many hold live tiles."""
    return -(-routes.live // block.shape[1])


def _rows(x: jax.Array, query: jax.Array) -> jax.Array:
    """[s + 1, g, F] and queries [c, m] → [c, m × g, F]."""
    tiles, slots = query.shape
    return x[query].reshape(tiles, slots * x.shape[1], x.shape[2])


def _scores(form: Form, queries: Queries, k: jax.Array, block: jax.Array, query: jax.Array) -> jax.Array:
    """Of c tiles [c, m × g, block_size], -inf for what a query does not see."""
    dtype, precision = compute_dtype(queries.q, k)
    q = _rows(queries.q, query).astype(dtype)
    scores = form.scale * jnp.einsum("crk,cjk->crj", q, k[block].astype(dtype), precision=precision)
    token = block[:, None, None] * form.block_size + jnp.arange(form.block_size)
    seen = (token >= queries.first[query][..., None]) & (token <= queries.last[query][..., None])
    return jnp.where(jnp.repeat(seen, queries.q.shape[1], axis=1), scores, -jnp.inf)
