"""The definition of linear attention, one token at a time."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.packing import starts


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """As the public operation, with H heads in every array and log_decay None or [B, T, H, 1 or K].

    Computes in the dtype of `initial_state`.
    """
    dtype = initial_state.dtype
    tokens = {"q": q.astype(dtype) * scale, "k": k.astype(dtype), "v": v.astype(dtype)}
    tokens["decay"] = jnp.ones((*k.shape[:-1], 1), dtype) if log_decay is None else jnp.exp(log_decay.astype(dtype))

    def run(
        tokens: dict[str, jax.Array], ids: jax.Array | None, state: jax.Array, own: bool
    ) -> tuple[jax.Array, jax.Array]:
        fresh = jnp.zeros(k.shape[:2], bool) if ids is None else starts(ids)

        def step(state: jax.Array, token: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            state = jnp.where(token["fresh"][:, None, None, None], 0, state) * token["decay"][..., None]
            after = state + token["k"][..., None] * token["v"][..., None, :]
            return after, jnp.einsum("bhk,bhkv->bhv", token["q"], after if own else state, precision="highest")

        by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), {**tokens, "fresh": fresh})
        state, out = lax.scan(step, state, by_time)
        return jnp.moveaxis(out, 0, 1), state

    out, final_state = run(tokens, segment_ids, initial_state, own=True)
    if not causal:
        flipped = jax.tree.map(lambda x: jnp.flip(x, 1), tokens)
        ids = None if segment_ids is None else jnp.flip(segment_ids, 1)
        out += jnp.flip(run(flipped, ids, jnp.zeros_like(initial_state), own=False)[0], 1)
    return out.astype(v.dtype), final_state
