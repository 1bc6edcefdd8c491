"""Alternating sparse attention on latents: window layers and layers of compressed and selected blocks, in turn.

ASA (2511.00819) halves what native sparse attention caches: half of its layers see a window only, with multi-head
latent attention (2405.04434, section 2.1), the other half compressed and selected blocks only, with group-head latents.
Keys and values are never cached, only the latents they are projected from. What is ours, as the abstract leaves it open
(no code of the authors' is public): local layers come first and the last layer is global; the window is not gated;
each group of heads has a latent of its own; blocks are compressed as latents, so keys and values share one compression;
rotary parts, kept beside the latents for every token, take part in the window and the selected blocks, not in the
compressed ones, and all scores have one scale.

    layers = [local_latent_attention, global_latent_attention] * 6

With identities for up-projections and no rotary parts these are `sparse_attention(Causal() & Window(window))` and the
first two branches of `native_sparse_attention`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.checks import check_floating, check_segment_ids, check_shape
from kernels.chunks import compute_dtype
from kernels.decoding import (
    attend,
    block_times,
    check_room,
    check_window,
    gather_blocks,
    prefix,
    prefix_lengths,
    ring,
    ring_times,
    taken,
    written,
)
from kernels.native_sparse_attention.branches import gated_sum
from kernels.native_sparse_attention.compression import Compress, compress_blocks, compressed_attention, one_each
from kernels.packing import runs
from kernels.select_blocks import check_blocks, check_selection, select_blocks
from kernels.select_blocks.form import Form, compressed_blocks
from kernels.select_blocks.reference import select_blocks as select_for_query
from kernels.selected_attention import selected_attention
from kernels.sparse_attention import sparse_attention
from kernels.sparse_attention.mask import Causal, Window


def local_latent_attention(
    q: jax.Array,
    latents: jax.Array,
    up_k: jax.Array,
    up_v: jax.Array,
    *,
    window: int = 512,
    q_rope: jax.Array | None = None,
    k_rope: jax.Array | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Window attention to keys [up_k c ; k_rope] and values up_v c of the last tokens' latents c.

    Args:
      q: [B, T, H, K] queries.
      latents: [B, T, C].
      up_k, up_v: [C, H, K] and [C, H, V], the projections of each head.
      window: in tokens, the query's own among them.
      q_rope, k_rope: [B, T, H, R] and [B, T, R] (shared by the heads), both rotated, or None.
      scale: of the scores; (K + R)**-0.5 unless given.
      segment_ids: [B, T] integers; a segment is a run of equal ids.
      implementation: None (best for the platform), "reference", "xla" or "pallas".

    Returns:
      out [B, T, H, V] in the latents' dtype.

    Raises:
      ValueError: an argument of another shape or dtype.
      NotImplementedError: "pallas" where it cannot serve.
    """
    op = "local_latent_attention"
    arrays = {"q": (q, "B T H K"), "latents": (latents, "B T C"), "up_k": (up_k, "C H K"), "up_v": (up_v, "C H V")}
    q_rope, k_rope, scale, sizes = latent_arguments(op, arrays, q_rope, k_rope, "B T", scale)
    check_segment_ids(op, segment_ids, sizes)
    k, v = (up_projected("btc,chk->bthk", latents, up) for up in (up_k, up_v))
    rope = jnp.broadcast_to(k_rope[:, :, None], (*q.shape[:3], k_rope.shape[-1]))
    ids = None if segment_ids is None else runs(segment_ids)
    mask = Causal() & Window(window)
    q, k = (jnp.concatenate(parts, axis=-1) for parts in ((q, q_rope), (k, rope)))
    return sparse_attention(q, k, v, mask, scale=scale, segment_ids=ids, implementation=implementation)


def global_latent_attention(
    q: jax.Array,
    latents: jax.Array,
    gates: jax.Array,
    up_k: jax.Array,
    up_v: jax.Array,
    *,
    block_size: int = 64,
    stride: int = 16,
    selected_blocks: int = 16,
    compress: Compress | None = None,
    compression_block: int | None = None,
    initial: int = 1,
    local: int = 2,
    q_rope: jax.Array | None = None,
    k_rope: jax.Array | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """gates_0 · attention to compressed blocks + gates_1 · attention to the tokens of selected ones, of latents.

    Args:
      q: [B, T, H, K] queries.
      latents: [B, T, G, C], one for each of G groups of neighbouring heads.
      gates: [B, T, H, 2], after their sigmoid.
      up_k, up_v: [G, C, K] and [G, C, V], the projections of each group.
      block_size, stride, selected_blocks, compression_block, initial, local: as in `native_sparse_attention`.
      compress: the mean over a block unless given: [B, N, compression_block, G, C] → [B, N, G, C].
      q_rope, k_rope: [B, T, H, R] and [B, T, R] (shared by the heads), both rotated, or None; not in compressed keys.
      scale: of the scores; (K + R)**-0.5 unless given.
      segment_ids: [B, T] integers; a segment is a run of equal ids. Blocks lie on the grid of the row.
      implementation: None (best for the platform), "reference", "xla" or "pallas".

    Returns:
      out [B, T, H, V] in the latents' dtype.

    Raises:
      ValueError: an argument of another shape, dtype or range.
      NotImplementedError: "pallas" where it cannot serve.
    """
    op = "global_latent_attention"
    arrays = {"q": (q, "B T H K"), "latents": (latents, "B T G C"), "up_k": (up_k, "G C K"), "up_v": (up_v, "G C V")}
    q_rope, k_rope, scale, sizes = latent_arguments(op, arrays, q_rope, k_rope, "B T", scale)
    check_shape(op, "gates", gates, "B T H 2", sizes | {"2": 2})
    check_segment_ids(op, segment_ids, sizes)
    compression_block = 2 * stride if compression_block is None else compression_block
    compression: dict[str, Any] = {"block_size": compression_block, "stride": stride}
    summaries = compress_blocks(latents, **compression, compress=compress)
    k_compressed, v_compressed = (up_projected("bngc,gck->bngk", summaries, up) for up in (up_k, up_v))
    ids = None if segment_ids is None else runs(segment_ids)
    shared: dict[str, Any] = {"scale": scale, "segment_ids": ids, "implementation": implementation}
    compressed = compressed_attention(q, k_compressed, v_compressed, **compression, **shared)
    blocks = select_blocks(
        q,
        k_compressed,
        block_size=block_size,
        stride=stride,
        compression_block=compression_block,
        selected_blocks=selected_blocks,
        initial=initial,
        local=local,
        **shared,
    )
    k, v = (up_projected("btgc,gck->btgk", latents, up) for up in (up_k, up_v))
    rope = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], k_rope.shape[-1]))
    q, k = (jnp.concatenate(parts, axis=-1) for parts in ((q, q_rope), (k, rope)))
    return gated_sum(gates, compressed, selected_attention(q, k, v, blocks, block_size=block_size, **shared))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LocalLatentCache:
    """The last tokens of a local layer, time t at place t % window."""

    latents: jax.Array
    """[B, window, C]."""
    k_rope: jax.Array
    """[B, window, R]; R is 0 where there are no rotary parts."""
    length: jax.Array
    """[B] int32, how many tokens have come."""


def local_latent_cache(
    latents: jax.Array, *, window: int = 512, k_rope: jax.Array | None = None, length: jax.Array | None = None
) -> LocalLatentCache:
    """The cache of `local_latent_attention_step` after the tokens of latents [B, T, C] and k_rope [B, T, R].

    T may be 0. `length` [B]: how many of the T tokens of each row count; all unless given.

    Raises:
      ValueError: an argument of another shape, dtype or range.
    """
    op = "local_latent_cache"
    sizes: dict[str, int] = {}
    check_window(op, window)
    check_shape(op, "latents", latents, "B T C", sizes)
    k_rope = jnp.zeros((*latents.shape[:2], 0), latents.dtype) if k_rope is None else k_rope
    check_shape(op, "k_rope", k_rope, "B T R", sizes)
    length = prefix_lengths(op, length, sizes)
    return LocalLatentCache(ring(latents, length, window), ring(k_rope, length, window), length)


def local_latent_attention_step(
    q: jax.Array,
    latent: jax.Array,
    cache: LocalLatentCache,
    up_k: jax.Array,
    up_v: jax.Array,
    *,
    q_rope: jax.Array | None = None,
    k_rope: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, LocalLatentCache]:
    """One token of `local_latent_attention`, for streaming without end; the window is the cache's.

    Keys and values are not made: q up_kᵀ is compared with the latents, up_v is applied to their weighted sum.

    Args:
      q: [B, H, K].
      latent: [B, C].
      cache: of `local_latent_cache` or of a step before.
      up_k, up_v, scale: as in `local_latent_attention`.
      q_rope, k_rope: [B, H, R] and [B, R], or None.

    Returns:
      out [B, H, V] in the latents' dtype, and the cache with the token.

    Raises:
      ValueError: an argument of another shape or dtype.
    """
    op = "local_latent_attention_step"
    arrays = {"q": (q, "B H K"), "latent": (latent, "B C"), "up_k": (up_k, "C H K"), "up_v": (up_v, "C H V")}
    q_rope, k_rope, scale, _ = latent_arguments(op, arrays, q_rope, k_rope, "B", scale)
    time, window = cache.length, cache.latents.shape[1]
    latents, ropes = (written(old, x, time % window) for old, x in ((cache.latents, latent), (cache.k_rope, k_rope)))
    held = ring_times(time + 1, window) >= 0
    query = jnp.concatenate([up_projected("bhk,chk->bhc", q, up_k), q_rope], axis=-1)
    keys, values = jnp.concatenate([latents, ropes], axis=-1)[:, :, None], latents[:, :, None]
    mixed = attend(query, keys, values, visible=held[..., None], scale=scale)
    return up_projected("bhc,chv->bhv", mixed, up_v), LocalLatentCache(latents, ropes, time + 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GlobalLatentCache:
    """The latents of all tokens of a global layer, and of its compressed blocks."""

    latents: jax.Array
    """[B, S, G, C]; S is the capacity."""
    k_rope: jax.Array
    """[B, S, R]; R is 0 where there are no rotary parts."""
    compressed: jax.Array
    """[B, N, G, C], one for each block that has ended."""
    length: jax.Array
    """[B] int32, how many tokens have come."""


def global_latent_cache(
    latents: jax.Array,
    *,
    capacity: int,
    block_size: int = 64,
    stride: int = 16,
    compress: Compress | None = None,
    compression_block: int | None = None,
    k_rope: jax.Array | None = None,
    length: jax.Array | None = None,
) -> GlobalLatentCache:
    """The cache of `global_latent_attention_step` after the tokens of latents [B, T, G, C] and k_rope [B, T, R].

    T may be 0. `capacity`: how many tokens it will hold at most, rounded up to whole blocks. `length` [B]: how many of
    the T tokens of each row count; all unless given. The other options are those of `global_latent_attention`.

    Raises:
      ValueError: an argument of another shape, dtype or range; more tokens than the capacity.
    """
    op = "global_latent_cache"
    sizes: dict[str, int] = {}
    check_shape(op, "latents", latents, "B T G C", sizes)
    k_rope = jnp.zeros((*latents.shape[:2], 0), latents.dtype) if k_rope is None else k_rope
    check_shape(op, "k_rope", k_rope, "B T R", sizes)
    compression_block = 2 * stride if compression_block is None else compression_block
    check_blocks(op, block_size, stride, compression_block)
    capacity = -(-capacity // block_size) * block_size
    length = prefix_lengths(op, length, sizes)
    stored, ropes = (prefix(op, x, length, capacity) for x in (latents, k_rope))
    known = compress_blocks(stored[:, : sizes["T"]], block_size=compression_block, stride=stride, compress=compress)
    ended = jnp.maximum((length - compression_block) // stride + 1, 0)
    places = compressed_blocks(capacity, compression_block, stride)
    return GlobalLatentCache(stored, ropes, prefix(op, known, ended, places), length)


def global_latent_attention_step(
    q: jax.Array,
    latent: jax.Array,
    gates: jax.Array,
    cache: GlobalLatentCache,
    up_k: jax.Array,
    up_v: jax.Array,
    *,
    block_size: int = 64,
    stride: int = 16,
    selected_blocks: int = 16,
    compress: Compress | None = None,
    compression_block: int | None = None,
    initial: int = 1,
    local: int = 2,
    q_rope: jax.Array | None = None,
    k_rope: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, GlobalLatentCache]:
    """One token of `global_latent_attention`, for streaming; rows of the batch may be of different lengths.

    Keys and values are not made: q up_kᵀ is compared with the latents, up_v is applied to their weighted sum.

    Args:
      q: [B, H, K].
      latent: [B, G, C].
      gates: [B, H, 2].
      cache: of `global_latent_cache` with the same options, or of a step before.
      q_rope, k_rope: [B, H, R] and [B, R], or None.
      up_k, up_v, and the other options: as in `global_latent_attention`.

    Returns:
      out [B, H, V] in the latents' dtype, and the cache with the token. Where lengths are traced and a row's cache is
      full, nothing is written and its output is NaN.

    Raises:
      ValueError: an argument of another shape or dtype, a cache made with other options or full.
    """
    op = "global_latent_attention_step"
    arrays = {"q": (q, "B H K"), "latent": (latent, "B G C"), "up_k": (up_k, "G C K"), "up_v": (up_v, "G C V")}
    q_rope, k_rope, scale, sizes = latent_arguments(op, arrays, q_rope, k_rope, "B", scale)
    check_shape(op, "gates", gates, "B H 2", sizes | {"2": 2})
    compression_block = 2 * stride if compression_block is None else compression_block
    check_blocks(op, block_size, stride, compression_block)
    form = Form(scale, block_size, stride, compression_block, selected_blocks, initial, local)
    check_selection(op, form)
    capacity, places = cache.latents.shape[1], cache.compressed.shape[1]
    if capacity % block_size or places != compressed_blocks(capacity, compression_block, stride):
        raise ValueError(f"{op}: cache: got {capacity} tokens and {places} compressed ones, wanted the same options")
    check_room(op, cache.length, capacity)

    time, full = cache.length, cache.length >= capacity
    latents, ropes = (written(old, x, time) for old, x in ((cache.latents, latent), (cache.k_rope, k_rope)))
    begin = time + 1 - compression_block
    ends = ~full & (begin >= 0) & (begin % stride == 0)

    def added() -> jax.Array:
        block = taken(latents, begin[:, None] + jnp.arange(compression_block))[:, None]
        new = one_each(op, block, compress, latents.dtype)[:, 0]
        return written(cache.compressed, new, jnp.where(ends, begin // stride, places))

    compressed = lax.cond(jnp.any(ends), added, lambda: cache.compressed)
    now, start = time[:, None], jnp.zeros_like(time[:, None])
    grouped = q.reshape(sizes["B"], sizes["G"], -1, sizes["K"])
    query = up_projected("bghk,gck->bghc", grouped, up_k).reshape(*q.shape[:2], -1)
    ids = select_for_query(form, query[:, None], compressed, now, start, capacity // block_size)[:, 0]
    values, rotary = (gather_blocks(x, ids, block_size) for x in (latents, ropes[:, :, None]))
    ended = form.visible(jnp.arange(places), now, start)
    seen = block_times(ids, block_size) <= now[..., None]
    rotated, keys = (jnp.concatenate(parts, axis=-1) for parts in ((query, q_rope), (values, rotary)))
    mixed = (
        attend(query, compressed, compressed, visible=ended[..., None], scale=scale),
        attend(rotated, keys, values, visible=seen, scale=scale),
    )
    out = gated_sum(gates, *mixed).reshape(*grouped.shape[:3], -1)
    out = up_projected("bghc,gcv->bghv", out, up_v).reshape(*q.shape[:2], -1)
    out = jnp.where(full[:, None, None], jnp.nan, out)
    return out, GlobalLatentCache(latents, ropes, compressed, jnp.where(full, time, time + 1))


def latent_arguments(
    op: str,
    arrays: dict[str, tuple[jax.Array, str]],
    q_rope: jax.Array | None,
    k_rope: jax.Array | None,
    leading: str,
    scale: float | None,
) -> tuple[jax.Array, jax.Array, float, dict[str, int]]:
    """Rotary parts, of width 0 where there are none, the scale, and the sizes by letter.

    Raises:
      ValueError: an argument of another shape or dtype.
    """
    sizes: dict[str, int] = {}
    for name, (array, wanted) in arrays.items():
        check_shape(op, name, array, wanted, sizes)
    if (q_rope is None) != (k_rope is None):
        missing = "q_rope" if q_rope is None else "k_rope"
        raise ValueError(f"{op}: {missing}: got None, wanted both rotary parts or none")
    q = arrays["q"][0]
    if q_rope is None or k_rope is None:
        q_rope = jnp.zeros((*q.shape[:-1], 0), q.dtype)
        k_rope = jnp.zeros((*q.shape[:-2], 0), q.dtype)
    check_shape(op, "q_rope", q_rope, f"{leading} H R", sizes)
    check_shape(op, "k_rope", k_rope, f"{leading} R", sizes)
    check_floating(op, {name: array for name, (array, _) in arrays.items()} | {"q_rope": q_rope, "k_rope": k_rope})
    groups = sizes.get("G", 1)
    if groups == 0 or sizes["H"] % groups:
        raise ValueError(f"{op}: up_k: got {groups} groups, wanted a divisor of the {sizes['H']} heads of q")
    return q_rope, k_rope, (sizes["K"] + sizes["R"]) ** -0.5 if scale is None else float(scale), sizes


def up_projected(equation: str, x: jax.Array, projection: jax.Array) -> jax.Array:
    """A projection, summed in at least float32, in x's dtype."""
    dtype, precision = compute_dtype(x, projection)
    return jnp.einsum(equation, x.astype(dtype), projection.astype(dtype), precision=precision).astype(x.dtype)
