"""Packed sequences: where segments begin, and what recurrences make of it.

To a recurrence a segment's first token is one whose log decay is so low that exp gives exactly 0. A forgotten state and
a reset state are then the same thing, forward and backward, and no kernel needs to know of segments. This relies on
every form summing log decays without ever subtracting them.
"""

import jax
import jax.numpy as jnp
from jax import lax

# exp(RESET) is 0 in every dtype, and sums of thousands of them stay finite, which those of -inf times a mask would not.
RESET = -1e5


def starts(segment_ids: jax.Array, before: jax.Array | None = None) -> jax.Array:
    """[B, T] ids → [B, T] bool: True where the id differs from the one before.

    At time 0 the one before is `before` [B, 1]; without it time 0 is no start, it goes on from the initial state.
    """
    first = segment_ids[:, :1] if before is None else before
    return segment_ids != jnp.concatenate([first, segment_ids[:, :-1]], axis=1)


def runs(segment_ids: jax.Array) -> jax.Array:
    """[B, T] ids → [B, T] int32: runs of equal ids numbered from 0; an id that comes back is another run."""
    return jnp.cumsum(starts(segment_ids), axis=1, dtype=jnp.int32)


def begins(segment_ids: jax.Array) -> jax.Array:
    """[B, T] ids → [B, T] int32: the time at which each token's segment begins."""
    time = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return lax.cummax(jnp.where(starts(segment_ids), time, 0), axis=1)


def with_resets(log_decay: jax.Array | None, fresh: jax.Array | None) -> jax.Array | None:
    """Log decay [B, T, H, F] or None, segment starts [B, T] or None → log decay with RESET at the starts.

    None where both are, [B, T, 1, 1] where only the starts are given. -inf becomes RESET, whose exp is 0 too.
    """
    if fresh is None:
        return None if log_decay is None else jnp.maximum(log_decay, RESET)
    reset = jnp.where(fresh, jnp.float32(RESET), 0.0)[..., None, None]
    return reset if log_decay is None else jnp.maximum(log_decay, RESET) + reset
