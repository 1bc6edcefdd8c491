"""The compressed branch of native sparse attention: one key and value for each of many overlapping blocks of tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.checks import check_floating, check_segment_ids, check_shape
from kernels.packing import runs
from kernels.select_blocks import check_blocks
from kernels.select_blocks.form import compressed_blocks
from kernels.sparse_attention import sparse_attention
from kernels.sparse_attention.mask import Compressed

Compress = Callable[[jax.Array], jax.Array]
Compressions = Compress | tuple[Compress | None, Compress | None] | None
"""One for keys and values, or one for each; None is the mean."""


def compress_blocks(x: jax.Array, *, block_size: int, stride: int, compress: Compress | None = None) -> jax.Array:
    """One key or value for each block of tokens; block i holds those from i · stride to i · stride + block_size - 1.

    Native Sparse Attention (2502.11089), section 3.3.1, equation 7. Tokens at the end that fill no block are left out.

    Args:
      x: [B, T, G, F] keys or values.
      block_size: in tokens, a multiple of the stride.
      stride: in tokens.
      compress: [B, N, block_size, G, F] → [B, N, G, F'], may close over parameters; the mean over a block, in float32,
        unless given.

    Returns:
      [B, N, G, F'] with N = (T - block_size) // stride + 1, or 0 where T is less; the mean is of x's dtype.

    Raises:
      ValueError: an argument of another shape, dtype or range; `compress` returned another shape.
    """
    op = "compress_blocks"
    sizes: dict[str, int] = {}
    check_shape(op, "x", x, "B T G F", sizes)
    check_floating(op, {"x": x})
    check_blocks(op, block_size, stride, block_size)
    batch, time, groups, width = x.shape
    count, whole = compressed_blocks(time, block_size, stride), block_size // stride
    used = count and (count + whole - 1) * stride
    strides = x[:, :used].reshape(batch, used // stride, stride, groups, width)
    if compress is None:
        strides = jnp.mean(strides, axis=2, keepdims=True, dtype=jnp.promote_types(x.dtype, jnp.float32))
    blocks = jnp.concatenate([strides[:, n : n + count] for n in range(whole)], axis=2)
    return one_each(op, blocks, compress, x.dtype)


def one_each(op: str, blocks: jax.Array, compress: Compress | None, dtype: jnp.dtype) -> jax.Array:
    """[B, N, block_size, G, F] → [B, N, G, F'] by `compress`, or the mean in `dtype`.

    Raises ValueError where `compress` returns another shape.
    """
    if compress is None:
        return jnp.mean(blocks, axis=2, dtype=jnp.promote_types(blocks.dtype, jnp.float32)).astype(dtype)
    batch, count, size, groups, width = blocks.shape
    # Where no block has ended it is asked for the shape of one: not every function takes none.
    asked = jax.ShapeDtypeStruct((batch, max(count, 1), size, groups, width), blocks.dtype)
    shape = jax.eval_shape(compress, asked)
    if shape.ndim != 4 or shape.shape[:3] != (batch, max(count, 1), groups):
        raise ValueError(
            f"{op}: compress: got shape {shape.shape}, wanted {[batch, max(count, 1), groups]} and a width"
        )
    return compress(blocks) if count else jnp.zeros((batch, 0, *shape.shape[2:]), shape.dtype)


def compressed_attention(
    q: jax.Array,
    k_compressed: jax.Array,
    v_compressed: jax.Array,
    *,
    block_size: int,
    stride: int,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention to one key and value for each block of tokens that has ended, the query's own token included.

    Native Sparse Attention (2502.11089), section 3.3.1. A query before the end of the first block gets 0.

    Args:
      q: [B, T, H, K] queries.
      k_compressed, v_compressed: [B, N, G, K] and [B, N, G, V] of `compress_blocks`; G divides H.
      block_size, stride: those of the compression, in tokens.
      scale: of the scores; K**-0.5 unless given.
      segment_ids: [B, T] integers; a segment is a run of equal ids. A block that crosses its border is seen by nobody.
      implementation: None (best for the platform), "reference", "xla" or "pallas".

    Returns:
      out [B, T, H, V] in the values' dtype.

    Raises:
      ValueError: an argument of another shape, dtype or range.
      NotImplementedError: "pallas" where it cannot serve.
    """
    op = "compressed_attention"
    sizes: dict[str, int] = {}
    check_shape(op, "q", q, "B T H K", sizes)
    check_shape(op, "k_compressed", k_compressed, "B N G K", sizes)
    check_shape(op, "v_compressed", v_compressed, "B N G V", sizes)
    check_floating(op, {"q": q, "k_compressed": k_compressed, "v_compressed": v_compressed})
    check_segment_ids(op, segment_ids, sizes)
    check_blocks(op, block_size, stride, block_size)
    count = compressed_blocks(sizes["T"], block_size, stride)
    if sizes["N"] != count:
        raise ValueError(f"{op}: k_compressed: got N={sizes['N']}, wanted {count} for T={sizes['T']}")
    if count == 0:
        return jnp.zeros((*q.shape[:3], sizes["V"]), v_compressed.dtype)
    ids = None
    if segment_ids is not None:
        run = runs(segment_ids)
        first, last = (run[:, at : at + count * stride : stride] for at in (0, block_size - 1))
        ids = run, jnp.where(first == last, first, -1)
    mask = Compressed(block_size, stride)
    return sparse_attention(
        q, k_compressed, v_compressed, mask, scale=scale, segment_ids=ids, implementation=implementation
    )
