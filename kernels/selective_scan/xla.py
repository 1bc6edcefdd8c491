"""The selective scan in plain XLA: a loop over time whose state, [B, N, D], is all that exists of the states.

The backward pass keeps the state at the start of every block of tokens, computes the states of one block at a time
again, and runs through it backwards. Where the state is small for the machine, the loop runs through several chunks of
time side by side, as that of the linear scan does. A is given as [N, D], states as [B, N, D]: features side by side.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.linear_scan.chunks import by_chunk, chunk_count, join, last, of_chunks, split

Token = tuple[jax.Array, ...]
Update = Callable[[Any, jax.Array], jax.Array]

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


def _chunk_starts(
    gather: Update, reverse: bool, A: jax.Array, delta: jax.Array, reset: Token, state: jax.Array
) -> jax.Array:
    """The states that enter the chunks delta and reset are cut into, given the first one's [B, N, D].

    `gather` takes a state over token n.
    """
    batch, dtype = state.shape[0], state.dtype
    if delta.shape[0] == batch:
        return state

    def step(i: Any, carry: tuple[jax.Array, Token]) -> tuple[jax.Array, Token]:
        state, total = carry
        n = delta.shape[1] - 1 - i if reverse else i
        return gather(n, state), tuple(t + x for t, x in zip(total, _token((delta, *reset), n, dtype), strict=True))

    def hand_on(state: jax.Array, chunk: tuple[jax.Array, Token]) -> tuple[jax.Array, jax.Array]:
        added, (delta, *reset) = chunk
        return _decay(delta, A, tuple(reset)) * state + added, state

    nothing = jnp.zeros((delta.shape[0], *state.shape[1:]), dtype)
    total = tuple(jnp.zeros(x.shape[:1] + x.shape[2:], dtype) for x in (delta, *reset))
    sums = lax.fori_loop(0, delta.shape[1], step, (nothing, total))
    sums = jax.tree.map(partial(by_chunk, batch=batch), sums)
    return of_chunks(lax.scan(hand_on, state, sums, reverse=reverse)[1])


def forward(u, delta, A, B, C, D, initial_state, reset):
    """Arrays as in the public operation but A [N, D], initial_state [B, N, D], reset None or log decay [B, T] to add.

    Returns (y [B, T, D] in u's dtype, final_state [B, N, D]).
    """
    dtype = initial_state.dtype
    batch, time, _ = u.shape
    chunks = chunk_count(time, initial_state.shape)
    A, D = A.astype(dtype), D.astype(dtype)
    u, delta, B, C, *resets = (split(x, chunks) for x in (u, delta, B, C, reset) if x is not None)
    arrays = (u, delta, B, *resets)
    start = _chunk_starts(
        lambda n, state: _update(state, A, *_token(arrays, n, dtype)), False, A, delta, tuple(resets), initial_state
    )

    def step(n: Any, carry: tuple[jax.Array, Token]) -> tuple[jax.Array, Token]:
        state, y = carry
        token = _token(arrays, n, dtype)
        state = _update(state, A, *token)
        read = _sum("bn,bnd->bd", _token((C,), n, dtype)[0], state)
        return state, _write(y, (read + D * token[0],), n)

    state, (y,) = lax.fori_loop(0, u.shape[1], step, (start, (jnp.zeros_like(u),)))
    return join(y, batch, time), last(state, batch, reverse=False)


def backward(u, delta, A, B, C, D, initial_state, reset, d_y, d_final):
    """Cotangents of (y, final_state) → those of (u, delta, A, B, C, D, initial_state)."""
    dtype = initial_state.dtype
    batch, time, _ = u.shape
    chunks = chunk_count(time, initial_state.shape)
    A, D = A.astype(dtype), D.astype(dtype)
    u, delta, B, C, d_y, *resets = (split(x, chunks) for x in (u, delta, B, C, d_y, reset) if x is not None)
    arrays = (u, delta, B, *resets)
    size = u.shape[1]
    length = max(int(size**0.5), 1)
    blocks = -(-size // length)

    def bounds(block: Any) -> tuple[Any, Any]:
        return block * length, jnp.minimum((block + 1) * length, size)

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

    def back(n: Any, later: jax.Array) -> jax.Array:
        dt, c, d_out, *reset_now = _token((delta, C, d_y, *resets), n, dtype)
        return _decay(dt, A, tuple(reset_now)) * (later + c[..., None] * d_out[:, None])

    start = _chunk_starts(
        lambda n, state: _update(state, A, *_token(arrays, n, dtype)), False, A, delta, tuple(resets), initial_state
    )
    _, block_starts = lax.scan(advance, start, jnp.arange(blocks))
    later = _chunk_starts(back, True, A, delta, tuple(resets), d_final)
    carry = (later, jnp.zeros_like(start), tuple(jnp.zeros_like(x) for x in (u, delta, B, C)))
    d_state, d_A, gradients = lax.fori_loop(0, blocks, lambda i, carry: pull(blocks - 1 - i, carry), carry)
    d_u, d_delta, d_B, d_C = (join(x, batch, time) for x in gradients)
    d_D = jnp.sum(d_y.astype(dtype) * u.astype(dtype), (0, 1))
    return d_u, d_delta, jnp.sum(d_A, 0), d_B, d_C, d_D, last(d_state, batch, reverse=True)
