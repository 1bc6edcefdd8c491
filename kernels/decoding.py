"""Bricks of one-step forms: one query a sequence over caches [B, S, G, F] of what came before.

Sequences of a batch may have different lengths. What must not be written goes to a place past the end, where JAX drops
it. A ring of S places holds time p at place p % S.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.checks import check_shape
from kernels.chunks import compute_dtype


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, visible: jax.Array, scale: float) -> jax.Array:
    """q [B, H, K], k [B, S, G, K], v [B, S, G, V], visible [B, S, G or 1] → [B, H, V] in v's dtype; 0 where none is."""
    dtype, precision = compute_dtype(q, k, v)
    batch, heads, width = q.shape
    q = q.astype(dtype).reshape(batch, k.shape[2], -1, width)
    visible = jnp.swapaxes(visible, 1, 2)[:, :, None]
    s = jnp.where(visible, scale * jnp.einsum("bghk,bsgk->bghs", q, k.astype(dtype), precision=precision), -jnp.inf)
    largest = jnp.max(s, axis=-1, keepdims=True, initial=jnp.finfo(dtype).min)
    p = jnp.exp(s - largest)
    total = jnp.sum(p, axis=-1, keepdims=True)
    p /= jnp.where(total > 0, total, 1)
    out = jnp.einsum("bghs,bsgv->bghv", p, v.astype(dtype), precision=precision)
    return out.reshape(batch, heads, v.shape[-1]).astype(v.dtype)


def written(cache: jax.Array, x: jax.Array, place: jax.Array) -> jax.Array:
    """cache [B, S, ...] with x [B, ...] at place [B], or as it was where that is past the end."""
    return cache.at[jnp.arange(cache.shape[0]), place].set(x.astype(cache.dtype), mode="drop")


def taken(cache: jax.Array, place: jax.Array) -> jax.Array:
    """cache [B, S, ...] at places [B, P] → [B, P, ...]; places past either end are moved to it."""
    return cache[jnp.arange(cache.shape[0])[:, None], jnp.clip(place, 0, cache.shape[1] - 1)]


def ring_times(length: jax.Array, size: int) -> jax.Array:
    """[B] numbers of tokens that have come → [B, size], the time each place of a ring holds; negative: nothing yet."""
    last = length[:, None] - 1
    return last - (last - jnp.arange(size)) % size


def ring(x: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """The last tokens of x [B, T, ...] of which the first `length` [B] have come, as a ring of `size` places."""
    if x.shape[1] == 0:
        return jnp.zeros((x.shape[0], size, *x.shape[2:]), x.dtype)
    times = ring_times(length, size)
    held = jnp.expand_dims(times >= 0, range(2, x.ndim))
    return jnp.where(held, taken(x, times), 0)


def gather_blocks(x: jax.Array, ids: jax.Array, block_size: int) -> jax.Array:
    """x [B, S, G, F] and block ids [B, L, n], L = G or a multiple → the blocks' tokens [B, n · block_size, L, F]."""
    batch, time, groups, width = x.shape
    x = x.reshape(batch, time // block_size, block_size, groups, width)
    lists, most = ids.shape[1:]
    group = jnp.arange(lists) * groups // lists
    places = jnp.arange(batch)[:, None, None], jnp.maximum(ids, 0), slice(None), group[:, None]
    return jnp.swapaxes(x[places].reshape(batch, lists, most * block_size, width), 1, 2)


def block_times(ids: jax.Array, block_size: int) -> jax.Array:
    """[B, L, n] → [B, n · block_size, L], when each token of these blocks comes; of id -1 at a time never reached."""
    times = ids[..., None] * block_size + jnp.arange(block_size)
    times = jnp.where(ids[..., None] < 0, jnp.iinfo(jnp.int32).max, times)
    return jnp.swapaxes(times.reshape(*ids.shape[:2], -1), 1, 2)


def prefix_lengths(op: str, length: Any, sizes: dict[str, int]) -> jax.Array:
    """[B] int32, how many of T tokens count: all unless given.

    Raises ValueError for another shape or dtype, and for a length that is no number of them, where it is not traced.
    """
    if length is None:
        return jnp.full(sizes["B"], sizes["T"], jnp.int32)
    check_shape(op, "length", length, "B", sizes)
    if not jnp.issubdtype(jnp.result_type(length), jnp.integer):
        raise ValueError(f"{op}: length: got dtype {jnp.result_type(length)}, wanted an integer one")
    time = sizes["T"]
    if not isinstance(length, jax.core.Tracer) and np.any((np.asarray(length) < 0) | (np.asarray(length) > time)):
        raise ValueError(f"{op}: length: got {np.asarray(length).tolist()}, wanted numbers from 0 to {time}")
    return jnp.clip(length, 0, time).astype(jnp.int32)


def prefix(op: str, x: jax.Array, length: jax.Array, capacity: int) -> jax.Array:
    """x [B, T, ...] of which the first `length` [B] tokens count → [B, capacity, ...], zeros after them.

    Raises ValueError where T is more.
    """
    time = x.shape[1]
    if time > capacity:
        raise ValueError(f"{op}: capacity: got {capacity}, wanted room for the {time} tokens given")
    come = jnp.expand_dims(jnp.arange(time) < length[:, None], range(2, x.ndim))
    return jnp.pad(jnp.where(come, x, 0), [(0, 0), (0, capacity - time)] + [(0, 0)] * (x.ndim - 2))


def check_window(op: str, window: int) -> None:
    """Raises ValueError unless a ring of so many places holds a token."""
    if window < 1:
        raise ValueError(f"{op}: window: got {window}, wanted at least 1")


def check_room(op: str, length: Any, capacity: int) -> None:
    """Raises ValueError where a sequence fills its cache already, if the lengths are known and not traced."""
    if not isinstance(length, jax.core.Tracer) and np.any(np.asarray(length) >= capacity):
        raise ValueError(
            f"{op}: cache: got {int(np.max(length))} tokens of at most {capacity}, wanted room for one more"
        )
