"""The recurrences with time split over devices: each device runs its stretch, only states travel.

What a stretch does to a state is an affine map, and such maps compose. Every device finds the map of its own stretch,
an exclusive scan over the mesh axis (log2 of its size rounds of exchange) gives the state that enters each stretch, and
the operation runs from there. Queries, keys and values never leave their device; gradients go the same way back.

`spec` says how [batch, time, heads or features, …] lie on the mesh, such as P("data", "sequence", "tensor"). Its second
entry names the one axis that time is split over, or is None where time is whole; the other axes then still keep a
kernel, which the compiler cannot split itself, on every device's own part. Arguments and results are global arrays.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels.delta_rule import delta_rule as whole_delta_rule
from kernels.heads import canonical, repeat_heads
from kernels.linear_attention import linear_attention as whole_linear_attention
from kernels.linear_scan import linear_scan as whole_linear_scan
from kernels.packing import RESET, starts, with_resets
from kernels.selective_scan import selective_scan as whole_selective_scan

Parts = dict[str, Any]
Map = tuple[jax.Array, jax.Array]
"""(kept, added): state → kept · state + added."""


def linear_scan(
    x: jax.Array,
    log_decay: jax.Array,
    *,
    mesh: Mesh,
    spec: P,
    initial_state: jax.Array | None = None,
    reverse: bool = False,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels.linear_scan.linear_scan` of [B, T, *F] with T split over `spec[1]` of the mesh.

    Arguments, results and errors are the operation's.

    Raises:
      ValueError: `spec` does not fit the mesh, or an axis of an array cannot be split so.
    """
    op = "sequence.linear_scan"
    axis = _time_axis(op, mesh, spec)
    if initial_state is None:
        dtype = jnp.promote_types(jnp.result_type(x, log_decay), jnp.float32)
        initial_state = jnp.zeros((x.shape[0], *x.shape[2:]), dtype)
    options: dict[str, Any] = {"reverse": reverse, "implementation": implementation}

    def local(parts: Parts, initial: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, log_decay, ids = parts["x"], parts["log_decay"], parts.get("segment_ids")
        fresh = _fresh(ids, axis, reverse)
        run = partial(whole_linear_scan, x, log_decay, segment_ids=ids, **options)
        added = run()[1]
        total = jnp.sum(log_decay.astype(added.dtype), axis=1)
        if fresh is not None:
            total += RESET * jnp.any(fresh, axis=1).reshape(-1, *(1,) * (total.ndim - 1))
        kept, added = _before((jnp.exp(total), added), _scale, axis, reverse)
        return _leave(run(initial_state=_unless_fresh(fresh, kept * initial + added, reverse)), axis, reverse)

    arrays = {"x": x, "log_decay": jnp.broadcast_to(log_decay, x.shape), "segment_ids": segment_ids}
    return _run(op, local, mesh, spec, arrays, initial_state, x.ndim)


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh,
    spec: P,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels.linear_attention.linear_attention` of [B, T, H, *] with T split over `spec[1]` of the mesh.

    Arguments, results and errors are the operation's.

    Raises:
      ValueError: `spec` does not fit the mesh, or an axis of an array cannot be split so.
    """
    op = "sequence.linear_attention"
    axis = _time_axis(op, mesh, spec)
    arrays: dict[str, Any] = {"q": q, "k": k, "v": v}
    given = canonical(op, arrays, log_decay, initial_state, scale)
    options: dict[str, Any] = {"scale": given.scale, "causal": causal}
    options |= {"chunk_size": chunk_size, "implementation": implementation}

    def local(parts: Parts, initial: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, k, v, log_decay, ids = parts["q"], parts["k"], parts["v"], parts.get("log_decay"), parts.get("segment_ids")
        fresh = _fresh(ids, axis)
        kept, added = _before(_additive_map(k, v, with_resets(log_decay, fresh), initial), _scale, axis)
        run = partial(whole_linear_attention, q, k, v, log_decay=_public(log_decay), segment_ids=ids, **options)
        out, final = run(initial_state=_unless_fresh(fresh, kept * initial + added))
        if not causal:
            decay = with_resets(log_decay, _fresh(ids, axis, reverse=True))
            back = None if decay is None else jnp.flip(decay, 1)
            own = _additive_map(jnp.flip(k, 1), jnp.flip(v, 1), back, initial)
            _, later = _before(own, _scale, axis, reverse=True)
            out += (given.scale * _read_backwards(q, decay, later)).astype(out.dtype)
        return _leave((out, final), axis)

    arrays |= {"log_decay": given.log_decay, "segment_ids": segment_ids}
    return _run(op, local, mesh, spec, arrays, given.state, 4)


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    *,
    mesh: Mesh,
    spec: P,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels.delta_rule.delta_rule` of [B, T, H, *] with T split over `spec[1]` of the mesh.

    Arguments, results and errors are the operation's. A stretch's map holds a K × K matrix a head, found by running the
    operation on the identity: this costs about three times the operation.

    Raises:
      ValueError: `spec` does not fit the mesh, or an axis of an array cannot be split so.
    """
    op = "sequence.delta_rule"
    axis = _time_axis(op, mesh, spec)
    arrays: dict[str, Any] = {"q": q, "k": k, "v": v, "beta": beta}
    given = canonical(op, arrays, log_decay, initial_state, scale)
    options: dict[str, Any] = {"scale": given.scale, "chunk_size": chunk_size, "implementation": implementation}

    def local(parts: Parts, initial: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, k, v, beta = (parts[name] for name in ("q", "k", "v", "beta"))
        ids = parts.get("segment_ids")
        fresh = _fresh(ids, axis)
        everything = options | {"log_decay": _public(parts.get("log_decay")), "segment_ids": ids}

        def run(values: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
            return whole_delta_rule(q, k, values, beta, initial_state=state, **everything)

        batch, heads, width, _ = initial.shape
        identity = jnp.broadcast_to(jnp.eye(width, dtype=initial.dtype), (batch, heads, width, width))
        _, kept = run(jnp.zeros((*k.shape[:2], heads, width), v.dtype), _unless_fresh(fresh, identity))
        _, added = run(v, jnp.zeros_like(initial))
        kept, added = _before((kept, added), _matrix_product, axis)
        return _leave(run(v, _unless_fresh(fresh, _matrix_product(kept, initial) + added)), axis)

    arrays |= {"log_decay": given.log_decay, "segment_ids": segment_ids}
    return _run(op, local, mesh, spec, arrays, given.state, 4)


def split_selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    axis: str,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """y of `kernels.selective_scan.selective_scan` for this device's tokens, inside `jax.shard_map`.

    Arguments and errors are the operation's, with time split over the mesh axis `axis`. It costs the operation twice.
    """
    run = partial(whole_selective_scan, segment_ids=segment_ids, implementation=implementation)
    fresh = _fresh(segment_ids, axis)
    added = run(u, delta, A, B, C)[1]
    total = jnp.sum(delta.astype(added.dtype), axis=1)[..., None] * A.astype(added.dtype)
    if fresh is not None:
        total += RESET * jnp.any(fresh, axis=1)[:, None, None]
    _, before = _before((jnp.exp(total), added), _scale, axis)
    return run(u, delta, A, B, C, D, initial_state=_unless_fresh(fresh, before))[0]


def _run(
    op: str,
    local: Callable[[Parts, jax.Array], tuple[jax.Array, jax.Array]],
    mesh: Mesh,
    spec: P,
    arrays: dict[str, Any],
    initial_state: jax.Array,
    out_axes: int,
) -> tuple[jax.Array, jax.Array]:
    """`local` on each device's part of the arrays [B, T, …] that are there and of the state [B, …]."""

    def axes(count: int) -> P:
        return P(*(*spec, *(None,) * count)[:count])

    there = {name: x for name, x in arrays.items() if x is not None}
    specs = {name: axes(x.ndim) for name, x in there.items()}
    state_spec = P(*(part for n, part in enumerate(axes(initial_state.ndim + 1)) if n != 1))
    for name, array, parts in [(n, x, specs[n]) for n, x in there.items()] + [
        ("initial_state", initial_state, state_spec)
    ]:
        for size, part in zip(array.shape, parts, strict=True):
            names = () if part is None else (part,) if isinstance(part, str) else part
            split = math.prod(mesh.shape[axis] for axis in names)
            if size % split:
                raise ValueError(
                    f"{op}: {name}: got shape {array.shape}, cannot split {size} over {part!r} of size {split}"
                )
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, state_spec), out_specs=(axes(out_axes), state_spec), check_vma=False
    )
    return run(there, initial_state)


def _time_axis(op: str, mesh: Mesh, spec: P) -> str | None:
    axis = spec[1] if len(spec) > 1 else None
    known = {None, *mesh.axis_names}
    for part in spec:
        for name in part if isinstance(part, tuple) else (part,):
            if name not in known:
                raise ValueError(f"{op}: spec: got axis {name!r}, wanted axes of the mesh, {mesh.axis_names}")
    if axis not in known:
        raise ValueError(f"{op}: spec: got {axis!r} for time, wanted None or one mesh axis of {mesh.axis_names}")
    return axis


def _public(log_decay: jax.Array | None) -> jax.Array | None:
    """[B, T, Hg, 1 or K] as the operations take it."""
    return log_decay if log_decay is None or log_decay.shape[-1] > 1 else log_decay[..., 0]


def _neighbour(tree: Any, axis: str, distance: int) -> Any:
    """What the device `distance` places before (after, where negative) holds; zeros where there is none."""
    size = lax.axis_size(axis)
    pairs = [(i, i + distance) for i in range(size) if 0 <= i + distance < size]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), tree)


def _place(axis: str, reverse: bool) -> jax.Array:
    """How many devices come before this one in the direction of the recurrence."""
    index = lax.axis_index(axis)
    return lax.axis_size(axis) - 1 - index if reverse else index


def _fresh(segment_ids: jax.Array | None, axis: str | None, reverse: bool = False) -> jax.Array | None:
    """[B, T] of this device: where a segment starts, seen in the direction of the recurrence."""
    if segment_ids is None:
        return None
    ids = jnp.flip(segment_ids, 1) if reverse else segment_ids
    before = None
    if axis is not None:
        before = jnp.where(_place(axis, reverse) == 0, ids[:, :1], _neighbour(ids[:, -1:], axis, -1 if reverse else 1))
    fresh = starts(ids, before)
    return jnp.flip(fresh, 1) if reverse else fresh


def _unless_fresh(fresh: jax.Array | None, state: jax.Array, reverse: bool = False) -> jax.Array:
    """The entering state, or zeros where this device's stretch begins with a new segment."""
    if fresh is None:
        return state
    first = fresh[:, -1 if reverse else 0]
    return jnp.where(first.reshape(-1, *(1,) * (state.ndim - 1)), 0, state)


def _scale(kept: jax.Array, state: jax.Array) -> jax.Array:
    return kept * state


def _matrix_product(kept: jax.Array, state: jax.Array) -> jax.Array:
    return jnp.matmul(kept, state, precision=lax.Precision.HIGHEST)


def _before(
    own: Map, apply: Callable[[jax.Array, jax.Array], jax.Array], axis: str | None, reverse: bool = False
) -> Map:
    """The map of all stretches before this device's, where `apply` is kept · state."""
    kept, added = own
    if apply is _matrix_product:
        one = jnp.broadcast_to(jnp.eye(kept.shape[-1], dtype=kept.dtype), kept.shape)
    else:
        one = jnp.ones_like(kept)
    none = (one, jnp.zeros_like(added))
    if axis is None:
        return none
    place, sign = _place(axis, reverse), -1 if reverse else 1

    def where(far_enough: jax.Array, yes: Map, no: Map) -> Map:
        return jax.tree.map(partial(jnp.where, far_enough), yes, no)

    maps = where(place > 0, _neighbour(own, axis, sign), none)
    distance = 1
    while distance < lax.axis_size(axis):
        (kept, added), (kept_before, added_before) = maps, _neighbour(maps, axis, sign * distance)
        maps = where(place >= distance, (apply(kept, kept_before), apply(kept, added_before) + added), maps)
        distance *= 2
    return maps


def _leave(result: tuple[jax.Array, jax.Array], axis: str | None, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
    """Gives every device the final state of the last stretch."""
    out, final = result
    if axis is None:
        return out, final
    last = _place(axis, reverse) == lax.axis_size(axis) - 1
    return out, lax.psum(jnp.where(last, final, 0), axis)


def _sums_after(g: jax.Array) -> jax.Array:
    """[B, T, …] → at j the sum of all after j."""
    shifted = jnp.pad(g[:, 1:], ((0, 0), (0, 1), *((0, 0),) * (g.ndim - 2)))
    return jnp.flip(jnp.cumsum(jnp.flip(shifted, 1), axis=1), 1)


def _additive_map(k: jax.Array, v: jax.Array, log_decay: jax.Array | None, state: jax.Array) -> Map:
    """The map of a stretch of linear attention, [B, H, 1 or K, 1] and [B, H, K, V]."""
    heads, dtype = state.shape[1], state.dtype
    k, v = (repeat_heads(x, heads).astype(dtype) for x in (k, v))
    kept = jnp.ones((state.shape[0], heads, 1, 1), dtype)
    if log_decay is not None:
        log_decay = repeat_heads(log_decay, heads).astype(dtype)
        k = k * jnp.exp(_sums_after(log_decay))
        kept = jnp.exp(jnp.sum(log_decay, axis=1))[..., None]
    return kept, jnp.einsum("bthk,bthv->bhkv", k, v, precision=lax.Precision.HIGHEST)


def _read_backwards(q: jax.Array, log_decay: jax.Array | None, state: jax.Array) -> jax.Array:
    """What the tokens of a stretch read of the state that enters at its end, [B, T, H, V]."""
    q = repeat_heads(q, state.shape[1]).astype(state.dtype)
    if log_decay is not None:
        log_decay = repeat_heads(log_decay, state.shape[1]).astype(state.dtype)
        q = q * jnp.exp(_sums_after(log_decay) + log_decay)
    return jnp.einsum("bthk,bhkv->bthv", q, state, precision=lax.Precision.HIGHEST)
