"""What the forms of selected attention share: one batch row, group of heads and stretch of queries after another.

A form gives the results of the tiles of one stretch. They exist together before every query gathers its own, so a
stretch is as short as keeps its tiles half full whatever is chosen: temporary memory grows with T, not with T × n.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.chunks import compute_dtype
from kernels.selected_attention.form import Form
from kernels.selected_attention.routing import Routes, route

SLOTS = 16  # divides those of a tile: rows of half precision come by sixteen on a TPU
MIN_QUERIES = 1024  # of a stretch
MIN_BLOCK, MAX_BLOCK = 64, 256  # tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Queries:
    """Those of a stretch, and one more, for empty slots, that sees nothing. g heads share the chosen blocks."""

    q: jax.Array
    """[s + 1, g, K]"""
    first: jax.Array
    """[s + 1] int32"""
    last: jax.Array
    """[s + 1] int32"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cotangents:
    """What the way back needs of the same queries."""

    d_out: jax.Array
    """[s + 1, g, V]"""
    log_normalizer: jax.Array
    """[s + 1, g]; +inf for a query that sees nothing: its weights are 0"""
    delta: jax.Array
    """[s + 1, g]: the sum of d_out · out, less the cotangent of the log-normaliser"""


@dataclass(frozen=True)
class Cut:
    """How the canonical arguments are cut into stretches of queries and blocks of keys."""

    batch: int
    time: int
    groups: int
    blocks: int
    block_size: int
    slots: int
    stretches: int

    def queries(self, x: jax.Array, filling: float = 0) -> jax.Array:
        """[B, T, H, ...] → [B × L, stretches, s + 1, H / L, ...]; the query too many is filled like those past T."""
        length = -(-self.time // self.stretches)
        x = jnp.moveaxis(x.reshape(self.batch, self.time, self.groups, -1, *x.shape[3:]), 2, 1)
        x = x.reshape(self.batch * self.groups, *x.shape[2:])
        rest = [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, [(0, 0), (0, length * self.stretches - self.time), *rest], constant_values=filling)
        x = x.reshape(-1, self.stretches, length, *x.shape[2:])
        return jnp.pad(x, [(0, 0), (0, 0), (0, 1), *rest], constant_values=filling)

    def queries_back(self, x: jax.Array) -> jax.Array:
        """[B × L, stretches, s, H / L, ...] → [B, T, H, ...]."""
        x = x.reshape(self.batch, self.groups, -1, *x.shape[3:])[:, :, : self.time]
        return jnp.moveaxis(x, 1, 2).reshape(self.batch, self.time, -1, *x.shape[4:])

    def keys(self, x: jax.Array) -> jax.Array:
        """[B, T, L, F] → [B × L, N + 1, block_size, F]; the last block, of zeros, is that of tiles without a query."""
        filling = (self.blocks + 1) * self.block_size - self.time
        x = jnp.pad(jnp.moveaxis(x, 2, 1), [(0, 0), (0, 0), (0, filling), (0, 0)])
        return x.reshape(self.batch * self.groups, self.blocks + 1, self.block_size, -1)

    def keys_back(self, x: jax.Array) -> jax.Array:
        """[B × L, N + 1, block_size, F] → [B, T, L, F]."""
        x = x.reshape(self.batch, self.groups, -1, x.shape[-1])[:, :, : self.time]
        return jnp.moveaxis(x, 1, 2)


def block_size(size: int) -> int:
    """What blocks of `size` tokens are worked on in: large ones are several of MIN_BLOCK to MAX_BLOCK tokens, where
    such a size divides them."""
    if size <= MAX_BLOCK:
        return size
    return next((part for part in range(MAX_BLOCK, MIN_BLOCK - 1, -1) if size % part == 0), size)


def cut(form: Form, rows: int, q: jax.Array, blocks: jax.Array) -> Cut:
    """For tiles of about so many rows: queries × heads of a group."""
    batch, time, heads, _ = q.shape
    groups, choices = blocks.shape[2:]
    slots = max(rows * groups // heads // SLOTS, 1) * SLOTS
    count = -(-time // form.block_size)
    queries = max(2 * slots * count // choices, MIN_QUERIES)
    return Cut(batch, time, groups, count, form.block_size, slots, max(time // queries, 1))


def forward(
    form: Form,
    tiles: Callable[..., tuple[jax.Array, jax.Array]],
    rows: int,
    multiple: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Canonical arguments → out [B, T, H, V] and log_normalizer [B, T, H].

    Args:
      tiles: (form, routes, queries, k [N + 1, block_size, K], v) → of every slot of a stretch, out [S × m, g, V] and
        log_normalizer [S × m, g] of its block alone: 0 and -inf where it sees nothing. What is returned of tiles that
        are not live is never used, but for the first of them.
      rows: of a tile, queries × heads of a group.
      multiple: divides the number of tiles of a stretch.
    """
    form, blocks = _chosen(form, blocks, first, last)
    sizes = cut(form, rows, q, blocks)

    def stretch(k: jax.Array, v: jax.Array, chosen: jax.Array, queries: Queries) -> tuple[jax.Array, jax.Array]:
        routes = route(chosen, sizes.blocks, sizes.slots, multiple)
        return _merge(routes, *tiles(form, routes, queries, k, v))

    def group(arrays: Any) -> tuple[jax.Array, jax.Array]:
        k, v, stretches = arrays
        return lax.map(lambda arrays: stretch(k, v, *arrays), stretches)

    stretches = _choices(sizes, blocks), _queries(sizes, q, first, last)
    out, log_normalizer = lax.map(group, (sizes.keys(k), sizes.keys(v), stretches))
    return sizes.queries_back(out).astype(v.dtype), sizes.queries_back(log_normalizer)


def backward(
    form: Form,
    tiles: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
    rows: int,
    multiple: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: jax.Array,
    first: jax.Array,
    last: jax.Array,
    out: jax.Array,
    log_normalizer: jax.Array,
    d_out: jax.Array,
    d_log_normalizer: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v in their dtypes.

    Args:
      tiles: (form, routes, queries, cotangents, k, v, d_k, d_v) → d_q [S × m, g, K] of every slot's block alone, and
        d_k and d_v [N + 1, block_size, ...] with the stretch added.
      rows, multiple: as in `forward`.
    """
    dtype, _ = compute_dtype(q, k, v)
    form, blocks = _chosen(form, blocks, first, last)
    sizes = cut(form, rows, q, blocks)

    def group(arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        k, v, stretches = arrays

        def stretch(d_keys: tuple[jax.Array, jax.Array], arrays: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            chosen, queries, cotangents = arrays
            routes = route(chosen, sizes.blocks, sizes.slots, multiple)
            d_q, d_k, d_v = tiles(form, routes, queries, cotangents, k, v, *d_keys)
            return (d_k, d_v), _sum(routes, d_q).astype(q.dtype)

        nothing = jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype)
        (d_k, d_v), d_q = lax.scan(stretch, nothing, stretches)
        return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)

    cotangents = _cotangents(sizes, dtype, out, log_normalizer, d_out, d_log_normalizer)
    stretches = _choices(sizes, blocks), _queries(sizes, q, first, last), cotangents
    d_q, d_k, d_v = lax.map(group, (sizes.keys(k), sizes.keys(v), stretches))
    return sizes.queries_back(d_q), sizes.keys_back(d_k), sizes.keys_back(d_v)


def _chosen(form: Form, blocks: jax.Array, first: jax.Array, last: jax.Array) -> tuple[Form, jax.Array]:
    """With large blocks as several (`block_size`), and -1 for those of which a query sees nothing."""
    size = block_size(form.block_size)
    parts = form.block_size // size
    blocks = (blocks[..., None] * parts + jnp.arange(parts)).reshape(*blocks.shape[:3], -1)
    seen = (blocks >= 0) & (blocks * size <= last[..., None, None]) & ((blocks + 1) * size > first[..., None, None])
    seen &= blocks * size < blocks.shape[1]
    return Form(form.scale, size), jnp.where(seen, blocks, -1)


def _choices(sizes: Cut, blocks: jax.Array) -> jax.Array:
    """[B × L, stretches, s, n]."""
    return sizes.queries(blocks, -1)[:, :, :-1, 0]


def _queries(sizes: Cut, q: jax.Array, first: jax.Array, last: jax.Array) -> Queries:
    """[B × L, stretches, ...]."""
    of_groups = [jnp.repeat(x[..., None], sizes.groups, axis=2) for x in (first, last)]
    return Queries(sizes.queries(q), sizes.queries(of_groups[0])[..., 0], sizes.queries(of_groups[1], -1)[..., 0])


def _cotangents(
    sizes: Cut,
    dtype: jnp.dtype,
    out: jax.Array,
    log_normalizer: jax.Array,
    d_out: jax.Array,
    d_log_normalizer: jax.Array,
) -> Cotangents:
    """[B × L, stretches, ...]."""
    nothing = log_normalizer == -jnp.inf
    delta = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1) - d_log_normalizer
    return Cotangents(
        sizes.queries(d_out),
        sizes.queries(jnp.where(nothing, jnp.inf, log_normalizer), jnp.inf),
        sizes.queries(jnp.where(nothing, 0, delta)),
    )


def _merge(routes: Routes, outs: jax.Array, log_normalizers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Results by slot → out [s, g, V] and log_normalizer [s, g], each query's choices put together."""
    parts = log_normalizers[routes.slot]
    log_normalizer = jax.nn.logsumexp(parts, axis=1)
    weights = jnp.exp(parts - jnp.where(log_normalizer == -jnp.inf, 0, log_normalizer)[:, None])
    return _sum(routes, outs, weights[..., None]), log_normalizer


def _sum(routes: Routes, x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """[S × m, g, F] by slot, weights [s, n, g, 1] → the sum over each query's choices [s, g, F]."""

    def add(n: jax.Array, total: jax.Array) -> jax.Array:
        part = x[routes.slot[:, n]]
        return total + (part if weights is None else weights[:, n] * part)

    queries, choices = routes.slot.shape
    return lax.fori_loop(0, choices, add, jnp.zeros((queries, *x.shape[1:]), x.dtype))
