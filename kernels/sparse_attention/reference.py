"""The definition of sparse attention: a softmax over the visible keys, all pairs at once."""

from typing import Any

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Any, *, scale: float, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """As the public operation, computed in `dtype`; `visible` is bool and broadcasts to [B, H, Tq, Tk]."""
    repeats = q.shape[2] // k.shape[2]
    k, v_ = (jnp.repeat(x.astype(dtype), repeats, axis=2) for x in (k, v))
    scores = scale * jnp.einsum("bthk,bjhk->bhtj", q.astype(dtype), k, precision="highest")
    highest = jnp.max(jnp.where(visible, scores, -jnp.inf), axis=-1, keepdims=True)
    some = highest != -jnp.inf  # of the scores, not of a constant mask, which XLA would fold while it compiles
    highest = jax.lax.stop_gradient(jnp.where(some, highest, 0))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - highest, 0)), 0)
    total = jnp.where(some, jnp.sum(weights, axis=-1, keepdims=True), 1)
    out = jnp.einsum("bhtj,bjhv->bthv", weights / total, v_, precision="highest")
    log_normalizer = jnp.where(some, highest + jnp.log(total), -jnp.inf)
    return out.astype(v.dtype), jnp.swapaxes(log_normalizer[..., 0], 1, 2)
