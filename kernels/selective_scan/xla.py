"""The selective scan in plain XLA: a loop over time whose state, [B, N, D], is all that exists of the states.

The backward pass keeps the state at the start of every block of tokens, computes the states of one block at a time
again, and runs through it backwards. A is given as [N, D], the states as [B, N, D]: features side by side.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Token = tuple[jax.Array, ...]

_sum = partial(jnp.einsum, precision="highest")


def _token(arrays: Token, n: Any, dtype: jnp.dtype) -> Token:
    """Token n of u, delta, B, C and others, in the state's dtype."""
    return tuple(lax.dynamic_index_in_dim(x, n, 1, keepdims=False).astype(dtype) for x in arrays)


def _write(arrays: Token, token: Token, n: Any) -> Token:
    return tuple(
        lax.dynamic_update_index_in_dim(x, part.astype(x.dtype), n, 1) for x, part in zip(arrays, token, strict=True)
    )


def _decay(delta: jax.Array, A: jax.Array, reset: Token) -> jax.Array:
    """delta [B, D], reset () or ([B],) → [B, N, D]."""
    log_decay = delta[:, None] * A
    return jnp.exp(log_decay + reset[0][:, None, None] if reset else log_decay)


def _update(
    state: jax.Array, A: jax.Array, u: jax.Array, delta: jax.Array, B: jax.Array, *reset: jax.Array
) -> jax.Array:
    return _decay(delta, A, reset) * state + B[..., None] * (delta * u)[:, None]


def forward(u, delta, A, B, C, D, initial_state, reset):
    """Arrays as in the public operation but A [N, D], initial_state [B, N, D], reset None or log decay [B, T] to add.

    Returns (y [B, T, D] in u's dtype, final_state [B, N, D]).
    """
    dtype = initial_state.dtype
    A, D = A.astype(dtype), D.astype(dtype)
    arrays = (u, delta, B) if reset is None else (u, delta, B, reset)

    def step(n: Any, carry: tuple[jax.Array, Token]) -> tuple[jax.Array, Token]:
        state, y = carry
        token = _token(arrays, n, dtype)
        state = _update(state, A, *token)
        read = _sum("bn,bnd->bd", _token((C,), n, dtype)[0], state)
        return state, _write(y, (read + D * token[0],), n)

    final_state, (y,) = lax.fori_loop(0, u.shape[1], step, (initial_state, (jnp.zeros_like(u),)))
    return y, final_state


def backward(u, delta, A, B, C, D, initial_state, reset, d_y, d_final):
    """Cotangents of (y, final_state) → those of (u, delta, A, B, C, D, initial_state)."""
    dtype = initial_state.dtype
    time = u.shape[1]
    length = max(int(time**0.5), 1)
    blocks = -(-time // length)
    A, D = A.astype(dtype), D.astype(dtype)
    arrays = (u, delta, B) if reset is None else (u, delta, B, reset)

    def bounds(block: Any) -> tuple[Any, Any]:
        return block * length, jnp.minimum((block + 1) * length, time)

    def advance(state: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        after = lax.fori_loop(*bounds(block), lambda n, h: _update(h, A, *_token(arrays, n, dtype)), state)
        return after, state

    def again(block: Any, state: jax.Array) -> jax.Array:
        """The states [C, B, N, D] before each token of a block."""
        start, stop = bounds(block)

        def step(n: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            state, before = carry
            before = lax.dynamic_update_index_in_dim(before, state, n - start, 0)
            return _update(state, A, *_token(arrays, n, dtype)), before

        return lax.fori_loop(start, stop, step, (state, jnp.zeros((length, *state.shape), dtype)))[1]

    def pull(block: Any, carry: Any) -> Any:
        start, stop = bounds(block)
        before = again(block, block_starts[block])

        def step(i: Any, carry: tuple[jax.Array, jax.Array, Token]) -> tuple[jax.Array, jax.Array, Token]:
            later, d_A, gradients = carry
            n = stop - 1 - i
            x, dt, b, *reset_now = _token(arrays, n, dtype)
            c, d_out = _token((C, d_y), n, dtype)
            decay = _decay(dt, A, tuple(reset_now))
            kept = decay * lax.dynamic_index_in_dim(before, n - start, 0, keepdims=False)
            state = kept + b[..., None] * (dt * x)[:, None]
            d_state = later + c[..., None] * d_out[:, None]
            d_log_decay = d_state * kept
            d_input = _sum("bn,bnd->bd", b, d_state)
            token = (
                d_input * dt + D * d_out,
                d_input * x + jnp.sum(d_log_decay * A, 1),
                _sum("bnd,bd->bn", d_state, dt * x),
                _sum("bnd,bd->bn", state, d_out),
            )
            return decay * d_state, d_A + d_log_decay * dt[:, None], _write(gradients, token, n)

        return lax.fori_loop(0, stop - start, step, carry)

    _, block_starts = lax.scan(advance, initial_state, jnp.arange(blocks))
    gradients = tuple(jnp.zeros_like(x) for x in (u, delta, B, C))
    carry = (d_final, jnp.zeros_like(initial_state), gradients)
    d_initial, d_A, (d_u, d_delta, d_B, d_C) = lax.fori_loop(
        0, blocks, lambda i, carry: pull(blocks - 1 - i, carry), carry
    )
    d_D = jnp.sum(d_y.astype(dtype) * u.astype(dtype), (0, 1))
    return d_u, d_delta, jnp.sum(d_A, 0), d_B, d_C, d_D, d_initial
