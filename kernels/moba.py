"""Mixture of block attention: each query and head attends to the few blocks of keys whose mean key suits it best."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels.checks import check_floating, check_segment_ids, check_shape
from kernels.decoding import attend, block_times, check_room, gather_blocks, prefix, prefix_lengths, written
from kernels.packing import begins, runs
from kernels.select_blocks.form import best, rank
from kernels.selected_attention import selected_attention

SCORES = 256  # of the gate at once, times the rows of a block of work


def moba(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    block_size: int = 256,
    top_k: int = 4,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention of each query and head to the tokens of its own block and of the top_k - 1 best before it.

    MoBA (2502.13189), section 2.2. The blocks are those of `moba_blocks`, the softmax runs over all their tokens
    together (`selected_attention`). No gradient flows through the choice.

    Args:
      q: [B, T, H, K] queries.
      k: [B, T, G, K] keys; G divides H, each serves H / G neighbouring heads of q.
      v: [B, T, G, V] values.
      block_size: in tokens.
      top_k: how many blocks a query attends to, its own among them.
      scale: of the scores; K**-0.5 unless given.
      segment_ids: [B, T] integers; a segment is a run of equal ids and sees nothing of the others. Blocks lie on the
        grid of the row, so the result is that of the segment on its own where it begins at a multiple of block_size.
      implementation: of the attention: None (best for the platform), "reference", "xla" or "pallas".

    Returns:
      out [B, T, H, V] in v's dtype.

    Raises:
      ValueError: an argument of another shape, dtype or range.
      NotImplementedError: "pallas" where it cannot serve.
    """
    blocks = moba_blocks(q, k, block_size=block_size, top_k=top_k, segment_ids=segment_ids)
    return selected_attention(
        q, k, v, blocks, block_size=block_size, scale=scale, segment_ids=segment_ids, implementation=implementation
    )


def moba_blocks(
    q: jax.Array, k: jax.Array, *, block_size: int = 256, top_k: int = 4, segment_ids: jax.Array | None = None
) -> jax.Array:
    """The blocks of keys each query and head attends to: its own, and those before it with the largest q · mean key.

    Means and products are float32 (float64 where an argument is). A block's mean is over those of its tokens that are
    in the segment of its last. Gradients of the arguments are zero.

    Args:
      q, k, block_size, top_k, segment_ids: as in `moba`.

    Returns:
      [B, T, H, top_k] int32, ascending; -1 at the end where fewer blocks have begun. Of equal products the lowest.

    Raises:
      ValueError: an argument of another shape, dtype or range.
    """
    op = "moba_blocks"
    sizes: dict[str, int] = {}
    check_shape(op, "q", q, "B T H K", sizes)
    check_shape(op, "k", k, "B T G K", sizes)
    check_segment_ids(op, segment_ids, sizes)
    _check(op, {"q": q, "k": k}, sizes, block_size, top_k)
    q, k = lax.stop_gradient(jnp.asarray(q)), lax.stop_gradient(jnp.asarray(k))
    batch, time, _, _ = q.shape
    ids = jnp.zeros((batch, time), jnp.int32) if segment_ids is None else runs(segment_ids)
    means = block_means(k, ids, block_size)
    return chosen_blocks(q, means, begins(ids), 0, block_size, top_k)


def block_means(k: jax.Array, ids: jax.Array, block_size: int) -> jax.Array:
    """Of the keys of each block that are in the segment of its last: [B, J, G, K], at least float32."""
    time = k.shape[1]
    last = jnp.minimum(jnp.arange(1, -(-time // block_size) + 1) * block_size, time) - 1
    counted = (ids == jnp.repeat(ids[:, last], block_size, axis=1)[:, :time])[..., None, None]
    counts = _block_sums(counted.astype(jnp.float32), block_size)
    return _block_sums(jnp.where(counted, k, 0), block_size) / counts


def chosen_blocks(
    q: jax.Array, means: jax.Array, begun: jax.Array, start: int | jax.Array, block_size: int, top_k: int
) -> jax.Array:
    """[B, T, H, top_k] for queries from time `start` on, in segments that began at `begun` [B, T]."""
    batch, time, heads, _ = q.shape
    blocks = means.shape[1]
    size = min(max(dispatch.fitting(SCORES * dispatch.block_rows(), batch * heads * blocks), 16), max(time, 1))
    pieces = -(-time // size)
    q, begun = (jnp.pad(x, [(0, 0), (0, pieces * size - time)] + [(0, 0)] * (x.ndim - 2)) for x in (q, begun))

    def choose(first: jax.Array) -> jax.Array:
        here = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=1)
        return _best(here(q), means, start + first + jnp.arange(size), here(begun), block_size, top_k)

    chosen = jnp.moveaxis(lax.map(choose, size * jnp.arange(pieces)), 0, 1)
    return chosen.reshape(batch, pieces * size, heads, top_k)[:, :time]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MobaCache:
    """What mixture of block attention keeps of the tokens that have come."""

    k: jax.Array
    """[B, S, G, K]; S is the capacity."""
    v: jax.Array
    """[B, S, G, V]."""
    sums: jax.Array
    """[B, S / block_size, G, K] of each block's keys, at least float32."""
    length: jax.Array
    """[B] int32, how many tokens have come."""


def moba_cache(
    k: jax.Array, v: jax.Array, *, capacity: int, block_size: int = 256, length: jax.Array | None = None
) -> MobaCache:
    """The cache of `moba_step` after the tokens of k and v.

    Args:
      k, v: [B, T, G, K] and [B, T, G, V]; T may be 0.
      capacity: how many tokens it will hold at most, rounded up to whole blocks.
      block_size: as in `moba`.
      length: [B] integers, how many of the T tokens of each row count; all unless given.

    Raises:
      ValueError: an argument of another shape, dtype or range; more tokens than the capacity.
    """
    op = "moba_cache"
    sizes: dict[str, int] = {}
    check_shape(op, "k", k, "B T G K", sizes)
    check_shape(op, "v", v, "B T G V", sizes)
    _check(op, {"k": k, "v": v}, sizes | {"H": sizes["G"]}, block_size, top_k=1)
    length = prefix_lengths(op, length, sizes)
    k, v = (prefix(op, x, length, -(-capacity // block_size) * block_size) for x in (k, v))
    return MobaCache(k, v, _block_sums(k, block_size), length)


def moba_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: MobaCache,
    *,
    block_size: int = 256,
    top_k: int = 4,
    scale: float | None = None,
) -> tuple[jax.Array, MobaCache]:
    """One token of `moba`, for streaming; rows of the batch may be of different lengths.

    It reads the blocks' sums and top_k blocks, whatever the capacity.

    Args:
      q: [B, H, K].
      k, v: [B, G, K] and [B, G, V].
      cache: of `moba_cache` with the same block_size, or of a step before.
      block_size, top_k, scale: as in `moba`.

    Returns:
      out [B, H, V] in v's dtype, and the cache with the token. Where lengths are traced and a row's cache is full,
      nothing is written and its output is NaN.

    Raises:
      ValueError: an argument of another shape or dtype, a cache of another block_size or full.
    """
    op = "moba_step"
    sizes: dict[str, int] = {}
    check_shape(op, "q", q, "B H K", sizes)
    check_shape(op, "k", k, "B G K", sizes)
    check_shape(op, "v", v, "B G V", sizes)
    _check(op, {"q": q, "k": k, "v": v}, sizes, block_size, top_k)
    capacity = cache.k.shape[1]
    if cache.sums.shape[1] * block_size != capacity:
        raise ValueError(
            f"{op}: cache: got {cache.sums.shape[1]} blocks of {capacity} tokens, wanted them of {block_size}"
        )
    check_room(op, cache.length, capacity)
    time, full = cache.length, cache.length >= capacity
    keys, values = written(cache.k, k, time), written(cache.v, v, time)
    row = jnp.arange(sizes["B"])
    sums = cache.sums.at[row, time // block_size].add(k.astype(cache.sums.dtype), mode="drop")
    ids = _best(q[:, None], sums / block_size, time[:, None], jnp.zeros_like(time[:, None]), block_size, top_k)[:, 0]
    tokens = (gather_blocks(x, ids, block_size) for x in (keys, values))
    scale = sizes["K"] ** -0.5 if scale is None else scale
    out = attend(q, *tokens, visible=block_times(ids, block_size) <= time[:, None, None], scale=scale)
    out = jnp.where(full[:, None, None], jnp.nan, out)
    return out, MobaCache(keys, values, sums, jnp.where(full, time, time + 1))


def _check(op: str, arrays: dict[str, jax.Array], sizes: dict[str, int], block_size: int, top_k: int) -> None:
    check_floating(op, arrays)
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: k: got {sizes['G']} heads, wanted a divisor of the {sizes['H']} of q")
    for name, number in (("block_size", block_size), ("top_k", top_k)):
        if number < 1:
            raise ValueError(f"{op}: {name}: got {number}, wanted at least 1")


def _block_sums(x: jax.Array, block_size: int) -> jax.Array:
    """[B, T, G, F] → [B, blocks, G, F], at least float32."""
    batch, time, groups, width = x.shape
    blocks = -(-time // block_size)
    x = jnp.pad(x, ((0, 0), (0, blocks * block_size - time), (0, 0), (0, 0)))
    x = x.reshape(batch, blocks, block_size, groups, width)
    return jnp.sum(x, axis=2, dtype=jnp.promote_types(x.dtype, jnp.float32))


def _best(q: jax.Array, means: jax.Array, time: jax.Array, begins: jax.Array, block_size: int, top_k: int) -> jax.Array:
    """q [B, R, H, K], means [B, J, G, K], times [R] or [B, R], begins [B, R] → [B, R, H, top_k].

    The mean of a query's own block does not matter, nor do those of blocks after it.
    """
    batch, size, heads, width = q.shape
    q = q.astype(means.dtype).reshape(batch, size, means.shape[2], -1, width)
    gate = jnp.einsum("brghk,bjgk->brghj", q, means, precision="highest").reshape(batch, size, heads, -1)
    time, begins = (x[..., None, None] for x in (time, begins))
    block = jnp.arange(means.shape[1])
    return best(rank(gate, block, time, begins, block_size=block_size, initial=0, local=1), top_k)
