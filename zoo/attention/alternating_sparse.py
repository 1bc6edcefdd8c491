"""Alternating sparse attention: layers that see a window and layers that see chosen blocks, in turn, both on latents.

    Backbone(dim, mixers=("asa_local", "asa_global") * 12)

Source: Hu et al., "Alternating Sparse Attention" (2511.00819), of which only the abstract could be read; multi-head
latent attention, DeepSeek-V2 (2405.04434), §2.1. What is ours stands in `kernels.alternating_sparse_attention`; so are
the sizes of a group's latent, 2 K: a pair of layers then caches half of what two native sparse ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from kernels.alternating_sparse_attention import (
    GlobalLatentCache,
    LocalLatentCache,
    global_latent_attention,
    global_latent_attention_step,
    global_latent_cache,
    local_latent_attention,
    local_latent_attention_step,
    local_latent_cache,
)
from kernels.split_latents import split_global_latent_attention, split_local_latent_attention
from zoo.attention.native_sparse import (
    BLOCKS,
    SELECTION,
    BlockCompression,
    check_blocks,
    closing_gaps,
    compress,
    sixteenth,
    stretch,
)
from zoo.attention.softmax import SPLIT_HEADS, SPLIT_IDS, group_count, prompt_length
from zoo.errors import ZooError
from zoo.layers.devices import Axes, over_time
from zoo.layers.mixer import Mixer, State, head_count
from zoo.layers.parameters import dense, fan_in, merge_heads, norm, partitioned, split_heads
from zoo.layers.rotary import BASE, rotate, times
from zoo.types import Array

TOKENS: Axes = (*SPLIT_IDS, None)


class Latent(Mixer):
    """What both layers share: queries [q; q_rope], one rotary key for all heads, latents, and the way through a call.

    heads          H; as many of 64 features as fit unless given, K = V = D / H
    latent         C features of a latent; 4 K in local layers, as in DeepSeek-V2, and 2 K in global ones unless given
    query_latent   features of the latent of queries; 12 K unless given, as in DeepSeek-V2, but at most D
    rope_width     R rotary features of a head, beside its K others; K / 2 rounded to an even number unless given, 0 is
                   none
    base           of the rotary angles
    latent_norm    RMS norms with a learned scale on latents of tokens and of queries (2405.04434, §3.1.2)

    Tokens that are not there are left out before windows and blocks are counted; a segment's blocks lie on the grid of
    the row.
    """

    heads: int | None = None
    latent: int | None = None
    query_latent: int | None = None
    rope_width: int | None = None
    base: float = BASE
    latent_norm: bool = True

    latent_ratio: ClassVar[int]
    """C / K unless given."""

    def setup(self) -> None:
        heads, width, rope = self.head_sizes()
        query_latent = min(12 * width, self.dim) if self.query_latent is None else self.query_latent
        if min(query_latent, self.latent_width()) < 1:
            got = f"latent {self.latent_width()} and query_latent {query_latent}"
            raise ZooError(f"{type(self).__name__}: got {got}, wanted at least 1")
        self.query_down = dense(query_latent, ("embed", None), dtype=self.dtype)
        self.query = split_heads(query_latent, heads, width, dtype=self.dtype)
        self.out = merge_heads(heads, width, self.dim, dtype=self.dtype)
        if self.latent_norm:
            self.query_norm = norm("rms", axis=None, dtype=self.dtype)
            self.norm = norm("rms", axis=None, dtype=self.dtype)
        if rope:
            self.query_rope = split_heads(query_latent, heads, rope, dtype=self.dtype)
            self.key_rope = dense(rope, ("embed", None), dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        arrays = self.projected(x, times(x.shape[1], segment_ids))
        return self.out(closing_gaps(self.mixed, arrays, segment_ids, mask))

    def initial_state(self, batch: int, capacity: int = 2048) -> State:
        nothing = jnp.zeros((batch, 0, self.dim), self.dtype)
        return self.remembered(self.projected(nothing, times(0, None)), None, capacity)

    def prefill(
        self, x: Float[Array, "B T D"], length: Int[Array, " B"] | None = None, capacity: int = 2048
    ) -> tuple[Float[Array, "B T D"], State]:
        """A prompt at once, see `Softmax.prefill`."""
        length = prompt_length(type(self).__name__, x, length, capacity)
        arrays = self.projected(x, times(x.shape[1], None))
        return self.out(self.mixed(arrays, None)), self.remembered(arrays, length, capacity)

    def step(self, x: Float[Array, "B D"], state: State) -> tuple[Float[Array, "B D"], State]:
        """One token. A row of a global layer whose cache is full gives NaN, and nothing is written."""
        token = self.projected(x[:, None], state.length[:, None])
        out, state = self.recalled({name: y[:, 0] for name, y in token.items()}, state)
        return self.out(out), state

    @nn.nowrap
    def head_sizes(self) -> tuple[int, int, int]:
        """(H, K, R). Raises ZooError where they do not divide."""
        heads = head_count(type(self).__name__, self.dim, self.heads)
        rope = max(2, self.dim // heads // 4 * 2) if self.rope_width is None else self.rope_width
        if rope < 0 or rope % 2:
            raise ZooError(f"{type(self).__name__}: rope_width: got {rope}, wanted an even number")
        return heads, self.dim // heads, rope

    @nn.nowrap
    def latent_width(self) -> int:
        """C."""
        return self.dim // self.head_sizes()[0] * self.latent_ratio if self.latent is None else self.latent

    def projected(self, x: Float[Array, "B T D"], positions: Array) -> dict[str, Any]:
        """q [B, T, H, K], latents [B, T, C] or [B, T, G, C], q_rope [B, T, H, R] and k_rope [B, T, R] if there are."""
        query, latents = self.query_down(x), self.latents(x)
        if self.latent_norm:
            query, latents = self.query_norm(query), self.norm(latents)
        arrays = {"q": self.query(query), "latents": latents}
        if self.head_sizes()[2]:
            arrays["q_rope"] = rotate(self.query_rope(query), positions, self.base)
            arrays["k_rope"] = rotate(self.key_rope(x)[:, :, None], positions, self.base)[:, :, 0]
        return arrays

    def latents(self, x: Array) -> Array:
        raise NotImplementedError

    def mixed(self, arrays: dict[str, Any], segment_ids: Array | None) -> Array:
        """`projected` → [B, T, H, V], each head's output. Tokens that are not there are left out by now."""
        raise NotImplementedError

    def recalled(self, token: dict[str, Any], state: State) -> tuple[Array, State]:
        """`mixed` of one token and the state with it."""
        raise NotImplementedError

    def remembered(self, arrays: dict[str, Any], length: Array | None, capacity: int) -> State:
        """The state after the tokens of `projected`, of which the first `length` [B] count."""
        raise NotImplementedError

    @nn.nowrap
    def on_devices(
        self,
        op: Callable[..., Array],
        arrays: dict[str, Any],
        axes: Mapping[str, Axes],
        segment_ids: Array | None,
        multiple: int,
    ) -> Array:
        """op(**arrays, axis=...), each device with its examples, heads and a stretch of a multiple of so many tokens.

        `axes` are those of arrays beside queries and rotary parts.
        """
        axes = {"q": SPLIT_HEADS, "q_rope": SPLIT_HEADS, "k_rope": TOKENS, "segment_ids": SPLIT_IDS, **axes}
        if segment_ids is not None:
            arrays = {**arrays, "segment_ids": segment_ids}
        names = tuple(arrays)
        return over_time(
            lambda *parts, axis: op(**dict(zip(names, parts, strict=True)), axis=axis),
            tuple(arrays.values()),
            tuple(axes[name] for name in names),
            SPLIT_HEADS,
            multiple,
        )


class LocalLatent(Latent):
    """Multi-head latent attention to the last `window` tokens: k = [up_k c; k_rope], v = up_v c of a token's latent c.

    window  in tokens, the query's own among them

    The other options are those of `Latent`. Streaming keeps the latents of `window` tokens, whatever the capacity.
    """

    window: int = 512

    latent_ratio = 4

    def setup(self) -> None:
        super().setup()
        if self.window < 1:
            raise ZooError(f"asa_local: window: got {self.window}, wanted at least 1")
        heads, width, _ = self.head_sizes()
        up = partitioned(fan_in((0,), (1, 2)), None, "heads", "head_width")
        self.down = dense(self.latent_width(), ("embed", None), dtype=self.dtype)
        self.up_key, self.up_value = (
            self.param(name, up, (self.latent_width(), heads, width)) for name in ("up_key", "up_value")
        )

    def latents(self, x: Array) -> Array:
        return self.down(x)

    def mixed(self, arrays: dict[str, Any], segment_ids: Array | None) -> Array:
        axes = {"latents": TOKENS, "up_k": (None, "heads", None), "up_v": (None, "heads", None)}

        def op(*, axis: str | None, **arrays: Any) -> Array:
            if axis is None:
                return local_latent_attention(**arrays, window=self.window)
            return split_local_latent_attention(**arrays, axis=axis, window=self.window)

        return self.on_devices(op, {**arrays, "up_k": self.up_key, "up_v": self.up_value}, axes, segment_ids, 1)

    def recalled(self, token: dict[str, Any], state: LocalLatentCache) -> tuple[Array, LocalLatentCache]:
        q, latent = token.pop("q"), token.pop("latents")
        return local_latent_attention_step(q, latent, state, self.up_key, self.up_value, **token)

    def remembered(self, arrays: dict[str, Any], length: Array | None, capacity: int) -> LocalLatentCache:
        return local_latent_cache(arrays["latents"], window=self.window, k_rope=arrays.get("k_rope"), length=length)


class GlobalLatent(Latent):
    """sigmoid(g_0) · attention to compressed blocks + sigmoid(g_1) · attention to selected ones, on latents of groups.

    Keys and values of a group's heads are up-projections of its latent; blocks are compressed as latents.

    kv_heads  G groups; H / 16 unless given, or a smaller divisor of H
    compression_block, stride, block_size, selected_blocks, initial, local, compress   as in `NativeSparse`

    The other options are those of `Latent`. Gates are one for each head and branch, a linear map of the input.
    """

    kv_heads: int | None = None
    compression_block: int = 32
    stride: int = 16
    block_size: int = 64
    selected_blocks: int = 16
    initial: int = 1
    local: int = 2
    compress: str = "mlp"

    latent_ratio = 2

    def setup(self) -> None:
        super().setup()
        check_blocks("asa_global", self)
        heads, width, _ = self.head_sizes()
        shape = (self.groups(), self.latent_width(), width)
        of_group = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", 1, 2, batch_axis=0)
        up = partitioned(of_group, "heads", None, "head_width")
        self.down = split_heads(self.dim, *shape[:2], dtype=self.dtype)
        self.up_key, self.up_value = (self.param(name, up, shape) for name in ("up_key", "up_value"))
        self.gate = split_heads(self.dim, heads, 2, dtype=self.dtype)
        self.compression = BlockCompression(self.compress, self.compression_block, *shape[:2])

    @nn.nowrap
    def groups(self) -> int:
        """G."""
        heads = self.head_sizes()[0]
        return group_count("asa_global", heads, sixteenth(heads) if self.kv_heads is None else self.kv_heads)

    def latents(self, x: Array) -> Array:
        return self.down(x)

    def projected(self, x: Float[Array, "B T D"], positions: Array) -> dict[str, Any]:
        gates = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
        return {**super().projected(x, positions), "gates": gates}

    @nn.nowrap
    def options(self, weights: tuple[Array, ...]) -> dict[str, Any]:
        """Of the kernel, with the weights of the compression."""
        sizes = {name: getattr(self, name) for name in (*BLOCKS, *SELECTION)}
        return {**sizes, "compress": partial(compress, self.compress, weights)}

    def mixed(self, arrays: dict[str, Any], segment_ids: Array | None) -> Array:
        weights = {f"weight_{n}": x for n, x in enumerate(self.compression())}
        axes = {
            "latents": SPLIT_HEADS,
            "gates": SPLIT_HEADS,
            "up_k": ("heads", None, None),
            "up_v": ("heads", None, None),
        }
        axes |= dict(zip(weights, self.compression.axes, strict=True))

        def op(*, axis: str | None, **arrays: Any) -> Array:
            options = self.options(tuple(arrays.pop(name) for name in weights))
            if axis is None:
                return global_latent_attention(**arrays, **options)
            return split_global_latent_attention(**arrays, axis=axis, **options)

        every = {**arrays, **weights, "up_k": self.up_key, "up_v": self.up_value}
        return self.on_devices(op, every, axes, segment_ids, stretch(self))

    def recalled(self, token: dict[str, Any], state: GlobalLatentCache) -> tuple[Array, GlobalLatentCache]:
        q, latent, gates = (token.pop(name) for name in ("q", "latents", "gates"))
        options = self.options(self.compression())
        return global_latent_attention_step(q, latent, gates, state, self.up_key, self.up_value, **token, **options)

    def remembered(self, arrays: dict[str, Any], length: Array | None, capacity: int) -> GlobalLatentCache:
        options = self.options(self.compression())
        kept = {name: option for name, option in options.items() if name not in SELECTION}
        k_rope = arrays.get("k_rope")
        return global_latent_cache(arrays["latents"], capacity=capacity, k_rope=k_rope, length=length, **kept)
