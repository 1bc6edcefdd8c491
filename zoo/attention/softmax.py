"""Softmax attention with grouped heads, rotary positions and normalised queries and keys.

Source: Vaswani et al. (1706.03762), §3.2; grouped keys and values Ainslie et al. (2305.13245); rotary positions Su et
al. (2104.09864); normalised queries and keys Henry et al. (2010.04245), here as RMS norms with a learned scale, as in
Gemma 3 and Qwen 3.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from kernels.decoding import attend as attend_to_cache
from kernels.decoding import prefix
from kernels.packing import runs
from kernels.sparse_attention import Causal, Full, Mask, sparse_attention
from kernels.split_attention import split_attention
from zoo.attention.caches import KeepAll, KeyValueCache, Policy
from zoo.errors import ZooError
from zoo.layers.devices import Axes, over_time
from zoo.layers.mixer import Mixer, State, head_count
from zoo.layers.parameters import merge_heads, norm, split_heads
from zoo.layers.rotary import BASE, grid_positions, rotate, times
from zoo.types import Array

HEADS: Axes = ("batch", None, "heads", None)
"""Of [B, T, H, K] where time is whole on every device while a kernel runs, and where it may be split."""
SPLIT_HEADS: Axes = ("batch", "tokens", "heads", None)
SPLIT_IDS: Axes = ("batch", "tokens")


class Softmax(Mixer):
    """out_t = sum_j softmax_j(q_t · k_j / √K) v_j for every head.

    heads      H query heads; as many of 64 features as fit unless given
    kv_heads   G heads of keys and values, each for H / G query heads; H unless given
    qk_norm    RMS norms, with a learned scale, on queries and keys
    rotary     positions turn queries and keys; False leaves the mixer without a sense of order
    grid       sizes of one to four axes whose product is T, for rotary positions of so many axes; () is time alone
    base       of the rotary angles
    bias       on the projections
    cache      what streaming keeps of the tokens so far: `KeepAll`, `KeepWindow`, `TaskKV` (`zoo.attention.caches`)
    causal     False lets every token see all

    Mixers that differ in what is compared with what, and how, are subclasses.
    """

    heads: int | None = None
    kv_heads: int | None = None
    qk_norm: bool = False
    rotary: bool = True
    grid: tuple[int, ...] = ()
    base: float = BASE
    bias: bool = False
    cache: Policy = KeepAll()

    ways: ClassVar[tuple[bool, ...]] = (True, False)

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
        return self.read_out(x, self.mixed(q, k, v, segment_ids, mask))

    def initial_state(self, batch: int, capacity: int = 2048) -> State:
        self.check_causal()
        _, groups, width = self.head_sizes()
        return self.policy().empty(batch, capacity, groups, width, self.dtype)

    def prefill(
        self, x: Float[Array, "B T D"], length: Int[Array, " B"] | None = None, capacity: int = 2048
    ) -> tuple[Float[Array, "B T D"], State]:
        """A prompt [B, T, D] at once → what `step` would give for its tokens one by one, and the state after them.

        length [B]: so many tokens of each row count; all unless given. Outputs are those of all tokens before, also
        where the cache keeps fewer. Raises ZooError where the capacity is less than T.
        """
        self.check_causal()
        length = prompt_length(type(self).__name__, x, length, capacity)
        q, k, v = self.projected(x, self.positions(x.shape[1], None))
        return self.read_out(x, self.mixed(q, k, v, None, None)), self.remembered(q, k, v, length, capacity)

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        """One token. A row whose cache is full gives NaN, and nothing is written."""
        token = x[:, None]
        q, k, v = (y[:, 0] for y in self.projected(token, self.place(state.length)))
        mixed, state = self.recalled(q, k, v, state)
        return self.read_out(token, mixed[:, None])[:, 0], state

    @nn.nowrap
    def head_sizes(self) -> tuple[int, int, int]:
        """(H, G, K). Raises ZooError where they do not divide."""
        heads = head_count(type(self).__name__, self.dim, self.heads)
        return heads, group_count(type(self).__name__, heads, self.kv_heads), self.dim // heads

    @nn.nowrap
    def sight(self) -> Mask:
        """Which keys a query may see, beside segments and tokens that are not there."""
        return Causal() if self.causal else Full()

    @nn.nowrap
    def policy(self) -> Policy:
        """What streaming keeps."""
        return self.cache

    @nn.nowrap
    def positions(self, length: int, segment_ids: Array | None) -> Array:
        """[1 or B, T] or, on a grid, [1, T, A]. Raises ZooError where the grid has another number of places."""
        if not self.grid:
            return times(length, segment_ids)
        if math.prod(self.grid) != length:
            raise ZooError(f"{type(self).__name__}: grid {self.grid} has not the {length} places of the input")
        return grid_positions(*self.grid)

    @nn.nowrap
    def place(self, time: Array) -> Array:
        """[B] times → positions [B, 1] or, on a grid, [B, 1, A]."""
        return grid_positions(*self.grid)[0, time][:, None] if self.grid else time[:, None]

    def projected(self, x: Float[Array, "B T D"], positions: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values [B, T, H or G, K], normalised and turned."""
        q, k, v = self.unturned(x)
        if self.rotary:
            q, k = rotate(q, positions, self.base), rotate(k, positions, self.base)
        return q, k, v

    def unturned(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values before their positions turn them."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def mixed(self, q: Array, k: Array, v: Array, segment_ids: Array | None, mask: Array | None) -> Array:
        """[B, T, H, K]: each head's output."""
        return masked_attention(q, k, v, self.sight(), segment_ids=segment_ids, mask=mask)

    def recalled(self, q: Array, k: Array, v: Array, state: State) -> tuple[Array, State]:
        """`mixed` of one token, [B, H, K], and the state with it."""

        def read(q: Array, k: Array, v: Array, visible: Array) -> Array:
            return attend_to_cache(q, k, v, visible=visible, scale=q.shape[-1] ** -0.5)

        return state.step(read, q, k, v)

    def remembered(self, q: Array, k: Array, v: Array, length: Array, capacity: int) -> State:
        """The state after these tokens [B, T, ...], of which the first `length` [B] count."""
        name = type(self).__name__
        held = KeyValueCache(prefix(name, k, length, capacity), prefix(name, v, length, capacity), length)
        return self.policy().after(held, q, nn.unbox(self.out.variables["params"]["kernel"]))

    def read_out(self, x: Float[Array, "B T D"], mixed: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        """Heads merged; x is the mixer's input."""
        return self.out(mixed)


def group_count(mixer: str, heads: int, kv_heads: int | None) -> int:
    """G heads of keys and values: as asked, or one for every query head. Raises ZooError where they do not divide H."""
    groups = heads if kv_heads is None else kv_heads
    if groups < 1 or heads % groups:
        raise ZooError(f"{mixer}: {heads} heads do not divide into {groups} kv_heads")
    return groups


def prompt_length(mixer: str, x: Array, length: Array | None, capacity: int) -> Array:
    """[B] int32, how many of a prompt's tokens [B, T, D] count. Raises ZooError where the capacity is less than T."""
    batch, time, _ = x.shape
    if capacity < time:
        raise ZooError(f"{mixer}: capacity: got {capacity}, wanted room for the {time} tokens given")
    return jnp.full(batch, time, jnp.int32) if length is None else length.astype(jnp.int32)


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
    """`sparse_attention` of [B, T, H, K] within runs of equal ids, blind to tokens where mask [B, T] is False.

    Where time is split over devices, `sight` has to be a mask that `split_attention` takes.
    """
    ids = segment_pair(segment_ids, mask)
    return attention_over_time(q, k, v, sight, ids, scale=scale)


def attention_over_time(
    q: Array, k: Array, v: Array, sight: Mask, ids: tuple[Array, ...], *, scale: float | None = None
) -> Array:
    """`sparse_attention` of [B, T, H, K] on the mesh; `ids` as `segment_pair` gives them."""

    def op(q: Array, k: Array, v: Array, *ids: Any, axis: str | None) -> Array:
        if axis is None:
            return sparse_attention(q, k, v, sight, scale=scale, segment_ids=ids or None)
        return split_attention(q, k, v, sight, axis=axis, scale=scale, segment_ids=ids or None)

    return over_time(op, (q, k, v, *ids), (SPLIT_HEADS,) * 3 + (SPLIT_IDS,) * len(ids), SPLIT_HEADS)


def segment_pair(segment_ids: Array | None, mask: Array | None) -> tuple[Array, ...]:
    """Ids of queries and of keys as `sparse_attention` takes them, or none; tokens that are not there are of none."""
    if segment_ids is not None:
        queries = runs(segment_ids)
    elif mask is not None:
        queries = jnp.zeros(mask.shape, jnp.int32)
    else:
        return ()
    return queries, queries if mask is None else jnp.where(mask, queries, -1)
