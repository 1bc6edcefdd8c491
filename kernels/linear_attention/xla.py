"""Linear attention as matrix products over chunks of time, in plain XLA.

Inside a chunk the tokens see each other through a decayed, lower triangular matrix of products; what came before
reaches them through the state at the chunk's start (Yang et al. 2312.06635, section 4; Dao & Gu 2405.21060, section 6).
The states of a block of chunks follow by a short scan, the rest is done for all its chunks at once.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels import recompute
from kernels.chunks import block_length, compute_dtype, join, split
from kernels.decay import chunk_sums, decayed_products, own_products, pair_sums
from kernels.heads import repeat_heads
from kernels.linear_attention.form import Form

Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


def _block(form: Form, state: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """State [B, H, K, V] and a stretch of tokens → the state after it and the tokens' outputs [B, T, H, V]."""
    dtype, precision = compute_dtype(*inputs[:3])
    heads, time, out_dtype = state.shape[1], inputs[0].shape[1], inputs[2].dtype
    q, k, v = (split(repeat_heads(x, heads), form.chunk_size, dtype) for x in inputs[:3])  # [B, H, N, C, ...]
    log_decay = inputs[3]
    mm = partial(jnp.matmul, precision=precision)

    q_in, k_out, kept = q, k, jnp.ones((1, 1, q.shape[2], 1, 1), dtype)
    if log_decay is None:
        products = mm(q, k.mT)
        inside = jnp.tril(products, 0 if form.own else -1)
    else:
        g = split(repeat_heads(log_decay, heads), form.chunk_size, dtype)  # [B, H, N, C, 1 or K]
        upto, after = chunk_sums(g)
        q_in, k_out, kept = q * jnp.exp(upto), k * jnp.exp(after), jnp.exp(upto[..., -1, :, None])
        if g.shape[-1] == 1:
            decay = jnp.exp(pair_sums(g))
            inside = mm(q, k.mT) * decay
            if not form.own:
                inside = jnp.tril(inside, -1)
        else:
            inside = decayed_products(q, k, g, precision)
            if form.own:
                inside += own_products(q, k, precision)
    added = mm(k_out.mT, v)  # [B, H, N, K, V]

    def step(state: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept, added = chunk
        return state * kept + added, state

    state, before = lax.scan(step, state, (jnp.moveaxis(kept, 2, 0), jnp.moveaxis(added, 2, 0)))
    before = jnp.moveaxis(before, 0, 2)
    out = form.scale * (mm(q_in, before) + mm(inside, v))
    return state, join(out, time).astype(out_dtype)


def forward(
    form: Form, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, initial_state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `linear_attention` with canonical arguments, see `form.py`. Returns (out, final_state)."""
    length = block_length(initial_state, form.chunk_size)
    return recompute.forward(partial(_block, form), length, initial_state, (q, k, v, log_decay))


def backward(
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array,
    d_out: jax.Array,
    d_final: jax.Array,
) -> tuple[Any, ...]:
    """Cotangents of (out, final_state) → those of (q, k, v, log_decay, initial_state)."""
    length = block_length(initial_state, form.chunk_size)
    d_initial, d_inputs = recompute.backward(
        partial(_block, form), length, initial_state, (q, k, v, log_decay), d_out, d_final
    )
    return *d_inputs, d_initial
