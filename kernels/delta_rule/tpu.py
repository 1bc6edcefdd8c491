"""The delta rule as Pallas TPU kernels: one chunk of one head at a time, its triangular system solved in VMEM."""

import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels import tpu_chunks
from kernels.chunks import compute_dtype
from kernels.delta_rule.form import Form
from kernels.tiles import column, decayed_products, diagonal, dot, level_sums, only, pair_sums, row_sums, solve
from kernels.tpu_chunks import Op

Tiles = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]
Summed = tuple[jax.Array, jax.Array, jax.Array, jax.Array, Any, Any]
System = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]
Prepared = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]


# Tokens of a chunk at most: longer ones take as many instructions a token, and need more registers than there are.
LONGEST_CHUNK = 32


def refusal(key_width: int, value_width: int, chunk_size: int, dtype: jnp.dtype) -> str | None:
    """Why these kernels do not serve, or None where they do."""
    return tpu_chunks.refusal(key_width, value_width, dtype)


def _sum_decays(tiles: Tiles) -> Summed:
    """q, k [C, K], v [C, V], beta [1, C], log decay None, [1, C] or [C, K] → the first four, sums of the last."""
    q, k, v, beta, g = tiles
    if g is None:
        return q, k, v, beta, None, None
    return q, k, v, beta, *((pair_sums(g), row_sums(g)) if g.shape[0] == 1 else level_sums(g))


def _multiply(precision: lax.Precision, summed: Summed) -> System:
    """Decayed products of queries and of keys with keys, and the triangular system that the latter make."""
    q, k, v, beta, pairs, sums = summed
    beta = column(beta)
    if isinstance(pairs, list):
        among_keys = decayed_products(k, k, pairs, precision)
        reads = decayed_products(q, k, pairs, precision) + diagonal(jnp.sum(q * k, axis=1, keepdims=True))
    else:
        among_keys, reads = dot(k, k, "nt", precision), dot(q, k, "nt", precision)
        if pairs is not None:
            among_keys, reads = among_keys * jnp.exp(pairs), reads * jnp.exp(pairs)
        among_keys, reads = only(among_keys, operator.gt), only(reads, operator.ge)
    q_in, k_in, k_out, kept = q, k, k, None
    if sums is not None:
        upto, after, kept = (jnp.exp(x) for x in sums)
        q_in, k_in, k_out = q * upto, k * upto, k * after
    return q_in, reads, beta * among_keys, beta * v, beta * k_in, k_out, kept


def _solve(system: System) -> Prepared:
    """The corrections d_i = beta_i (v_i - what the decayed state recalls for k_i) solve the triangular system.

    Its right-hand side has a part of the values and one of the keys, to be applied to the state.
    """
    q_in, reads, matrix, values, keys, k_out, kept = system
    from_values, from_keys = solve(matrix, (values, keys))
    return q_in, reads, from_values, from_keys, k_out, kept


def _advance(precision: lax.Precision, state: jax.Array, prepared: Prepared) -> tuple[jax.Array, jax.Array]:
    """State [V, K] at the chunk's start → (state after it, out [C, V])."""
    q_in, reads, from_values, from_keys, k_out, kept = prepared
    corrections = from_values - dot(from_keys, state, "nt", precision)
    out = dot(q_in, state, "nt", precision) + dot(reads, corrections, "nn", precision)
    state = state if kept is None else state * kept
    return state + dot(corrections, k_out, "tn", precision), out


def _op(form: Form, q: jax.Array, k: jax.Array, v: jax.Array) -> Op:
    _, precision = compute_dtype(q, k, v)
    stages = (_sum_decays, partial(_multiply, precision), _solve)
    return Op("delta_rule", stages, partial(_advance, precision), form.scale)


def _tokens(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None) -> Any:
    return q, k, v, beta[..., None].astype(jnp.float32), log_decay


def forward(form: Form, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    """As `delta_rule` with canonical arguments, see `form.py`. Returns (out, final_state)."""
    *inputs, initial_state = arrays
    op = _op(form, *inputs[:3])
    size = min(form.chunk_size, LONGEST_CHUNK)
    return tpu_chunks.forward(op, size, _tokens(*inputs), initial_state, inputs[2])


def backward(form: Form, *arrays: Any) -> tuple[Any, ...]:
    """Arguments and the cotangents of (out, final_state) → the cotangents of the arguments."""
    *inputs, initial_state, d_out, d_final = arrays
    op = _op(form, *inputs[:3])
    size = min(form.chunk_size, LONGEST_CHUNK)
    (dq, dk, dv, d_beta, d_log_decay), d_initial = tpu_chunks.backward(
        op, size, _tokens(*inputs), initial_state, d_out, d_final
    )
    return dq, dk, dv, d_beta[..., 0].astype(inputs[3].dtype), d_log_decay, d_initial
