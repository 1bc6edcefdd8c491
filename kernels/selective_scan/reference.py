"""The definition of the selective scan, one token at a time."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.packing import starts


def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """As the public operation; computes in the state's dtype."""
    dtype = initial_state.dtype
    fresh = jnp.zeros(u.shape[:2], bool) if segment_ids is None else starts(segment_ids)

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        u, delta, B, C, fresh = token
        state = jnp.where(fresh[:, None, None], 0, state) * jnp.exp(delta[..., None] * A.astype(dtype))
        state += delta[..., None] * B[:, None, :] * u[..., None]
        return state, jnp.sum(C[:, None, :] * state, -1) + D.astype(dtype) * u

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (*(x.astype(dtype) for x in (u, delta, B, C)), fresh))
    final_state, y = lax.scan(step, initial_state, tokens)
    return jnp.moveaxis(y, 0, 1).astype(u.dtype), final_state
