"""Native sparse attention: compressed blocks of tokens, selected blocks and a window, trained end to end.

Its parts are operations of their own: `compress_blocks`, `compressed_attention`, `select_blocks`, `selected_attention`;
the window is `sparse_attention`. `native_sparse_attention_step` serves streaming.
"""

from typing import Any

import jax

from kernels.checks import check_segment_ids
from kernels.native_sparse_attention.branches import Branches, by_kind, checked, gated_sum
from kernels.native_sparse_attention.cache import (
    NativeSparseCache,
    native_sparse_attention_step,
    native_sparse_cache,
)
from kernels.native_sparse_attention.compression import Compressions, compress_blocks, compressed_attention
from kernels.packing import runs
from kernels.select_blocks import select_blocks
from kernels.selected_attention import selected_attention
from kernels.sparse_attention import sparse_attention
from kernels.sparse_attention.mask import Causal, Window

__all__ = [
    "NativeSparseCache",
    "compress_blocks",
    "compressed_attention",
    "native_sparse_attention",
    "native_sparse_attention_step",
    "native_sparse_cache",
    "select_blocks",
    "selected_attention",
]


def native_sparse_attention(
    q: Branches,
    k: Branches,
    v: Branches,
    gates: jax.Array,
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
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """out = gates_0 · compressed + gates_1 · selected + gates_2 · window: three causal attentions of the same queries.

    Native Sparse Attention (2502.11089), section 3. The first sees one key for each block of tokens that has ended, the
    second all tokens of the blocks to which the first gives most weight (`select_blocks`), the third the last ones.
    What is selected is not differentiable: scores learn through the compressed branch.

    The cost of a query is that of T / stride + selected_blocks · block_size + window keys. Nothing as large as
    T · window or T · selected_blocks · block_size is ever in memory.

    Args:
      q: [B, T, H, K] queries, or a triple of them for the compressed, the selected and the window branch, as where only
        some of them are turned by positions.
      k: [B, T, G, K] keys, or a triple of them, as the paper projects each branch's separately. G divides H; each head
        serves H / G neighbouring heads of q, which share their blocks.
      v: [B, T, G, V] values, or a triple.
      gates: [B, T, H, 3], after their sigmoid.
      block_size: tokens of a block that is selected, a multiple of the stride.
      stride: tokens from one compressed block to the next.
      selected_blocks: how many blocks a query selects, the forced ones among them.
      window: tokens of the window, the query's own among them.
      compress: the mean over a block unless given: [B, N, compression_block, G, F] → [B, N, G, F], or a pair of them,
        for keys and for values. May close over parameters; keys keep their width.
      compression_block: tokens of a compressed block, a multiple of the stride; 2 · stride unless given.
      initial, local: so many blocks where the sequence begins, and up to the query's own, are always selected.
      scale: of the scores; K**-0.5 unless given.
      segment_ids: [B, T] integers; a segment is a run of equal ids and sees nothing of the others. Blocks lie on the
        grid of the row, so the result is that of the segment on its own where it begins at a multiple of block_size.
      implementation: of every part: None (best for the platform), "reference", "xla" or "pallas".

    Returns:
      out [B, T, H, V] in the values' dtype.

    Raises:
      ValueError: an argument of another shape, dtype or range.
      NotImplementedError: "pallas" where one of the parts cannot serve.
    """
    op = "native_sparse_attention"
    sizes, queries, keys, values = checked(op, q, k, v, gates, "B T")
    check_segment_ids(op, segment_ids, sizes)
    key_compression, value_compression = by_kind(op, compress)
    compression_block = 2 * stride if compression_block is None else compression_block
    compression: dict[str, Any] = {"block_size": compression_block, "stride": stride}
    k_compressed = compress_blocks(keys[0], **compression, compress=key_compression)
    v_compressed = compress_blocks(values[0], **compression, compress=value_compression)
    ids = None if segment_ids is None else runs(segment_ids)
    shared: dict[str, Any] = {"scale": scale, "segment_ids": ids, "implementation": implementation}
    compressed = compressed_attention(queries[0], k_compressed, v_compressed, **compression, **shared)
    blocks = select_blocks(
        queries[0],
        k_compressed,
        block_size=block_size,
        stride=stride,
        compression_block=compression_block,
        selected_blocks=selected_blocks,
        initial=initial,
        local=local,
        **shared,
    )
    selected = selected_attention(queries[1], keys[1], values[1], blocks, block_size=block_size, **shared)
    recent = sparse_attention(queries[2], keys[2], values[2], Causal() & Window(window), **shared)
    return gated_sum(gates, compressed, selected, recent)
