"""The definition of the linear scan, one token at a time."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.packing import starts


def linear_scan(
    x: jax.Array, log_decay: jax.Array, initial_state: jax.Array, segment_ids: jax.Array | None, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """As the public operation, with x and log_decay of equally many axes; computes in the state's dtype."""
    decay = jnp.broadcast_to(jnp.exp(log_decay).astype(initial_state.dtype), x.shape)
    if segment_ids is None:
        fresh = jnp.zeros(x.shape[:2], bool)
    else:
        fresh = jnp.flip(starts(jnp.flip(segment_ids, 1)), 1) if reverse else starts(segment_ids)
    fresh = jnp.broadcast_to(fresh.reshape(*fresh.shape, *(1,) * (x.ndim - 2)), x.shape)

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, decay, fresh = token
        state = jnp.where(fresh, 0, state) * decay + x
        return state, state

    tokens = tuple(jnp.moveaxis(a, 1, 0) for a in (x.astype(initial_state.dtype), decay, fresh))
    final_state, y = lax.scan(step, initial_state, tokens, reverse=reverse)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), final_state
