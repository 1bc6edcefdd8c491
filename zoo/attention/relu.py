"""ReLU attention: weights that need not sum to one, so a head may also give nothing.

Source: Guo et al., "Active-Dormant Attention Heads" (2410.13835), which divides by the number of visible keys and finds
no attention sinks; their code (GuoTianYu2000/Active-Dormant-Attention).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from zoo.attention.caches import TaskKV
from zoo.attention.softmax import HEADS, Softmax, segment_pair
from zoo.errors import ZooError
from zoo.layers.devices import on_devices
from zoo.layers.mixer import State
from zoo.types import Array

QUERIES = 128
"""Worked on at once: scores are never larger than [B, H, QUERIES, T]."""


class Relu(Softmax):
    """out_t = 1/n_t · sum_j relu(q_t · k_j / √K) v_j over the n_t keys j that t sees, for every head.

    The options are those of `Softmax`; of the caches not `TaskKV`, which weighs tokens by their softmax.
    """

    def setup(self) -> None:
        super().setup()
        if isinstance(self.cache, TaskKV):
            raise ZooError(f"relu has no softmax to weigh tokens by: cache: got {self.cache}, wanted another")

    def mixed(self, q: Array, k: Array, v: Array, segment_ids: Array | None, mask: Array | None) -> Array:
        ids = segment_pair(segment_ids, mask)

        def op(q: Array, k: Array, v: Array, *ids: Any) -> Array:
            return relu_attention(q, k, v, *ids, causal=self.causal)

        return on_devices(op, (q, k, v, *ids), (HEADS, HEADS, HEADS, *(("batch", None),) * len(ids)), HEADS)

    def recalled(self, q: Array, k: Array, v: Array, state: State) -> tuple[Array, State]:
        def read(q: Array, k: Array, v: Array, visible: Array) -> Array:
            # Places of a cache that every head sees alike, or each its own.
            seen = jnp.swapaxes(jnp.broadcast_to(visible, k.shape[:3]), 1, 2)[:, :, None]
            return weighted(q[:, None], k, v, seen)[:, 0]

        return state.step(read, q, k, v)


def relu_attention(
    q: Array, k: Array, v: Array, q_ids: Array | None = None, k_ids: Array | None = None, *, causal: bool = True
) -> Array:
    """q [B, T, H, K], k and v [B, T, G, K] → [B, T, H, K] in v's dtype, a stretch of queries after another.

    q_ids, k_ids [B, T]: besides causality the ids must be equal. Memory grows with T, forward and backward: the scores
    of a stretch are computed again for its gradient.
    """
    batch, time = q.shape[:2]
    if q_ids is None or k_ids is None:
        q_ids = k_ids = jnp.zeros((batch, time), jnp.int32)
    size = min(QUERIES, time)
    pieces = -(-time // size)
    # Queries of the padding see whatever the last segment sees, and are cut off.
    padding = ((0, 0), (0, pieces * size - time))
    queries = jnp.pad(q, (*padding, (0, 0), (0, 0))).reshape(batch, pieces, size, *q.shape[2:])
    own_ids = jnp.pad(q_ids, padding).reshape(batch, pieces, size)

    @jax.checkpoint
    def stretch(part: tuple[Array, Array, Array]) -> Array:
        first, q, ids = part
        visible = ids[:, :, None] == k_ids[:, None]
        if causal:
            visible &= jnp.arange(time) <= (first + jnp.arange(size))[:, None]
        return weighted(q, k, v, visible[:, None])

    parts = (size * jnp.arange(pieces), jnp.swapaxes(queries, 0, 1), jnp.swapaxes(own_ids, 0, 1))
    out = jnp.swapaxes(jax.lax.map(stretch, parts), 0, 1)
    return out.reshape(batch, pieces * size, *q.shape[2:])[:, :time]


def weighted(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """q [B, C, H, K], k and v [B, S, G, K], visible [B, G or 1, C or 1, S] → [B, C, H, K]; sums and weights float32."""
    batch, size, _, width = q.shape
    grouped = q.reshape(batch, size, k.shape[2], -1, width)
    scores = jnp.einsum("bcgrk,bsgk->bgrcs", grouped, k, preferred_element_type=jnp.float32) * width**-0.5
    seen = visible[:, :, None]
    count = jnp.maximum(jnp.sum(seen, axis=-1, keepdims=True), 1)
    weights = jnp.where(seen, jax.nn.relu(scores), 0) / count
    out = jnp.einsum("bgrcs,bsgk->bcgrk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(v.dtype)
