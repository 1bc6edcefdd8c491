"""A recurrence with time split over devices that take turns, for the inside of `jax.shard_map`.

What a stretch does to a state that it reads through is no map that could be known before the state: each device waits
for the one before it, and the whole takes as long as on one device. Only states travel, and what is kept for the way
back is of a device's own stretch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.ring import loop, passed_on

Run = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(shared, own, state) → (out, state): this device's part of the recurrence, a function of its arguments alone."""
Leaves = list[Any]


def in_turns(axis: str, run: Run, shared: Any, own: Any, state: Any) -> tuple[Any, Any]:
    """Each device's `out`, and on all of them the state after the last device.

    Args:
      axis: the mesh axis that time is split over, its devices in the order of time.
      run: what a device does in its turn, no exchange among it.
      shared: arrays that are the same on all devices of the axis.
      own: arrays of this device.
      state: before the first device's turn, the same on all of them, of the dtypes it has afterwards.
    """
    (shared, own, state), structures = zip(*(jax.tree.flatten(tree) for tree in (shared, own, state)), strict=True)

    def flat(*leaves: Leaves) -> tuple[Leaves, Leaves]:
        out, state = run(*map(jax.tree.unflatten, structures, leaves))
        return jax.tree.leaves(out), jax.tree.leaves(state)

    out, last = _in_turns(axis, flat, shared, own, state)
    first = lax.axis_index(axis) == 0
    last = [lax.psum(jnp.where(first, x, 0), axis) for x in last]
    shapes = jax.eval_shape(lambda *leaves: run(*map(jax.tree.unflatten, structures, leaves))[0], shared, own, state)
    return jax.tree.unflatten(jax.tree.structure(shapes), out), jax.tree.unflatten(structures[2], last)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_turns(axis: str, run: Any, shared: Leaves, own: Leaves, state: Leaves) -> tuple[Leaves, Leaves]:
    """`out`, and on the first device, to which it was passed on, the state after the last."""
    return _forward(axis, run, shared, own, state)[0]


def _forward(axis: str, run: Any, shared: Leaves, own: Leaves, state: Leaves) -> tuple[Any, Any]:
    size, index = lax.axis_size(axis), lax.axis_index(axis)
    shapes, _ = jax.eval_shape(run, shared, own, state)
    out = [jnp.zeros(x.shape, x.dtype) for x in shapes]

    def turn(n: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        out, state, entered = carry
        entered = jax.tree.map(partial(jnp.where, index == n), state, entered)
        out, state = lax.cond(
            index == n, lambda out, state: run(shared, own, state), lambda out, state: (out, state), out, state
        )
        return out, passed_on(state, axis, size), entered

    out, last, entered = loop(0, size - 1, turn, (out, state, state))
    return (out, last), (shared, own, entered)


def _backward(axis: str, run: Any, kept: Any, cotangents: tuple[Leaves, Leaves]) -> tuple[Leaves, Leaves, Leaves]:
    shared, own, entered = kept
    d_out, d_state = cotangents
    size, index = lax.axis_size(axis), lax.axis_index(axis)
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in own]

    def pulled(_: Any, d_state: Leaves) -> tuple[Any, Leaves]:
        def differentiable(shared: Leaves, some: Leaves, state: Leaves) -> Any:
            others = iter(some)
            return run(shared, [next(others) if is_one else x for x, is_one in zip(own, floating, strict=True)], state)

        some = [x for x, is_one in zip(own, floating, strict=True) if is_one]
        d_shared, d_some, d_entered = jax.vjp(differentiable, shared, some, entered)[1]((d_out, d_state))
        return (d_shared, d_some), d_entered

    def turn(n: Any, carry: tuple[Any, Leaves]) -> tuple[Any, Leaves]:
        gradients, d_state = carry
        d_state = passed_on(d_state, axis, size, -1)
        mine = index == size - 1 - n
        return lax.cond(mine, pulled, lambda gradients, d_state: (gradients, d_state), gradients, d_state)

    nothing = [[jnp.zeros_like(x) for x in leaves] for leaves in (shared, own)]
    nothing[1] = [x for x, is_one in zip(nothing[1], floating, strict=True) if is_one]
    (d_shared, d_some), d_state = loop(0, size - 1, turn, (tuple(nothing), d_state))
    others = iter(d_some)
    d_own = [next(others) if is_one else None for is_one in floating]
    return d_shared, d_own, [jnp.where(index == 0, d, 0) for d in d_state]


_in_turns.defvjp(_forward, _backward)
