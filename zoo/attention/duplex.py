"""Duplex attention: tokens look at their own modality, and at others mapped into the space it spans.

Source: Zhang et al., "MODA: MOdular Duplex Attention" (2507.04635). The paper states the parts (spaces spanned by
modalities' basis vectors through normalised Gram matrices, attention within and between modalities apart, masks by
modality) and has no code to read; how they fit together here is our choice:

- a modality's basis are its tokens: G_m = X_mᵀ X_m / ‖X_mᵀ X_m‖_F, for every head of its D / H features;
- a query of modality m sees tokens of others as x G_m, before keys and values are made of them;
- one softmax over its own modality, one over all others, mixed by a learned sigmoid gate for each head;
- where a token may not see later ones, a key's G_m holds the tokens of m up to that key, no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from kernels.decoding import attend as attend_to_cache
from kernels.decoding import written
from kernels.packing import runs
from kernels.sparse_attention import Causal, Full, Mask
from zoo.attention.softmax import attention_over_time
from zoo.errors import ZooError
from zoo.layers.devices import linear_attention
from zoo.layers.mixer import Mixer, head_count
from zoo.layers.parameters import merge_heads, partitioned, split_heads
from zoo.layers.rotary import BASE, rotate, times
from zoo.types import Array

LEAST = 1e-12
"""Of a squared norm that is divided by: a modality of which no token has come has none."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DuplexState:
    """Keys and values as they are and as each modality sees them, and what each spans."""

    k: Array
    """[B, S, H, K]; S is the capacity."""
    v: Array
    """[B, S, H, K]"""
    mapped_k: Array
    """[B, S, M, H, K] of tokens mapped by each modality's Gram matrix."""
    mapped_v: Array
    """[B, S, M, H, K]"""
    gram: Array
    """[B, M, H, K, K] float32, not normalised."""
    energy: Array
    """[B, M, H] float32, squared norms of these."""
    length: Array
    """[B] int32"""


class Duplex(Mixer):
    """out = g · attention to the token's modality + (1 − g) · attention to the others, mapped into its space.

    A part that sees nothing is 0: the first tokens of the first modality have no others before them.

    modalities      sizes of the spans of all modalities but the last, in their order from the start of a segment; the
                    last has the rest
    heads           H; as many of 64 features as fit unless given
    mapping         "gram", or "none" for tokens of other modalities as they are
    rotary, base    positions turn queries and keys
    causal          True for all. False lets tokens see all of their modality, but for those of `autoregressive`
    autoregressive  numbers of modalities in which no token sees a later one (text, say). Where there are any, no token
                    sees a later one of another modality, nor through a Gram matrix
    """

    modalities: tuple[int, ...] = ()
    heads: int | None = None
    mapping: str = "gram"
    rotary: bool = True
    base: float = BASE
    autoregressive: tuple[int, ...] = ()

    ways = (True, False)

    def setup(self) -> None:
        if not self.modalities or min(self.modalities) < 1:
            raise ZooError(
                f"Duplex: modalities: got {self.modalities}, wanted the sizes of the spans of all but the last"
            )
        if self.mapping not in ("gram", "none"):
            raise ZooError(f"Duplex: mapping is gram or none, got {self.mapping!r}")
        if not set(self.autoregressive) <= set(range(self.count())):
            raise ZooError(f"Duplex: autoregressive: got {self.autoregressive}, wanted numbers below {self.count()}")
        heads = head_count("Duplex", self.dim, self.heads)
        width = self.dim // heads
        self.query, self.key, self.value = (split_heads(self.dim, heads, width, dtype=self.dtype) for _ in range(3))
        self.out = merge_heads(heads, width, self.dim, dtype=self.dtype)
        self.gate = self.param("gate", partitioned(nn.initializers.zeros, "heads"), (heads,))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        time = times(x.shape[1], segment_ids)
        label = jnp.broadcast_to(self.labels(time), x.shape[:2])
        run = jnp.zeros_like(label) if segment_ids is None else runs(segment_ids)
        there = jnp.ones(label.shape, bool) if mask is None else mask
        q, k, v = self._turned(self.query(x), time), self._turned(self.key(x), time), self.value(x)
        group = run * self.count() + label
        within: Any = 0
        for sight, members in self._sights():
            queries = jnp.where(jnp.isin(label, jnp.asarray(members)), group, -1)
            within += attention_over_time(q, k, v, sight, (queries, jnp.where(there, group, -2)))

        # As many examples as there are modalities: in each, queries of one and keys of all others.
        own = label[:, None] == jnp.arange(self.count())[:, None]
        mapped, ids = self._mapped(x, own & there[:, None], segment_ids), jnp.repeat(run, self.count(), axis=0)
        queries, keys = (jnp.where(_folded(are), ids, no) for are, no in ((own, -1), (~own & there[:, None], -2)))
        time = times(x.shape[1], None if segment_ids is None else ids)
        k, v = self._turned(self.key(mapped), time), self.value(mapped)
        sight = Causal() if self.looks_back() else Full()
        between = attention_over_time(jnp.repeat(q, self.count(), axis=0), k, v, sight, (queries, keys))
        between = jnp.sum(between.reshape(x.shape[0], self.count(), *between.shape[1:]), axis=1)
        return self._mixed(within, between)

    def initial_state(self, batch: int, capacity: int = 2048) -> DuplexState:
        self.check_causal()
        heads = head_count("Duplex", self.dim, self.heads)
        width, many = self.dim // heads, self.count()
        own = jnp.zeros((batch, capacity, heads, width), self.dtype)
        mapped = jnp.zeros((batch, capacity, many, heads, width), self.dtype)
        gram, energy = jnp.zeros((batch, many, heads, width, width)), jnp.zeros((batch, many, heads))
        return DuplexState(own, own, mapped, mapped, gram, energy, jnp.zeros(batch, jnp.int32))

    def step(self, x: Float[Array, "B D"], state: DuplexState) -> tuple[Float[Array, "B D"], DuplexState]:
        """One token. A row whose caches are full gives NaN, and nothing is written."""
        time, capacity = state.length, state.k.shape[1]
        label = self.labels(time)
        mapped, gram, energy = self._mapped_one(x, label, state)

        def turned(keys: Array) -> Array:
            """[B, ..., H, K] at this time."""
            rows = keys.reshape(keys.shape[0], -1, *keys.shape[-2:])
            return self._turned(rows, jnp.broadcast_to(time[:, None], rows.shape[:2])).reshape(keys.shape)

        k, v = written(state.k, turned(self.key(x)), time), written(state.v, self.value(x), time)
        mapped_k = written(state.mapped_k, turned(self.key(mapped)), time)
        mapped_v = written(state.mapped_v, self.value(mapped), time)
        q = turned(self.query(x))

        places = jnp.arange(capacity)
        seen, same = places <= time[:, None], self.labels(places) == label[:, None]

        def attended(k: Array, v: Array, visible: Array) -> Array:
            return attend_to_cache(q, k, v, visible=visible[..., None], scale=q.shape[-1] ** -0.5)

        others_k, others_v = (
            jnp.take_along_axis(cache, label[:, None, None, None, None], axis=2)[:, :, 0]
            for cache in (mapped_k, mapped_v)
        )
        within, between = attended(k, v, seen & same), attended(others_k, others_v, seen & ~same)
        full = time >= capacity
        out = jnp.where(full[:, None], jnp.nan, self._mixed(within, between))
        return out, DuplexState(k, v, mapped_k, mapped_v, gram, energy, jnp.where(full, time, time + 1))

    @nn.nowrap
    def count(self) -> int:
        """How many modalities there are."""
        return len(self.modalities) + 1

    @nn.nowrap
    def looks_back(self) -> bool:
        """Whether no token sees a later one of another modality."""
        return self.causal or bool(self.autoregressive)

    @nn.nowrap
    def _sights(self) -> list[tuple[Mask, list[int]]]:
        """What queries see of their own modality, and the modalities that it is so in."""
        back = [own for own in range(self.count()) if self.causal or own in self.autoregressive]
        both = [own for own in range(self.count()) if own not in back]
        return [(sight, members) for sight, members in ((Causal(), back), (Full(), both)) if members]

    @nn.nowrap
    def labels(self, time: Array) -> Array:
        """Which modality a token at this time of its segment is of."""
        ends = jnp.asarray(tuple(accumulate(self.modalities)))
        return jnp.sum(time[..., None] >= ends, axis=-1, dtype=jnp.int32)

    def _turned(self, x: Float[Array, "B T H K"], time: Array) -> Float[Array, "B T H K"]:
        return rotate(x, time, self.base) if self.rotary else x

    def _mixed(self, within: Float[Array, "*lead H K"], between: Float[Array, "*lead H K"]) -> Float[Array, "*lead D"]:
        gate = jax.nn.sigmoid(self.gate)[:, None].astype(within.dtype)
        return self.out(gate * within + (1 - gate) * between)

    def _mapped(self, x: Float[Array, "B T D"], own: Bool[Array, "B M T"], ids: Array | None) -> Float[Array, "BM T D"]:
        """x_j G_m, M in place of each example; G_m of the tokens where `own`, up to j where later ones are unseen."""
        many = self.count()
        rows = jnp.repeat(x.astype(self.dtype), many, axis=0)
        if self.mapping == "none":
            return rows
        heads = head_count("Duplex", self.dim, self.heads)
        rows = rows.reshape(*rows.shape[:2], heads, -1)
        basis = jnp.where(_folded(own)[..., None, None], rows, 0)
        ids = None if ids is None else jnp.repeat(ids, many, axis=0)
        summed: Any = {"scale": 1.0, "causal": self.looks_back(), "segment_ids": ids}
        # With the basis as keys and values, linear attention gives x_j times the sum of all x_i x_iᵀ.
        raw, _ = linear_attention(rows, basis, basis, **summed)
        change = jnp.where(_folded(own)[..., None], _energy(rows, raw, self.looks_back()), 0)[..., None]
        ones = jnp.ones_like(change)
        energy, _ = linear_attention(ones, ones, change, **summed)
        return (raw * jax.lax.rsqrt(jnp.maximum(energy, LEAST))).astype(self.dtype).reshape(-1, *x.shape[1:])

    def _mapped_one(self, x: Float[Array, "B D"], label: Array, state: DuplexState) -> tuple[Array, Array, Array]:
        """One token as each modality sees it [B, M, D], and the new Gram matrices and squared norms."""
        if self.mapping == "none":
            return jnp.repeat(x[:, None], self.count(), axis=1), state.gram, state.energy
        own = jax.nn.one_hot(label, self.count())
        rows = x.astype(jnp.float32).reshape(x.shape[0], 1, *state.gram.shape[2:4])
        outer = rows[..., :, None] * rows[..., None, :]
        gram = state.gram + own[:, :, None, None, None] * outer
        raw = jnp.einsum("bmhij,bhj->bmhi", gram, rows[:, 0])
        energy = state.energy + own[..., None] * _energy(rows, raw, True)
        mapped = raw * jax.lax.rsqrt(jnp.maximum(energy, LEAST))[..., None]
        return mapped.astype(self.dtype).reshape(x.shape[0], self.count(), -1), gram, energy


def _folded(x: Array) -> Array:
    """[B, M, ...] → [B · M, ...]"""
    return x.reshape(-1, *x.shape[2:])


def _energy(x: Float[Array, "*#lead K"], raw: Float[Array, "*lead K"], prefix: bool) -> Float[Array, "*lead"]:
    """What token x adds to ‖G‖²: x G x, and up to itself 2 x G x − |x|⁴, where `raw` = x G has x in G."""
    x, raw = x.astype(jnp.float32), raw.astype(jnp.float32)
    along = jnp.sum(x * raw, axis=-1)
    return 2 * along - jnp.sum(x * x, axis=-1) ** 2 if prefix else along
