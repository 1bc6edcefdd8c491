"""Mamba-2's mixer: a state that fades by one factor a token and head, so that it is linear attention with a decay.

Source: Dao and Gu, "Transformers are SSMs" (2405.21060), §5–7; sizes and initial values as in state-spaces/mamba
(`mamba2.py`). A whole block: in a backbone it goes with mlp="none".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from kernels.linear_attention import linear_attention_step
from zoo.errors import ZooError
from zoo.layers.convolution import ShortConvolution
from zoo.layers.devices import linear_attention
from zoo.layers.mixer import Mixer, head_count
from zoo.layers.parameters import LIKE_TORCH, dense, partitioned
from zoo.state_space.mamba import inverse_softplus_of_steps
from zoo.types import Array

EPSILON = 1e-5
"""Of the norm before the last projection."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mamba2State:
    """What Mamba-2 remembers."""

    state: Array
    """[B, H, N, P] float32"""
    windows: tuple[Array, Array, Array]
    """The last width − 1 tokens of x [B, W, H · P], B and C [B, W, G · N], which the convolution still sees."""


def log_of_uniform(low: float, high: float) -> Any:
    """Initialiser: the logarithm of what is uniform between the two."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init


class Mamba2(Mixer):
    """S_t = exp(Δ_t A) S_{t−1} + Δ_t B_t x_tᵀ; y_t = S_tᵀ C_t + D x_t; out = W_out rms(y ⊙ silu(z)).

    x, B and C are projections after a convolution and a SiLU, z is one without. Each of H heads has P features, one
    A = −exp(A_log), one D and one Δ_t = softplus(w · token + b) a token. All projections are one matrix in the official
    code, here one each, so that each splits over devices, and so is the convolution. Its bias is zero at first,
    exp(A_log) is uniform in `rates`, softplus(b) log-uniform in `steps`, D is 1. A token that is not there has Δ = 0.

    states       N
    expand       H · P / D
    heads        H; as many of about 64 features as fit unless given
    groups       G pairs of B and C, each for H / G heads, and as many norms. Where devices split heads but G does not
                 divide among them, each works on all heads
    width        tokens that the convolution sees
    rates        that A is drawn from
    steps        smallest and largest Δ that the bias is drawn for
    step_limits  Δ_t is kept between them
    """

    states: int = 128
    expand: int = 2
    heads: int | None = None
    groups: int = 1
    width: int = 4
    rates: tuple[float, float] = (1.0, 16.0)
    steps: tuple[float, float] = (1e-3, 0.1)
    step_limits: tuple[float, float] = (0.0, math.inf)

    def setup(self) -> None:
        for option in ("rates", "steps"):
            low, high = getattr(self, option)
            if not 0 < low <= high:
                raise ZooError(f"mamba2: {option}: got {(low, high)}, wanted 0 < smallest <= largest")
        heads, inner, selected = self.head_total(), self.expand * self.dim, self.groups * self.states
        self.input = dense(inner, init=LIKE_TORCH, dtype=self.dtype)
        self.gate = dense(inner, init=LIKE_TORCH, dtype=self.dtype)
        self.B, self.C = (dense(selected, ("embed", None), init=LIKE_TORCH, dtype=self.dtype) for _ in "BC")
        self.step_map = dense(heads, ("embed", "heads"), init=LIKE_TORCH, dtype=self.dtype)
        self.convolutions = [
            ShortConvolution(size, self.width, bias=True, dtype=self.dtype) for size in (inner, selected, selected)
        ]
        self.step_bias = self.param("step_bias", partitioned(inverse_softplus_of_steps(*self.steps), "heads"), (heads,))
        self.A_log = self.param("A_log", partitioned(log_of_uniform(*self.rates), "heads"), (heads,))
        self.D = self.param("D", partitioned(nn.initializers.ones, "heads"), (heads,))
        self.norm_scale = self.param("norm_scale", partitioned(nn.initializers.ones, "mlp"), (inner,))
        self.out = dense(self.dim, ("mlp", "embed"), init=LIKE_TORCH, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        inner, B, C = (
            jax.nn.silu(convolve(part, segment_ids=segment_ids, mask=mask))
            for convolve, part in zip(self.convolutions, self._convolved(x), strict=True)
        )
        delta = self._delta(x)
        if mask is not None:
            delta = jnp.where(mask[..., None], delta, 0)
        u, B, C = self._by_head(inner, B, C)
        log_decay = -delta * jnp.exp(self.A_log)
        added = (delta[..., None] * u).astype(self.dtype)
        y, _ = linear_attention(C, B, added, log_decay=log_decay, scale=1.0, segment_ids=segment_ids)
        return self._read_out(y, u, x)

    def initial_state(self, batch: int, capacity: int = 2048) -> Mamba2State:
        heads = self.head_total()
        state = jnp.zeros((batch, heads, self.states, self.expand * self.dim // heads), jnp.float32)
        x, B, C = (each.initial_state(batch) for each in self.convolutions)
        return Mamba2State(state, (x, B, C))

    def step(self, x: Float[Array, "B D"], state: Mamba2State) -> tuple[Float[Array, "B D"], Mamba2State]:
        stepped = [
            convolve.step(part, window)
            for convolve, part, window in zip(self.convolutions, self._convolved(x), state.windows, strict=True)
        ]
        (inner, inner_window), (B, B_window), (C, C_window) = stepped
        u, B, C = self._by_head(jax.nn.silu(inner), jax.nn.silu(B), jax.nn.silu(C))
        delta = self._delta(x)
        log_decay = -delta * jnp.exp(self.A_log)
        added = (delta[..., None] * u).astype(self.dtype)
        y, after = linear_attention_step(C, B, added, state.state, log_decay=log_decay, scale=1.0)
        return self._read_out(y, u, x), Mamba2State(after, (inner_window, B_window, C_window))

    @nn.nowrap
    def head_total(self) -> int:
        """H. Raises ZooError where features do not divide into heads, or heads into groups."""
        heads = head_count("mamba2", self.expand * self.dim, self.heads, 64)
        if self.groups < 1 or heads % self.groups:
            raise ZooError(f"mamba2: {heads} heads do not divide into {self.groups} groups")
        return heads

    def _convolved(self, x: Float[Array, "*lead D"]) -> tuple[Array, Array, Array]:
        """What goes into the convolutions: x, B and C."""
        return self.input(x), self.B(x), self.C(x)

    def _by_head(self, x: Array, B: Array, C: Array) -> tuple[Array, Array, Array]:
        """x [*lead, H, P], B and C [*lead, G, N]."""
        lead, groups = x.shape[:-1], (self.groups, self.states)
        return x.reshape(*lead, self.head_total(), -1), B.reshape(*lead, *groups), C.reshape(*lead, *groups)

    def _delta(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead H"]:
        delta = jax.nn.softplus(self.step_map(x).astype(jnp.float32) + self.step_bias)
        return jnp.clip(delta, *self.step_limits)

    def _read_out(
        self, y: Float[Array, "*lead H P"], u: Float[Array, "*lead H P"], x: Float[Array, "*lead D"]
    ) -> Float[Array, "*lead D"]:
        y = y + self.D[:, None].astype(self.dtype) * u
        gated = y.reshape(*x.shape[:-1], -1) * jax.nn.silu(self.gate(x))
        groups = gated.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        normed = groups * jax.lax.rsqrt(jnp.mean(groups * groups, axis=-1, keepdims=True) + EPSILON)
        return self.out((normed.reshape(gated.shape) * self.norm_scale).astype(self.dtype))
