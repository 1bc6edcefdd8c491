"""Cutting [B, T, H, F] arrays into chunks of time for the XLA forms."""

import jax
import jax.numpy as jnp

from kernels import dispatch


def compute_dtype(*arrays: jax.Array) -> tuple[jnp.dtype, jax.lax.Precision]:
    """float32, or float64 where an array is; for half precision, the accelerator's own way to multiply matrices."""
    dtype = jnp.result_type(*arrays)
    half = dtype in (jnp.bfloat16, jnp.float16)
    return (
        jnp.promote_types(dtype, jnp.float32),
        jax.lax.Precision.DEFAULT if half else jax.lax.Precision.HIGHEST,
    )


def block_length(state: jax.Array, chunk_size: int) -> int:
    """Tokens that are worked on at once, a multiple of `chunk_size`, for a state [B, H, ...]."""
    rows = dispatch.fitting(dispatch.block_rows(), state.shape[0] * state.shape[1])
    return max(rows // chunk_size, 1) * chunk_size


def split(x: jax.Array, chunk_size: int, dtype: jnp.dtype) -> jax.Array:
    """[B, T, H, F] → [B, H, N, C, F], the last chunk filled up with zeros, which change no state."""
    batch, time, heads, width = x.shape
    chunks = -(-time // chunk_size)
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, chunks * chunk_size - time), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(batch, chunks, chunk_size, heads, width), 3, 1)


def join(x: jax.Array, time: int) -> jax.Array:
    """[B, H, N, C, F] → [B, T, H, F], the filling cut off."""
    batch, heads, chunks, size, width = x.shape
    return jnp.moveaxis(x, 1, 3).reshape(batch, chunks * size, heads, width)[:, :time]
