"""The delta rule as matrix products over chunks of time, in plain XLA.

Inside a chunk the corrections d_i = beta_i (v_i - what the state recalls for k_i) depend on each other through a unit
lower triangular system, which is solved for all chunks at once for both parts of its right-hand side, the values and
the keys (the UT transform of Yang et al. 2406.06484, section 3; with decay 2412.06464 and, by channel, 2510.26692).
Only corrections and states then follow chunk by chunk.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels import recompute
from kernels.chunks import block_length, compute_dtype, join, split
from kernels.decay import chunk_sums, decayed_products, own_products, pair_sums
from kernels.delta_rule.form import Form
from kernels.heads import repeat_heads
from kernels.triangular import solve

Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]


def _block(form: Form, state: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """State [B, H, K, V] and a stretch of tokens → the state after it and the tokens' outputs [B, T, H, V]."""
    q, k, v, beta, log_decay = inputs
    dtype, precision = compute_dtype(q, k, v)
    heads, time, value_width, out_dtype = state.shape[1], q.shape[1], v.shape[-1], v.dtype
    mm = partial(jnp.matmul, precision=precision)

    def chunked(x: jax.Array) -> jax.Array:
        return split(repeat_heads(x, heads), form.chunk_size, dtype)  # [B, H, N, C, ...]

    q, k, v, beta = chunked(q), chunked(k), chunked(v), chunked(beta[..., None])
    q_in, k_in, k_out, kept = q, k, k, jnp.ones((1, 1, q.shape[2], 1, 1), dtype)
    if log_decay is None:
        among_keys, reads = jnp.tril(mm(k, k.mT), -1), jnp.tril(mm(q, k.mT))
    else:
        g = chunked(log_decay)  # [B, H, N, C, 1 or K]
        upto, after = chunk_sums(g)
        q_in, k_in, k_out = q * jnp.exp(upto), k * jnp.exp(upto), k * jnp.exp(after)
        kept = jnp.exp(upto[..., -1, :, None])
        if g.shape[-1] == 1:
            decay = jnp.exp(pair_sums(g))
            among_keys, reads = jnp.tril(mm(k, k.mT) * decay, -1), mm(q, k.mT) * decay
        else:
            among_keys = decayed_products(k, k, g, precision)
            reads = decayed_products(q, k, g, precision) + own_products(q, k, precision)

    solved = solve(beta * among_keys, beta * jnp.concatenate([v, k_in], -1), precision)
    from_values, from_keys = solved[..., :value_width], solved[..., value_width:]

    def step(state: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        from_values, from_keys, k_out, kept = chunk
        corrections = from_values - mm(from_keys, state)
        return state * kept + mm(k_out.mT, corrections), (state, corrections)

    by_chunk = [jnp.moveaxis(x, 2, 0) for x in (from_values, from_keys, k_out, kept)]
    state, carried = lax.scan(step, state, tuple(by_chunk))
    before, corrections = (jnp.moveaxis(x, 0, 2) for x in carried)
    out = form.scale * (mm(q_in, before) + mm(reads, corrections))
    return state, join(out, time).astype(out_dtype)


def forward(form: Form, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    """As `delta_rule` with canonical arguments, see `form.py`. Returns (out, final_state)."""
    *inputs, initial_state = arrays
    length = block_length(initial_state, form.chunk_size)
    return recompute.forward(partial(_block, form), length, initial_state, tuple(inputs))


def backward(form: Form, *arrays: Any) -> tuple[Any, ...]:
    """Arguments and the cotangents of (out, final_state) → the cotangents of the arguments."""
    *inputs, initial_state, d_out, d_final = arrays
    length = block_length(initial_state, form.chunk_size)
    d_initial, d_inputs = recompute.backward(
        partial(_block, form), length, initial_state, tuple(inputs), d_out, d_final
    )
    return *d_inputs, d_initial
