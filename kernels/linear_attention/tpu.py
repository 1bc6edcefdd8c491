"""Linear attention as Pallas TPU kernels: the matrix products of `xla.py`, one chunk of one head at a time."""

import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels import tpu_chunks
from kernels.chunks import compute_dtype
from kernels.linear_attention.form import Form
from kernels.tiles import decayed_products, diagonal, dot, only, pair_decays, row_sums

Tiles = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


def refusal(key_width: int, value_width: int, chunk_size: int, dtype: jnp.dtype) -> str | None:
    """Why these kernels do not serve, or None where they do."""
    return tpu_chunks.refusal(key_width, value_width, dtype)


def _chunk(form: Form, precision: lax.Precision, state: jax.Array, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """State [V, K] and q [C, K], k [C, K], v [C, V], log decay None, [1, C] or [C, K] → (state after, out [C, V])."""
    q, k, v, g = tiles
    seen = operator.ge if form.own else operator.gt
    if g is None:
        q_in, k_out, kept = q, k, state
        inside = only(dot(q, k, "nt", precision), seen)
    else:
        if g.shape[0] == 1:
            sums = row_sums(g)
            inside = only(dot(q, k, "nt", precision) * pair_decays(g), seen)
        else:
            (inside,), sums = decayed_products([q], k, g, precision)
            if form.own:
                inside += diagonal(jnp.sum(q * k, axis=1, keepdims=True))
        upto, after, whole = (jnp.exp(x) for x in sums)
        q_in, k_out, kept = q * upto, k * after, state * whole
    out = dot(q_in, state, "nt", precision) + dot(inside, v, "nn", precision)
    return kept + dot(v, k_out, "tn", precision), out


def forward(form: Form, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    """As `linear_attention` with canonical arguments, see `form.py`. Returns (out, final_state)."""
    *tokens, initial_state = arrays
    chunk = partial(_chunk, form, compute_dtype(*tokens[:3])[1])
    return tpu_chunks.forward(
        "linear_attention", chunk, form.scale, form.chunk_size, tuple(tokens), initial_state, tokens[2]
    )


def backward(form: Form, *arrays: Any) -> tuple[Any, ...]:
    """Arguments and the cotangents of (out, final_state) → the cotangents of the arguments."""
    *tokens, initial_state, d_out, d_final = arrays
    chunk = partial(_chunk, form, compute_dtype(*tokens[:3])[1])
    d_tokens, d_initial = tpu_chunks.backward(
        "linear_attention", chunk, form.scale, form.chunk_size, tuple(tokens), initial_state, d_out, d_final
    )
    return *d_tokens, d_initial
