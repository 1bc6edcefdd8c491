"""Native sparse attention one token after the other: the cache, from a stretch that is known, and the step."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from kernels.checks import check_shape
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
from kernels.native_sparse_attention.branches import Branches, by_branch, by_kind, checked, gated_sum
from kernels.native_sparse_attention.compression import Compressions, compress_blocks, one_each
from kernels.select_blocks import check_blocks, check_selection
from kernels.select_blocks.form import Form, compressed_blocks
from kernels.select_blocks.reference import select_blocks

KeysAndValues = tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NativeSparseCache:
    """What native sparse attention keeps of the tokens that have come: pairs of keys [B, S, G, K], values [B, S, G, V].

    Of the window branch and of the compressed one only the last tokens are kept, time p at place p % S.
    """

    selected: KeysAndValues
    """Every token; S is the capacity."""
    window: KeysAndValues
    """S is the window."""
    recent: KeysAndValues
    """The tokens of a compressed block; S is its size."""
    compressed: KeysAndValues
    """One for each block that has ended."""
    length: jax.Array
    """[B] int32, how many tokens have come."""


def native_sparse_cache(
    k: Branches,
    v: Branches,
    *,
    capacity: int,
    block_size: int = 64,
    stride: int = 16,
    window: int = 512,
    compress: Compressions = None,
    compression_block: int | None = None,
    length: jax.Array | None = None,
) -> NativeSparseCache:
    """The cache of `native_sparse_attention_step` after the tokens of k and v.

    Args:
      k, v: [B, T, G, K] and [B, T, G, V], or triples, as in `native_sparse_attention`. T may be 0.
      capacity: how many tokens it will hold at most, rounded up to whole blocks.
      block_size, stride, window, compress, compression_block: as in `native_sparse_attention`.
      length: [B] integers, how many of the T tokens of each row count; all unless given.

    Raises:
      ValueError: an argument of another shape, dtype or range; more tokens than the capacity.
    """
    op = "native_sparse_cache"
    sizes: dict[str, int] = {}
    keys, values = by_branch(op, "k", k), by_branch(op, "v", v)
    for key, value in zip(keys, values, strict=True):
        check_shape(op, "k", key, "B T G K", sizes)
        check_shape(op, "v", value, "B T G V", sizes)
    compression_block = 2 * stride if compression_block is None else compression_block
    check_blocks(op, block_size, stride, compression_block)
    check_window(op, window)
    capacity = -(-capacity // block_size) * block_size
    length = prefix_lengths(op, length, sizes)
    pairs = [tuple(prefix(op, x, length, capacity) for x in pair) for pair in zip(keys, values, strict=True)]
    places = compressed_blocks(capacity, compression_block, stride)
    ended = jnp.maximum((length - compression_block) // stride + 1, 0)
    known = (
        compress_blocks(x[:, : sizes["T"]], block_size=compression_block, stride=stride, compress=how)
        for x, how in zip(pairs[0], by_kind(op, compress), strict=True)
    )
    return NativeSparseCache(
        selected=pairs[1],
        window=tuple(ring(x, length, window) for x in pairs[2]),
        recent=tuple(ring(x, length, compression_block) for x in pairs[0]),
        compressed=tuple(prefix(op, x, ended, places) for x in known),
        length=length,
    )


def native_sparse_attention_step(
    q: Branches,
    k: Branches,
    v: Branches,
    gates: jax.Array,
    cache: NativeSparseCache,
    *,
    block_size: int = 64,
    stride: int = 16,
    selected_blocks: int = 16,
    window: int = 512,
    compress: Compressions = None,
    compression_block: int | None = None,
    initial: int = 1,
    local: int = 2,
    scale: float | None = None,
) -> tuple[jax.Array, NativeSparseCache]:
    """One token of `native_sparse_attention`, for streaming; rows of the batch may be of different lengths.

    It reads the compressed keys and values, `selected_blocks` blocks and the window, whatever the capacity.

    Args:
      q: [B, H, K], or a triple.
      k, v: [B, G, K] and [B, G, V], or triples.
      gates: [B, H, 3].
      cache: of `native_sparse_cache` with the same options, or of a step before.
      block_size, stride, selected_blocks, window, compress, compression_block, initial, local, scale: as in
        `native_sparse_attention`.

    Returns:
      out [B, H, V] in the values' dtype, and the cache with the token. Where lengths are traced and a row's cache is
      full, nothing is written and its output is NaN.

    Raises:
      ValueError: an argument of another shape or dtype, a cache made with other options or full.
    """
    op = "native_sparse_attention_step"
    sizes, queries, keys, values = checked(op, q, k, v, gates, "B")
    compression_block = 2 * stride if compression_block is None else compression_block
    check_blocks(op, block_size, stride, compression_block)
    scale = sizes["K"] ** -0.5 if scale is None else float(scale)
    form = Form(scale, block_size, stride, compression_block, selected_blocks, initial, local)
    check_selection(op, form)
    capacity = cache.selected[0].shape[1]
    _check_cache(op, cache, form, window)
    check_room(op, cache.length, capacity)

    time, full = cache.length, cache.length >= capacity
    selected, in_window, recent = (
        tuple(written(old, x, jnp.where(full, old.shape[1], time % old.shape[1])) for old, x in zip(*pair, strict=True))
        for pair in (
            (cache.selected, (keys[1], values[1])),
            (cache.window, (keys[2], values[2])),
            (cache.recent, (keys[0], values[0])),
        )
    )
    begin = time + 1 - compression_block
    ends = ~full & (begin >= 0) & (begin % stride == 0)

    def added() -> KeysAndValues:
        in_order = (time[:, None] + 1 + jnp.arange(compression_block)) % compression_block
        blocks = (taken(x, in_order)[:, None] for x in recent)
        new = [one_each(op, x, how, x.dtype) for x, how in zip(blocks, by_kind(op, compress), strict=True)]
        place = jnp.where(ends, begin // stride, cache.compressed[0].shape[1])
        return tuple(written(old, x[:, 0], place) for old, x in zip(cache.compressed, new, strict=True))

    compressed = lax.cond(jnp.any(ends), added, lambda: cache.compressed)
    now, begin = time[:, None], jnp.zeros_like(time[:, None])
    ids = select_blocks(form, queries[0][:, None], compressed[0], now, begin, capacity // block_size)[:, 0]
    ended = form.visible(jnp.arange(compressed[0].shape[1]), now, begin)
    tokens = (gather_blocks(x, ids, block_size) for x in selected)
    held = ring_times(time + 1, window) >= 0
    branches = (
        attend(queries[0], *compressed, visible=ended[..., None], scale=scale),
        attend(queries[1], *tokens, visible=block_times(ids, block_size) <= now[..., None], scale=scale),
        attend(queries[2], *in_window, visible=held[..., None], scale=scale),
    )
    out = jnp.where(full[:, None, None], jnp.nan, gated_sum(gates, *branches))
    length = jnp.where(full, time, time + 1)
    return out, NativeSparseCache(selected, in_window, recent, compressed, length)


def _check_cache(op: str, cache: NativeSparseCache, form: Form, window: int) -> None:
    """Raises ValueError where the cache was made with other options."""
    capacity = cache.selected[0].shape[1]
    if capacity % form.block_size:
        raise ValueError(
            f"{op}: cache: got a capacity of {capacity}, wanted a multiple of block_size {form.block_size}"
        )
    for name, held, wanted in (
        ("window", cache.window, window),
        ("recent", cache.recent, form.compression_block),
        ("compressed", cache.compressed, compressed_blocks(capacity, form.compression_block, form.stride)),
    ):
        if held[0].shape[1] != wanted:
            raise ValueError(f"{op}: cache: {name}: got {held[0].shape[1]} places, wanted {wanted} with these options")
