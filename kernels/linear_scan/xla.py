"""The linear scan in plain XLA: a loop over time that touches every element of the arrays once.

Where the state is small for the machine (a GPU's), time is cut into chunks that the loop runs through side by side.
A first loop then gives what every chunk adds to the state and by how much it decays, a short one the states between the
chunks. Arrays are [B, T, F], and inside [B N, C, F]: N chunks of C tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.linear_scan.chunks import by_chunk, chunk_count, join, last, of_chunks, split

Update = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _split_decay(log_decay: jax.Array, shape: tuple[int, ...], chunks: int) -> jax.Array:
    """Log decay [1, 1, F] stays as it is unless arrays of `shape` are filled up: filling must not decay the state."""
    if log_decay.shape != shape and shape[1] % chunks == 0:
        return log_decay
    return split(jnp.broadcast_to(log_decay, shape), chunks)


def _token(x: jax.Array, n: Any) -> jax.Array:
    """Token n of all chunks, [B N, F]; an array that is constant in time has but one."""
    return lax.dynamic_index_in_dim(x, n if x.shape[1] > 1 else 0, 1, keepdims=False)


def _write(x: jax.Array, token: jax.Array, n: Any) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, token.astype(x.dtype), n, 1)


def _loop(size: int, reverse: bool, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    return lax.fori_loop(0, size, lambda i, c: body(size - 1 - i if reverse else i, c), carry)


def _chunk_starts(
    update: Update, reverse: bool, x: jax.Array, log_decay: jax.Array, initial_state: jax.Array
) -> jax.Array:
    """x [B N, C, F] and initial_state [B, F] → the states [B N, F] that enter the chunks."""
    batch, features = initial_state.shape
    if x.shape[0] == batch:
        return initial_state

    def gather(n: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        state, total = carry
        g = _token(log_decay, n)
        return update(state, g, _token(x, n)), total + g

    def hand_on(state: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        added, total = chunk
        return jnp.exp(total) * state + added, state

    shape = (x.shape[0], features)
    nothing = (jnp.zeros(shape, initial_state.dtype), jnp.zeros(shape, log_decay.dtype))
    sums = _loop(x.shape[1], reverse, gather, nothing)
    sums = jax.tree.map(partial(by_chunk, batch=batch), sums)
    return of_chunks(lax.scan(hand_on, initial_state, sums, reverse=reverse)[1])


def _state_update(state: jax.Array, g: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.exp(g) * state + x


def _cotangent_update(later: jax.Array, g: jax.Array, d_y: jax.Array) -> jax.Array:
    """The cotangent of h_t is that of y_t plus what comes back through h_{t+1}; decayed it goes back to h_{t-1}."""
    return jnp.exp(g) * (later + d_y)


def forward(reverse: bool, x: jax.Array, log_decay: jax.Array, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [B, T, F], log_decay [1, 1, F] or [B, T, F], initial_state [B, F] → (y [B, T, F], final_state [B, F])."""
    batch, time, _ = x.shape
    chunks = chunk_count(time, initial_state.shape)
    x, log_decay = split(x, chunks), _split_decay(log_decay, x.shape, chunks)

    def step(n: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        state, y = carry
        state = _state_update(state, _token(log_decay, n), _token(x, n))
        return state, _write(y, state, n)

    state = _chunk_starts(_state_update, reverse, x, log_decay, initial_state)
    state, y = _loop(x.shape[1], reverse, step, (state, jnp.zeros_like(x)))
    return join(y, batch, time), last(state, batch, reverse)


def backward(
    reverse: bool, x: jax.Array, log_decay: jax.Array, initial_state: jax.Array, d_y: jax.Array, d_final: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of (y, final_state) → those of x, of log_decay ([B, T, F], not yet summed) and of initial_state."""
    batch, time, _ = x.shape
    chunks = chunk_count(time, initial_state.shape)
    x, log_decay, d_y = split(x, chunks), _split_decay(log_decay, x.shape, chunks), split(d_y, chunks)

    def keep(n: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        state, before = carry
        return _state_update(state, _token(log_decay, n), _token(x, n)), _write(before, state, n)

    state = _chunk_starts(_state_update, reverse, x, log_decay, initial_state)
    before = _loop(x.shape[1], reverse, keep, (state, jnp.zeros(x.shape, initial_state.dtype)))[1]

    def step(n: Any, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        later, d_x, d_log_decay = carry
        d_state = later + _token(d_y, n)
        later = jnp.exp(_token(log_decay, n)) * d_state
        return later, _write(d_x, d_state, n), _write(d_log_decay, later * _token(before, n), n)

    later = _chunk_starts(_cotangent_update, not reverse, d_y, log_decay, d_final)
    outputs = (jnp.zeros_like(x), jnp.zeros_like(before))
    later, d_x, d_log_decay = _loop(x.shape[1], not reverse, step, (later, *outputs))
    return join(d_x, batch, time), join(d_log_decay, batch, time), last(later, batch, not reverse)
