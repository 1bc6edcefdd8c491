"""What streaming attention keeps of keys and values: all of them, a window and sinks, or a budget for each head.

    Softmax(dim, cache=KeepWindow(window=512, sinks=4))
    Softmax(dim, cache=TaskKV(share=0.25)).prefill(prompt)

A policy says what is kept, a cache is what is kept. Keys are cached as they are compared, turned by their positions.
Source: sinks, Xiao et al. (2309.17453), §3.2, who give cached tokens new positions where we leave them their own;
Task-KV (2025), of which only the abstract could be read: the sizes and the measure of distance below are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.decoding import ring, ring_times, taken, written
from zoo.errors import ZooError
from zoo.types import Array

Read = Callable[[Array, Array, Array, Array], Array]
"""(q [B, H, K], k [B, S, G, K], v [B, S, G, V], visible [B, S, G or 1]) → [B, H, V]."""


@runtime_checkable
class Cache(Protocol):
    """Keys and values of the tokens so far."""

    @property
    def length(self) -> Array:
        """[B] int32, how many tokens have come."""

    def step(self, read: Read, q: Array, k: Array, v: Array) -> tuple[Array, Cache]:
        """One token's q [B, H, K], k and v [B, G, K] → what `read` makes of what is kept, and the cache with it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of all tokens so far, and how many there are."""

    k: Array
    """[B, S, G, K]; S is the capacity."""
    v: Array
    """[B, S, G, K]"""
    length: Array
    """[B] int32"""

    def step(self, read: Read, q: Array, k: Array, v: Array) -> tuple[Array, KeyValueCache]:
        """A row that is full gives NaN, and nothing is written."""
        time, capacity = self.length, self.k.shape[1]
        keys, values = written(self.k, k, time), written(self.v, v, time)
        seen = jnp.arange(capacity) <= time[:, None]
        full = time >= capacity
        out = jnp.where(full[:, None, None], jnp.nan, read(q, keys, values, seen[..., None]))
        return out, KeyValueCache(keys, values, jnp.where(full, time, time + 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingCache:
    """The first tokens, some that were chosen, and the last ones, for every head: memory that does not grow.

    Places 0 to sinks − 1 hold the first tokens, the next M the chosen ones, and the last R are a ring of the others.
    """

    k: Array
    """[B, sinks + M + R, G, K]"""
    v: Array
    """[B, sinks + M + R, G, K]"""
    held: Array
    """[B, M, G] bool, whether a chosen token is there."""
    length: Array
    """[B] int32"""
    sinks: int = field(metadata={"static": True})

    def step(self, read: Read, q: Array, k: Array, v: Array) -> tuple[Array, RingCache]:
        """Never full."""
        time, before = self.length, self.sinks + self.held.shape[1]
        size = self.k.shape[1] - before
        place = jnp.where(time < self.sinks, time, before + (time - self.sinks) % size)
        keys, values = written(self.k, k, place), written(self.v, v, place)
        first = jnp.arange(self.sinks) <= time[:, None]
        recent = ring_times(time + 1 - self.sinks, size) >= 0
        first, recent = (jnp.broadcast_to(x[..., None], (*x.shape, k.shape[1])) for x in (first, recent))
        visible = jnp.concatenate([first, self.held, recent], axis=1)
        return read(q, keys, values, visible), RingCache(keys, values, self.held, time + 1, self.sinks)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TaskKVCache:
    """Some heads keep all tokens, the others a budget."""

    far: KeyValueCache
    """Of the F heads far from the semantic centre."""
    near: RingCache
    """Of the other G − F."""
    heads: Array
    """[B, G] int32: which head each of theirs is, those of `far` first."""

    @property
    def length(self) -> Array:
        return self.near.length

    def step(self, read: Read, q: Array, k: Array, v: Array) -> tuple[Array, TaskKVCache]:
        """A row whose far heads are full gives NaN there, and nothing is written for them."""
        batch, groups, width = k.shape
        border = self.far.k.shape[2]
        q, k, v = (of_heads(x, self.heads) for x in (q.reshape(batch, groups, -1, width), k, v))

        def own(cache: Cache, heads: slice) -> tuple[Array, Any]:
            some = q[:, heads]
            many = some.reshape(batch, -1, width)
            out, cache = cache.step(read if many.size else _nothing, many, k[:, heads], v[:, heads])
            return out.reshape(some.shape), cache

        (far_out, far), (near_out, near) = own(self.far, slice(border)), own(self.near, slice(border, None))
        out = of_heads(jnp.concatenate([far_out, near_out], axis=1), jnp.argsort(self.heads, axis=1))
        return out.reshape(batch, -1, width), TaskKVCache(far, near, self.heads)


@runtime_checkable
class Policy(Protocol):
    """What to keep."""

    def empty(self, batch: int, capacity: int, heads: int, width: int, dtype: DTypeLike) -> Cache:
        """The cache before the first token, for `heads` heads of keys and values."""

    def after(self, prompt: KeyValueCache, q: Array, out: Array) -> Cache:
        """What is kept of a prompt, of whose tokens q [B, T, H, K] are the queries; out [H, K, D] merges heads."""


@dataclass(frozen=True)
class KeepAll:
    """Every token, up to a capacity."""

    def empty(self, batch: int, capacity: int, heads: int, width: int, dtype: DTypeLike) -> KeyValueCache:
        nothing = jnp.zeros((batch, capacity, heads, width), dtype)
        return KeyValueCache(nothing, nothing, jnp.zeros(batch, jnp.int32))

    def after(self, prompt: KeyValueCache, q: Array, out: Array) -> KeyValueCache:
        return prompt


@dataclass(frozen=True)
class KeepWindow:
    """The last `window` tokens and the first `sinks`, whatever the capacity."""

    window: int = 512
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise ZooError(f"KeepWindow: got window {self.window} and sinks {self.sinks}, wanted at least 1 and 0")

    def empty(self, batch: int, capacity: int, heads: int, width: int, dtype: DTypeLike) -> RingCache:
        return self.after(KeepAll().empty(batch, 0, heads, width, dtype))

    def after(self, prompt: KeyValueCache, q: Array | None = None, out: Array | None = None) -> RingCache:
        none = jnp.zeros((prompt.k.shape[0], 0, prompt.k.shape[2]), jnp.int32)
        return budgeted(prompt, none, none > 0, self.sinks, self.window)


@dataclass(frozen=True)
class TaskKV:
    """Heads far from the semantic centre keep all tokens; the others sinks, recent tokens and middle activations.

    A head's vector is the mean of its part of the output, without gates, over the last `observed` queries of a prompt,
    the centre is the mean of the heads, distance is 1 − cosine; a head of keys and values is as far as its farthest
    query head.
    Middle activations are the tokens between sinks and recent ones that those queries gave most weight.

    share     of heads of keys and values that keep all, rounded up; 1 is exact
    sinks, recent, middle   tokens the others keep
    observed  queries
    """

    share: float = 0.25
    sinks: int = 16
    recent: int = 256
    middle: int = 64
    observed: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ZooError(f"TaskKV: share: got {self.share}, wanted a number from 0 to 1")
        if min(self.sinks, self.middle) < 0 or min(self.recent, self.observed) < 1:
            wanted = "wanted sinks and middle of at least 0, recent and observed of at least 1"
            raise ZooError(f"TaskKV: got {self}, {wanted}")

    def empty(self, batch: int, capacity: int, heads: int, width: int, dtype: DTypeLike) -> Cache:
        raise ZooError("TaskKV: a prompt decides what each head keeps: begin with `prefill`, not with `initial_state`")

    def after(self, prompt: KeyValueCache, q: Array, out: Array) -> TaskKVCache:
        weights, parts = self._seen(prompt, q, out)
        centre = jnp.mean(parts, axis=1, keepdims=True)
        length = jnp.linalg.norm(parts, axis=-1) * jnp.linalg.norm(centre, axis=-1)
        distance = 1 - jnp.sum(parts * centre, axis=-1) / jnp.maximum(length, 1e-12)
        batch, groups = prompt.k.shape[0], prompt.k.shape[2]
        farthest = jnp.max(distance.reshape(batch, groups, -1), axis=-1)
        heads = jnp.argsort(-farthest, axis=1).astype(jnp.int32)
        border = math.ceil(self.share * groups)

        k, v = (of_heads(x, heads, axis=2) for x in (prompt.k, prompt.v))
        weights = of_heads(weights, heads, axis=2)[:, :, border:]
        far = KeyValueCache(k[:, :, :border], v[:, :, :border], prompt.length)
        others = KeyValueCache(k[:, :, border:], v[:, :, border:], prompt.length)
        times, held = self._middle(weights, prompt.length)
        return TaskKVCache(far, budgeted(others, times, held, self.sinks, self.recent), heads)

    def _seen(self, prompt: KeyValueCache, q: Array, out: Array) -> tuple[Array, Array]:
        """Weights [B, S, G] that the observed queries gave to each token, and their heads' mean output [B, H, D]."""
        batch, capacity, groups, width = prompt.k.shape
        times = prompt.length[:, None] - self.observed + jnp.arange(self.observed)
        there = (times >= 0)[..., None, None]
        last = taken(q, times).astype(jnp.float32).reshape(batch, self.observed, groups, -1, width)
        scores = jnp.einsum("bwgrk,bsgk->bwgrs", last, prompt.k.astype(jnp.float32)) * width**-0.5
        visible = (jnp.arange(capacity) <= times[..., None])[:, :, None, None]
        p = jnp.where(there[..., None], jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1, where=visible), 0)
        mixed = jnp.einsum("bwgrs,bsgk->bgrk", p, prompt.v.astype(jnp.float32)) / jnp.sum(there, axis=1)[..., None]
        parts = jnp.einsum("bhk,hkd->bhd", mixed.reshape(batch, -1, width), out.astype(jnp.float32))
        return jnp.swapaxes(jnp.sum(p, axis=(1, 3)), 1, 2), parts

    def _middle(self, weights: Array, length: Array) -> tuple[Array, Array]:
        """[B, middle, G] times of the tokens of most weight between sinks and recent ones, and whether there are."""
        time = jnp.arange(weights.shape[1])
        between = (time >= self.sinks) & (time < length[:, None] - self.recent)
        most = min(self.middle, weights.shape[1])
        found, times = jax.lax.top_k(jnp.swapaxes(jnp.where(between[..., None], weights, -jnp.inf), 1, 2), most)
        missing = ((0, 0), (0, 0), (0, self.middle - most))
        times, held = jnp.pad(times, missing), jnp.pad(found > -jnp.inf, missing)
        return jnp.swapaxes(times, 1, 2), jnp.swapaxes(held, 1, 2)


def budgeted(prompt: KeyValueCache, times: Array, held: Array, sinks: int, recent: int) -> RingCache:
    """A prompt's first `sinks` tokens, those at `times` [B, M, G] where `held`, and its last `recent`."""
    short = max(sinks - prompt.k.shape[1], 0)

    def kept(x: Array) -> Array:
        first = jnp.pad(x[:, :sinks], ((0, 0), (0, short), (0, 0), (0, 0)))
        chosen = jnp.where(held[..., None], jnp.take_along_axis(x, times[..., None], axis=1), 0)
        return jnp.concatenate([first, chosen, ring(x[:, sinks:], prompt.length - sinks, recent)], axis=1)

    return RingCache(kept(prompt.k), kept(prompt.v), held, prompt.length, sinks)


def of_heads(x: Array, heads: Array, axis: int = 1) -> Array:
    """x with its axis of heads in the order `heads` [B, G]."""
    others = [n for n in range(1, x.ndim) if n != axis]
    return jnp.take_along_axis(x, jnp.expand_dims(heads, others), axis=axis)


def _nothing(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """No heads read nothing."""
    return q
