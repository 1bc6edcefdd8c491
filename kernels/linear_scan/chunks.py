"""Chunks of time that a loop over tokens runs through side by side, where its state is small for the machine.

Inside a form arrays are [B N, C, ...]: N chunks of C tokens of every sequence, one after the other.
"""

from math import prod

import jax
import jax.numpy as jnp

from kernels import dispatch


def chunk_count(time: int, state_shape: tuple[int, ...]) -> int:
    """As many as fill the machine but not more than tokens in a chunk; of about so many those that need no filling."""
    elements = prod(state_shape)
    if not isinstance(elements, int):  # a symbol
        return 1
    most = max(min(-(-dispatch.state_elements() // max(elements, 1)), int(time**0.5)), 1)
    return max((n for n in range(most // 2 + 1, most + 1) if time % n == 0), default=most)


def split(x: jax.Array, chunks: int) -> jax.Array:
    """[B, T, ...] → [B N, C, ...], the last chunk filled up with zeros."""
    batch, time, *rest = x.shape
    size = -(-time // chunks)
    if chunks * size > time:
        x = jnp.pad(x, ((0, 0), (0, chunks * size - time), *((0, 0) for _ in rest)))
    return x.reshape(batch * chunks, size, *rest)


def join(x: jax.Array, batch: int, time: int) -> jax.Array:
    """[B N, C, ...] → [B, T, ...], the filling cut off."""
    return x.reshape(batch, -1, *x.shape[2:])[:, :time]


def by_chunk(x: jax.Array, batch: int) -> jax.Array:
    """[B N, ...] → [N, B, ...]: what a scan over the chunks takes."""
    return jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 0)


def of_chunks(x: jax.Array) -> jax.Array:
    """[N, B, ...] → [B N, ...]: what a scan over the chunks gives."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def last(states: jax.Array, batch: int, reverse: bool) -> jax.Array:
    """States [B N, ...] after the chunks → [B, ...] after the last one met."""
    return states.reshape(batch, -1, *states.shape[1:])[:, 0 if reverse else -1]
