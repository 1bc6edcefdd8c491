"""Softmax attention with grouped heads, rotary positions and normalised queries and keys.

Source: Vaswani et al. (1706.03762), §3.2; grouped keys and values Ainslie et al. (2305.13245); rotary positions Su et
al. (2104.09864); normalised queries and keys Henry et al. (2010.04245), here as RMS norms with a learned scale, as in
Gemma 3 and Qwen 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from kernels.decoding import attend as attend_to_cache
from kernels.decoding import written
from kernels.packing import runs
from kernels.sparse_attention import Causal, Full, Mask, sparse_attention
from zoo.errors import ZooError
from zoo.layers.devices import on_devices
from zoo.layers.mixer import Mixer, head_count
from zoo.layers.parameters import merge_heads, norm, split_heads
from zoo.layers.rotary import BASE, grid_positions, rotate, times
from zoo.types import Array

HEADS = ("batch", None, "heads", None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of the tokens so far, and how many there are."""

    k: Array
    """[B, S, G, K]; S is the capacity."""
    v: Array
    """[B, S, G, K]"""
    length: Array
    """[B] int32"""


class Softmax(Mixer):
    """out_t = sum_j softmax_j(q_t · k_j / √K) v_j for every head.

    heads      H query heads; as many of 64 features as fit unless given
    kv_heads   G heads of keys and values, each for H / G query heads; H unless given
    qk_norm    RMS norms, with a learned scale, on queries and keys
    rotary     positions turn queries and keys; False leaves the mixer without a sense of order
    grid       sizes of one to four axes whose product is T, for rotary positions of so many axes; () is time alone
    base       of the rotary angles
    bias       on the projections
    causal     False lets every token see all
    """

    heads: int | None = None
    kv_heads: int | None = None
    qk_norm: bool = False
    rotary: bool = True
    grid: tuple[int, ...] = ()
    base: float = BASE
    bias: bool = False

    ways = (True, False)

    def setup(self) -> None:
        heads, groups, width = self.head_sizes()
        self.query = split_heads(self.dim, heads, width, bias=self.bias, dtype=self.dtype)
        self.key = split_heads(self.dim, groups, width, bias=self.bias, dtype=self.dtype)
        self.value = split_heads(self.dim, groups, width, bias=self.bias, dtype=self.dtype)
        self.out = merge_heads(heads, width, self.dim, bias=self.bias, dtype=self.dtype)
        if self.qk_norm:
            self.query_norm = norm("rms", axis="head_width", dtype=self.dtype)
            self.key_norm = norm("rms", axis="head_width", dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        q, k, v = self.projected(x, self.positions(x.shape[1], segment_ids))
        return self.out(masked_attention(q, k, v, self.sight(), segment_ids=segment_ids, mask=mask))

    def initial_state(self, batch: int, capacity: int = 2048) -> KeyValueCache:
        self.check_causal()
        _, groups, width = self.head_sizes()
        empty = jnp.zeros((batch, capacity, groups, width), self.dtype)
        return KeyValueCache(empty, empty, jnp.zeros(batch, jnp.int32))

    def step(self, x: Float[Array, "B D"], state: KeyValueCache) -> tuple[Float[Array, "B D"], KeyValueCache]:
        """One token. A row whose cache is full gives NaN, and nothing is written."""
        q, k, v = (y[:, 0] for y in self.projected(x[:, None], state.length[:, None]))
        time, capacity = state.length, state.k.shape[1]
        keys, values = written(state.k, k, time), written(state.v, v, time)
        seen = jnp.arange(capacity) <= time[:, None]
        mixed = attend_to_cache(q, keys, values, visible=seen[..., None], scale=q.shape[-1] ** -0.5)
        full = time >= capacity
        mixed = jnp.where(full[:, None, None], jnp.nan, mixed)
        return self.out(mixed), KeyValueCache(keys, values, jnp.where(full, time, time + 1))

    @nn.nowrap
    def head_sizes(self) -> tuple[int, int, int]:
        """(H, G, K). Raises ZooError where they do not divide."""
        heads = head_count(type(self).__name__, self.dim, self.heads)
        groups = heads if self.kv_heads is None else self.kv_heads
        if groups < 1 or heads % groups:
            raise ZooError(f"{type(self).__name__}: {heads} heads do not divide into {groups} kv_heads")
        return heads, groups, self.dim // heads

    @nn.nowrap
    def sight(self) -> Mask:
        """Which keys a query may see, beside segments and tokens that are not there."""
        return Causal() if self.causal else Full()

    @nn.nowrap
    def positions(self, length: int, segment_ids: Array | None) -> Array:
        """[1 or B, T] or, on a grid, [1, T, A]. Raises ZooError where the grid has another number of places."""
        if not self.grid:
            return times(length, segment_ids)
        if math.prod(self.grid) != length:
            raise ZooError(f"{type(self).__name__}: grid {self.grid} has not the {length} places of the input")
        return grid_positions(*self.grid)

    def projected(self, x: Float[Array, "B T D"], positions: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values [B, T, H or G, K], normalised and turned."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary:
            q, k = rotate(q, positions, self.base), rotate(k, positions, self.base)
        return q, k, v


def masked_attention(
    q: Array,
    k: Array,
    v: Array,
    sight: Mask,
    *,
    segment_ids: Array | None = None,
    mask: Array | None = None,
    scale: float | None = None,
) -> Array:
    """`sparse_attention` of [B, T, H, K] within runs of equal ids, blind to tokens where mask [B, T] is False."""
    ids = segment_pair(segment_ids, mask)

    def op(q: Array, k: Array, v: Array, *ids: Any) -> Array:
        return sparse_attention(q, k, v, sight, scale=scale, segment_ids=ids or None)

    return on_devices(op, (q, k, v, *ids), (HEADS, HEADS, HEADS, *(("batch", None),) * len(ids)), HEADS)


def segment_pair(segment_ids: Array | None, mask: Array | None) -> tuple[Array, Array] | tuple[()]:
    """Ids of queries and of keys as `sparse_attention` takes them; tokens that are not there are keys of no segment."""
    if segment_ids is not None:
        queries = runs(segment_ids)
    elif mask is not None:
        queries = jnp.zeros(mask.shape, jnp.int32)
    else:
        return ()
    return queries, queries if mask is None else jnp.where(mask, queries, -1)
