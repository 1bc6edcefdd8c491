"""The definition of the (gated) delta rule, one token at a time."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.packing import starts


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """As the public operation, with H heads in every array and log_decay None or [B, T, H, 1 or K].

    Computes in the dtype of `initial_state`.
    """
    dtype = initial_state.dtype
    tokens = {name: x.astype(dtype) for name, x in {"q": q, "k": k, "v": v, "beta": beta}.items()}
    tokens["decay"] = jnp.ones((*k.shape[:-1], 1), dtype) if log_decay is None else jnp.exp(log_decay.astype(dtype))
    tokens["fresh"] = jnp.zeros(k.shape[:2], bool) if segment_ids is None else starts(segment_ids)

    def step(state: jax.Array, token: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        state = jnp.where(token["fresh"][:, None, None, None], 0, state) * token["decay"][..., None]
        recalled = jnp.einsum("bhk,bhkv->bhv", token["k"], state, precision="highest")
        correction = token["beta"][..., None] * (token["v"] - recalled)
        state += token["k"][..., None] * correction[..., None, :]
        return state, scale * jnp.einsum("bhk,bhkv->bhv", token["q"], state, precision="highest")

    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    final_state, out = lax.scan(step, initial_state, by_time)
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), final_state
