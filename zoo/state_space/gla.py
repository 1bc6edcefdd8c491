"""Gated linear attention: every key channel of the memory fades at a rate of its own that the token chooses.

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2312.06635), §4 and eq. 3;
sizes and the optional convolution as in the authors' fla (flash-linear-attention). Projections are drawn as everywhere
in the zoo. The parts that other memories of keys and values are made of stand here too.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels.linear_attention import linear_attention_step
from zoo.errors import ZooError
from zoo.layers.convolution import ShortConvolution
from zoo.layers.devices import linear_attention
from zoo.layers.mixer import Mixer
from zoo.layers.parameters import dense, fan_in, merge_heads, norm, partitioned, split_heads
from zoo.types import Array

EPSILON = 1e-5
"""Of the norm of what is read."""
GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """What a recurrence over keys and values remembers."""

    state: Array
    """[B, H, K, V] float32"""
    windows: tuple[Array, ...]
    """The last tokens of the short convolutions, [B, W, H · K] or [B, W, H · V], where there are any."""


class GLA(Mixer):
    """S_t = diag(exp(g_t)) S_{t−1} + k_t v_tᵀ; out_t = S_tᵀ q_t / √K, with g_t = logsigmoid(W_up W_down x_t + b) / 16.

    What is read is normalised by head, gated by W_g x_t and projected.

    heads           H
    expand_key      H · K / D
    expand_value    V / K
    rank            of the decay's projection
    temperature     what logsigmoid is divided by: the larger, the slower the memory fades
    lowest_decay    g_t is at least this; not bounded unless given
    convolution     tokens that a short convolution, then a SiLU, over q, k and v sees; 0 leaves both out
    gate            of what is read: "silu", "sigmoid" or "none"
    """

    heads: int = 4
    expand_key: float = 0.5
    expand_value: float = 2.0
    rank: int = 16
    temperature: float = 16.0
    lowest_decay: float | None = None
    convolution: int = 0
    gate: str = "silu"

    def setup(self) -> None:
        heads, key_width, value_width = self.sizes()
        self.project = QueryKeyValue(
            self.dim, heads, heads, key_width, value_width, self.convolution, self.convolution > 0, dtype=self.dtype
        )
        self.decay = LowRank(self.rank, heads, key_width, bias=True, dtype=self.dtype)
        self.read_out = ReadOut(self.dim, heads, value_width, self.gate, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        q, k, v = self.project(x, segment_ids, mask)
        log_decay = self._log_decay(x)
        if mask is not None:
            there = mask[..., None, None]
            k, log_decay = jnp.where(there, k, 0), jnp.where(there, log_decay, 0)
        read, _ = linear_attention(q, k, v, log_decay=log_decay, segment_ids=segment_ids)
        return self.read_out(read, x)

    def initial_state(self, batch: int, capacity: int = 2048) -> Memory:
        return Memory(jnp.zeros((batch, *self.sizes()), jnp.float32), self.project.initial_state(batch))

    def step(self, x: Float[Array, "B D"], state: Memory) -> tuple[Float[Array, "B D"], Memory]:
        (q, k, v), windows = self.project.step(x, state.windows)
        read, after = linear_attention_step(q, k, v, state.state, log_decay=self._log_decay(x))
        return self.read_out(read, x), Memory(after, windows)

    @nn.nowrap
    def sizes(self) -> tuple[int, int, int]:
        """(H, K, V). Raises ZooError where they are no whole numbers."""
        return head_sizes("gla", self.dim, self.heads, self.expand_key, self.expand_value)

    def _log_decay(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead H K"]:
        log_decay = jax.nn.log_sigmoid(self.decay(x).astype(jnp.float32)) / self.temperature
        return log_decay if self.lowest_decay is None else jnp.maximum(log_decay, self.lowest_decay)


class QueryKeyValue(nn.Module):
    """Tokens [B, T, D] → queries and keys [B, T, H, K] and values [B, T, G, V].

    convolution  tokens that a short convolution over each of the three sees; 0 leaves it out
    silu         whether the three end in a SiLU
    """

    dim: int
    heads: int
    value_heads: int
    key_width: int
    value_width: int
    convolution: int = 0
    silu: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        key, value = (self.heads, self.key_width), (self.value_heads, self.value_width)
        self.query, self.key, self.value = (
            split_heads(self.dim, *each, dtype=self.dtype) for each in (key, key, value)
        )
        if self.convolution:
            self.convolutions = [
                ShortConvolution(heads * width, self.convolution, dtype=self.dtype)
                for heads, width in (key, key, value)
            ]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T G V"]]:
        parts = self._projected(x)
        if self.convolution:
            parts = [
                convolve(part.reshape(*x.shape[:2], -1), segment_ids=segment_ids, mask=mask).reshape(part.shape)
                for convolve, part in zip(self.convolutions, parts, strict=True)
            ]
        return self._activated(parts)

    def initial_state(self, batch: int) -> tuple[Array, ...]:
        """What the convolutions remember before the first token."""
        return tuple(each.initial_state(batch) for each in self.convolutions) if self.convolution else ()

    def step(
        self, x: Float[Array, "B D"], windows: tuple[Array, ...]
    ) -> tuple[tuple[Float[Array, "B H K"], Float[Array, "B H K"], Float[Array, "B G V"]], tuple[Array, ...]]:
        """One token and the new windows of the convolutions."""
        parts = self._projected(x)
        if self.convolution:
            after = []
            for n, part in enumerate(parts):
                out, window = self.convolutions[n].step(part.reshape(len(x), -1), windows[n])
                parts[n] = out.reshape(part.shape)
                after.append(window)
            windows = tuple(after)
        return self._activated(parts), windows

    def _projected(self, x: Float[Array, "*lead D"]) -> list[Array]:
        return [self.query(x), self.key(x), self.value(x)]

    def _activated(self, parts: list[Array]) -> tuple[Array, Array, Array]:
        q, k, v = (jax.nn.silu(part) for part in parts) if self.silu else parts
        return q, k, v


class LowRank(nn.Module):
    """[..., D] → `rank` → [..., H, K], nothing between the two matrices; the bias is the second's."""

    rank: int
    heads: int
    width: int
    bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead H K"]:
        inner = dense(self.rank, ("embed", None), dtype=self.dtype, name="down")(x)
        up = nn.Einsum(
            (self.rank, self.heads, self.width),
            "...r,rhk->...hk",
            use_bias=self.bias,
            kernel_init=partitioned(fan_in((0,), (1, 2)), None, "heads", "head_width"),
            bias_init=partitioned(nn.initializers.zeros, "heads", "head_width"),
            dtype=self.dtype,
            name="up",
        )
        return up(inner)


class ReadOut(nn.Module):
    """What heads read [..., H, V] and the tokens themselves [..., D] → [..., D].

    An RMS norm, the gate's product, a projection. The norm's scale is learned, as in fla.

    gate   "silu" or "sigmoid" of W x, or "none"
    rank   of W; 0 is full
    bias   of W
    joint  one norm over all heads, with H · V scales, instead of one for each with V shared ones
    """

    dim: int
    heads: int
    width: int
    gate: str = "silu"
    rank: int = 0
    bias: bool = False
    joint: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        if self.gate not in ("none", *GATES):
            raise ZooError(f"gate is silu, sigmoid or none, got {self.gate!r}")
        self.norm = norm("rms", epsilon=EPSILON, axis="mlp" if self.joint else "head_width", dtype=self.dtype)
        if self.gate != "none":
            self.gating: nn.Module = (
                LowRank(self.rank, self.heads, self.width, self.bias, dtype=self.dtype)
                if self.rank
                else split_heads(self.dim, self.heads, self.width, bias=self.bias, dtype=self.dtype)
            )
        self.out = merge_heads(self.heads, self.width, self.dim, dtype=self.dtype)

    def __call__(self, read: Float[Array, "*lead H V"], x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        normed = read.reshape(*read.shape[:-2], -1) if self.joint else read
        read = self.norm(normed).reshape(read.shape)
        if self.gate != "none":
            read = read * GATES[self.gate](self.gating(x))
        return self.out(read)


def head_sizes(mixer: str, dim: int, heads: int, expand_key: float, expand_value: float) -> tuple[int, int, int]:
    """(H, K, V) for H · K = expand_key · D and V = expand_value · K.

    Raises ZooError where they are no whole numbers.
    """
    key_width = expand_key * dim / heads if heads > 0 else 0.0
    value_width = expand_value * key_width
    if key_width < 1 or value_width < 1 or key_width % 1 or value_width % 1:
        raise ZooError(
            f"{mixer}: dim {dim}, {heads} heads, expand_key {expand_key} and expand_value {expand_value} give heads of "
            f"{key_width:g} and {value_width:g} features, wanted whole numbers"
        )
    return heads, int(key_width), int(value_width)
