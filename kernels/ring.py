"""Attention whose keys go round: time is split over the devices of a mesh axis, and nobody ever holds all of it.

Every device keeps its queries. The stretches of keys and values travel from device to device; each meets the queries,
and the results are merged by their log-normalisers as in ring attention (Liu et al., 2310.01889). What is kept for the
way back are arguments and results alone: keys go round once more, and their gradients with them. These functions are
for the inside of `jax.shard_map`.

In a causal ring the device with the last stretch works in every round and that with the first in one only: the time is
that of the last. Striping tokens over devices would halve it, and would break up windows and blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

Queries = tuple[jax.Array, Any]
"""q [B, T, H, K], and what else says what they see, without gradients."""
Keys = tuple[jax.Array, jax.Array, Any]
"""k [B, T, G, K], v [B, T, G, V], and what else travels with them, without gradients."""
Results = tuple[jax.Array, jax.Array]
"""out [B, T, H, V] and log_normalizer [B, T, H], -inf where a query sees nothing."""


class Meeting(Protocol):
    """How queries meet keys; frozen and compared by value."""

    def forward(self, distance: Any, queries: Queries, keys: Keys) -> Results:
        """`distance`: how many devices before the queries' the keys were at first, round the ring."""
        ...

    def backward(
        self, distance: Any, queries: Queries, keys: Keys, *of_queries: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What these keys add to d_q, and d_k and d_v; `of_queries`: the results of all, and their cotangents."""
        ...


@dataclass(frozen=True)
class Rounds:
    """Rounds in which the same happens. Keys of `distance` devices before are met in round number `distance`."""

    first: int
    last: int
    earlier: Meeting | None
    """With keys of earlier tokens, None where they are not seen."""
    later: Meeting | None
    """With those of later tokens, which have gone past the end of the ring."""


@dataclass(frozen=True)
class Ring:
    axis: str
    size: int
    """Of the axis."""
    rounds: tuple[Rounds, ...]
    """From round 0 on, in which a device meets its own keys."""


def passed_on(tree: Any, axis: str, size: int, by: int = 1) -> Any:
    """What the device `by` places before holds, round the ring."""
    if by % size == 0:
        return tree
    pairs = [(i, (i + by) % size) for i in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def go_round(ring: Ring, queries: Queries, keys: Keys) -> Results:
    """The queries' attention to the keys of all devices they meet."""
    (q, _), (_, v, _) = queries, keys
    dtype = jnp.promote_types(jnp.result_type(q, *keys[:2]), jnp.float32)
    heads = q.shape[:3]
    merged = jnp.zeros((*heads, v.shape[3]), dtype), jnp.full(heads, -jnp.inf, dtype)

    def meet(meeting: Meeting, distance: Any, keys: Keys, merged: Results) -> Results:
        return _merged(merged, meeting.forward(distance, queries, keys))

    def step(rounds: Rounds, distance: Any, carry: tuple[Results, Keys]) -> tuple[Results, Keys]:
        merged, keys = carry
        after = passed_on(keys, ring.axis, ring.size)
        return _by_place(ring, rounds, distance, meet, keys, merged), after

    (out, log_normalizer), _ = _all_rounds(ring, step, (merged, keys))
    return out.astype(v.dtype), log_normalizer


def _forward(ring: Ring, queries: Queries, keys: Keys) -> tuple[Results, Any]:
    results = go_round(ring, queries, keys)
    return results, (queries, keys, results)


def _backward(ring: Ring, kept: Any, cotangents: Results) -> tuple[Any, Any]:
    queries, keys, results = kept
    dtype = results[1].dtype
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), (queries[0], *keys[:2]))

    def meet(meeting: Meeting, distance: Any, keys: Keys, sums: Any) -> Any:
        added = meeting.backward(distance, queries, keys, *results, *cotangents)
        return jax.tree.map(lambda total, x: total + x.astype(dtype), sums, added)

    def step(rounds: Rounds, distance: Any, carry: tuple[Any, Keys]) -> tuple[Any, Keys]:
        sums, keys = carry
        after = passed_on(keys, ring.axis, ring.size)
        d_q, *d_keys = _by_place(ring, rounds, distance, meet, keys, sums)
        return (d_q, *passed_on(d_keys, ring.axis, ring.size)), after

    (d_q, d_k, d_v), _ = _all_rounds(ring, step, (sums, keys))
    gone = ring.rounds[-1].last + 1
    d_k, d_v = passed_on((d_k, d_v), ring.axis, ring.size, -gone)
    d_q, d_k, d_v = (d.astype(x.dtype) for d, x in zip((d_q, d_k, d_v), (queries[0], *keys[:2]), strict=True))
    return (d_q, None), (d_k, d_v, None)


go_round.defvjp(_forward, _backward)


def _all_rounds(ring: Ring, step: Callable[[Rounds, Any, Any], Any], carry: Any) -> Any:
    for rounds in ring.rounds:
        if rounds.first == rounds.last:
            carry = step(rounds, rounds.first, carry)
        else:
            carry = loop(rounds.first, rounds.last, partial(step, rounds), carry)
    return carry


def loop(first: int, last: int | jax.Array, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`lax.fori_loop` that is never a scan, whose constants JAX would stack for all rounds where it looks for them."""

    def body(counted: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return counted[0] + 1, step(*counted)

    return lax.while_loop(lambda counted: counted[0] <= last, body, (jnp.int32(first), carry))[1]


def _by_place(ring: Ring, rounds: Rounds, distance: Any, meet: Callable[..., Any], keys: Keys, sums: Any) -> Any:
    """`sums` after this round: `meet` of the meeting that this device has in it."""

    def how(meeting: Meeting | None) -> Callable[..., Any]:
        if meeting is None:
            return lambda keys, sums: sums
        return partial(meet, meeting, distance)

    if rounds.earlier == rounds.later or ring.size == 1:
        return how(rounds.earlier)(keys, sums)
    return lax.cond(lax.axis_index(ring.axis) >= distance, how(rounds.earlier), how(rounds.later), keys, sums)


def _merged(one: Results, other: Results) -> Results:
    (out, log), (other_out, other_log) = one, other
    both = jnp.logaddexp(log, other_log)
    finite = jnp.where(both == -jnp.inf, 0, both)
    share, other_share = (jnp.exp(x - finite)[..., None] for x in (log, other_log))
    return share * out + other_share * other_out.astype(out.dtype), both


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def reordered(axis: str, tree: Any, order: jax.Array, inverse: jax.Array, in_place: jax.Array) -> Any:
    """Arrays [B, T / P, …] of this device, T in all → this device's part of them with all tokens in another order.

    order    [B, T / P] integers: where among all T each of this device's tokens is afterwards taken from
    inverse  where each is to be taken from to undo it
    in_place  [] bool, the same on all devices of the mesh: all tokens keep their places, and none has to travel
    """
    size, index, length = lax.axis_size(axis), lax.axis_index(axis), order.shape[1]

    def step(distance: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        taken, visiting = carry
        place = order - (index - distance) % size * length
        here = (place >= 0) & (place < length)

        def put(x: jax.Array, taken: jax.Array) -> jax.Array:
            to_rows = tuple(range(2, x.ndim))
            own = jnp.take_along_axis(x, jnp.expand_dims(jnp.where(here, place, 0), to_rows), axis=1)
            return jnp.where(jnp.expand_dims(here, to_rows), own, taken)

        return jax.tree.map(put, visiting, taken), passed_on(visiting, axis, size)

    return loop(0, jnp.where(in_place, -1, size - 1), step, (tree, tree))[0]


def _reordered_forward(
    axis: str, tree: Any, order: jax.Array, inverse: jax.Array, in_place: jax.Array
) -> tuple[Any, Any]:
    return reordered(axis, tree, order, inverse, in_place), (order, inverse, in_place)


def _reordered_backward(axis: str, kept: Any, cotangent: Any) -> Any:
    order, inverse, in_place = kept
    leaves, structure = jax.tree.flatten(cotangent)
    floating = [x for x in leaves if x.dtype != jax.dtypes.float0]
    moved = iter(reordered(axis, floating, inverse, order, in_place))
    leaves = [x if x.dtype == jax.dtypes.float0 else next(moved) for x in leaves]
    return jax.tree.unflatten(structure, leaves), None, None, None


reordered.defvjp(_reordered_forward, _reordered_backward)
