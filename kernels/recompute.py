"""A recurrence over time, block by block: the backward pass keeps block-start states and computes the rest again.

`block(state, inputs) -> (state, outputs)` is any differentiable function of a state and a stretch of time; `inputs` and
`outputs` are pytrees of arrays [B, T, ...]. The temporary memory of both directions is that of one block, plus one
state a block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Block = Callable[[Any, Any], tuple[Any, Any]]


def _slice(tree: Any, start: Any, length: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, length, axis=1), tree)


def _write(tree: Any, part: Any, start: Any) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), start, axis=1), tree, part)


def _time(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[1]


def forward(block: Block, length: int, state: Any, inputs: Any) -> tuple[Any, Any]:
    """Runs `block` over stretches of `length` and one shorter rest. Returns (outputs, final state)."""
    time = _time(inputs)
    if time <= length:
        state, outputs = block(state, inputs)
        return outputs, state
    full = time // length
    shapes = jax.eval_shape(lambda s, x: block(s, x)[1], state, _slice(inputs, 0, length))
    outputs = jax.tree.map(lambda s: jnp.zeros((s.shape[0], time, *s.shape[2:]), s.dtype), shapes)

    def step(n: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        state, outputs = carry
        state, part = block(state, _slice(inputs, n * length, length))
        return state, _write(outputs, part, n * length)

    state, outputs = lax.fori_loop(0, full, step, (state, outputs))
    rest = time - full * length
    if rest:
        state, part = block(state, _slice(inputs, full * length, rest))
        outputs = _write(outputs, part, full * length)
    return outputs, state


def backward(block: Block, length: int, state: Any, inputs: Any, d_outputs: Any, d_state: Any) -> tuple[Any, Any]:
    """Cotangents of outputs and final state → (cotangent of the initial state, cotangents of the inputs)."""
    time = _time(inputs)
    full = time // length
    rest = time - full * length

    def pull(state: Any, start: Any, size: int, d_state: Any) -> tuple[Any, Any]:
        _, vjp = jax.vjp(block, state, _slice(inputs, start, size))
        return vjp((d_state, _slice(d_outputs, start, size)))

    if time <= length:
        return pull(state, 0, time, d_state)

    def advance(state: Any, n: Any) -> tuple[Any, Any]:
        return block(state, _slice(inputs, n * length, length))[0], state

    last, block_starts = lax.scan(advance, state, jnp.arange(full))
    d_inputs = jax.tree.map(jnp.zeros_like, inputs)
    if rest:
        d_state, part = pull(last, full * length, rest, d_state)
        d_inputs = _write(d_inputs, part, full * length)

    def step(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        d_state, d_inputs = carry
        n = full - 1 - i
        d_state, part = pull(jax.tree.map(lambda s: s[n], block_starts), n * length, length, d_state)
        return d_state, _write(d_inputs, part, n * length)

    return lax.fori_loop(0, full, step, (d_state, d_inputs))
