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
from kernels.tiles import decayed_products, diagonal, dot, level_sums, only, pair_sums, row_sums
from kernels.tpu_chunks import Op

Tiles = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
Summed = tuple[jax.Array, jax.Array, jax.Array, Any, Any]
Prepared = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]


def refusal(key_width: int, value_width: int, chunk_size: int, dtype: jnp.dtype) -> str | None:
    """Why these kernels do not serve, or None where they do."""
    return tpu_chunks.refusal(key_width, value_width, dtype)


def _sum_decays(tiles: Tiles) -> Summed:
    """q [C, K], k [C, K], v [C, V], log decay None, [1, C] or [C, K] → the first three and the sums of log decays."""
    q, k, v, g = tiles
    if g is None:
        return q, k, v, None, None
    return q, k, v, *((pair_sums(g), row_sums(g)) if g.shape[0] == 1 else level_sums(g))


def _prepare(form: Form, precision: lax.Precision, summed: Summed) -> Prepared:
    """All the rest that does not depend on the state."""
    q, k, v, pairs, sums = summed
    if isinstance(pairs, list):
        inside = decayed_products(q, k, pairs, precision)
        if form.own:
            inside += diagonal(jnp.sum(q * k, axis=1, keepdims=True))
    else:
        inside = dot(q, k, "nt", precision)
        inside = only(inside if pairs is None else inside * jnp.exp(pairs), operator.ge if form.own else operator.gt)
    q_in, k_out, kept = q, k, None
    if sums is not None:
        upto, after, kept = (jnp.exp(x) for x in sums)
        q_in, k_out = q * upto, k * after
    return q_in, k_out, v, dot(inside, v, "nn", precision), kept


def _advance(precision: lax.Precision, state: jax.Array, prepared: Prepared) -> tuple[jax.Array, jax.Array]:
    """State [V, K] at the chunk's start → (state after it, out [C, V])."""
    q_in, k_out, v, from_inside, kept = prepared
    out = from_inside + dot(q_in, state, "nt", precision)
    state = state if kept is None else state * kept
    return state + dot(v, k_out, "tn", precision), out


def _op(form: Form, q: jax.Array, k: jax.Array, v: jax.Array) -> Op:
    _, precision = compute_dtype(q, k, v)
    stages = (_sum_decays, partial(_prepare, form, precision))
    return Op("linear_attention", stages, partial(_advance, precision), form.scale)


def forward(form: Form, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    """As `linear_attention` with canonical arguments, see `form.py`. Returns (out, final_state)."""
    *tokens, initial_state = arrays
    return tpu_chunks.forward(_op(form, *tokens[:3]), form.chunk_size, tuple(tokens), initial_state, tokens[2])


def backward(form: Form, *arrays: Any) -> tuple[Any, ...]:
    """Arguments and the cotangents of (out, final_state) → the cotangents of the arguments."""
    *tokens, initial_state, d_out, d_final = arrays
    op = _op(form, *tokens[:3])
    d_tokens, d_initial = tpu_chunks.backward(op, form.chunk_size, tuple(tokens), initial_state, d_out, d_final)
    return *d_tokens, d_initial
