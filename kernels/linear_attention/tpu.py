"""Linear attention as Pallas TPU kernels: the matrix products of `xla.py`, one chunk of one head at a time."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels import tpu_chunks
from kernels.chunks import compute_dtype
from kernels.linear_attention.form import Form
from kernels.tiles import chunk_sums, decayed_products, dot, pair_decays, token_indices

Tiles = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


def refusal(key_width: int, value_width: int, chunk_size: int, dtype: jnp.dtype) -> str | None:
    """Why these kernels do not serve, or None where they do."""
    return tpu_chunks.refusal(key_width, value_width, dtype)


def _chunk(form: Form, precision: lax.Precision, state: jax.Array, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """State [V, K] and q [C, K], k [C, K], v [C, V], log decay None, [1, C] or [C, K] → (state after, out [C, V])."""
    q, k, v, g = tiles
    q *= form.scale
    i, j = token_indices(q.shape[0])
    seen = i >= j if form.own else i > j
    if g is None:
        q_in, k_out, kept = q, k, state
        inside = jnp.where(seen, dot(q, k, "nt", precision), 0.0)
    else:
        upto, after, total = chunk_sums(g)
        q_in, k_out, kept = q * jnp.exp(upto), k * jnp.exp(after), state * jnp.exp(total)
        if g.shape[0] == 1:
            inside = jnp.where(seen, dot(q, k, "nt", precision) * pair_decays(g), 0.0)
        else:
            inside = decayed_products(q, k, g, precision)
            if form.own:
                inside += jnp.where(i == j, jnp.sum(q * k, axis=1, keepdims=True), 0.0)
    out = dot(q_in, state, "nt", precision) + dot(inside, v, "nn", precision)
    return kept + dot(v, k_out, "tn", precision), out


def forward(form: Form, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    """As `linear_attention` with canonical arguments, see `form.py`. Returns (out, final_state)."""
    *tokens, initial_state = arrays
    chunk = partial(_chunk, form, compute_dtype(*tokens[:3])[1])
    return tpu_chunks.forward("linear_attention", chunk, form.chunk_size, tuple(tokens), initial_state, tokens[2])


def backward(form: Form, *arrays: Any) -> tuple[Any, ...]:
    """Arguments and the cotangents of (out, final_state) → the cotangents of the arguments."""
    *tokens, initial_state, d_out, d_final = arrays
    chunk = partial(_chunk, form, compute_dtype(*tokens[:3])[1])
    d_tokens, d_initial = tpu_chunks.backward(
        "linear_attention", chunk, form.chunk_size, tuple(tokens), initial_state, d_out, d_final
    )
    return *d_tokens, d_initial
