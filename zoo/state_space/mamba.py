"""Mamba's mixer: a short convolution, then a scan whose steps, inputs and read-outs are made from the tokens.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2312.00752), §3.2, algorithm 2
and figure 3; sizes and initial values as in state-spaces/mamba (`mamba_simple.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from kernels.selective_scan import selective_scan, selective_scan_step
from kernels.sequence import split_selective_scan
from zoo.errors import ZooError
from zoo.layers.convolution import ShortConvolution
from zoo.layers.devices import over_time
from zoo.layers.mixer import Mixer
from zoo.layers.parameters import LIKE_TORCH, dense, partitioned
from zoo.types import Array

STEP_FLOOR = 1e-4
"""No step is smaller when parameters are drawn."""
OVER_TIME, SHARED = ("batch", "tokens", "mlp"), ("batch", "tokens", None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MambaState:
    """What Mamba remembers."""

    window: Array
    """[B, width − 1, F], what the convolution still sees"""
    scan: Array
    """[B, F, N] float32"""


def inverse_softplus_of_steps(smallest: float, largest: float) -> Any:
    """Initialiser of b such that softplus(b) is log-uniform between two steps, and at least STEP_FLOOR."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        low, high = math.log(smallest), math.log(largest)
        step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), STEP_FLOOR)
        return step + jnp.log(-jnp.expm1(-step))

    return init


def log_of_counts(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """log(1), …, log(N) along the last axis: decays of S4D-Real (2206.11893)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


class Mamba(Mixer):
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t; out = W_out ((C_t · h_t + D u_t) ⊙ silu(z_t)), with u = silu(conv(W x)).

    Each of F = expand · D features has N states. Δ_t = softplus(a map of rank R of u_t), B_t and C_t linear maps of
    u_t, A = −exp(A_log). Input and gate z are one matrix in the official code, two here, so that each splits over
    devices. A token that is not there has Δ = 0.

    states   N
    expand   F / D
    width    tokens that the convolution sees
    rank     R; D / 16, rounded up, unless given
    steps    smallest and largest Δ that the bias is drawn for
    """

    states: int = 16
    expand: int = 2
    width: int = 4
    rank: int | None = None
    steps: tuple[float, float] = (1e-3, 0.1)

    def setup(self) -> None:
        if not 0 < self.steps[0] <= self.steps[1]:
            raise ZooError(f"mamba: steps: got {self.steps}, wanted 0 < smallest <= largest")
        inner, rank = self.expand * self.dim, self.step_rank()
        self.input = dense(inner, init=LIKE_TORCH, dtype=self.dtype)
        self.gate = dense(inner, init=LIKE_TORCH, dtype=self.dtype)
        self.convolution = ShortConvolution(inner, self.width, bias=True, dtype=self.dtype)
        self.selection = dense(rank + 2 * self.states, ("mlp", None), init=LIKE_TORCH, dtype=self.dtype)
        # Uniform in ±rank^-½, which is PyTorch's default too.
        self.step_map = dense(inner, (None, "mlp"), init=LIKE_TORCH, dtype=self.dtype)
        self.step_bias = self.param("step_bias", partitioned(inverse_softplus_of_steps(*self.steps), "mlp"), (inner,))
        self.A_log = self.param("A_log", partitioned(log_of_counts, "mlp", None), (inner, self.states))
        self.D = self.param("D", partitioned(nn.initializers.ones, "mlp"), (inner,))
        self.out = dense(self.dim, ("mlp", "embed"), init=LIKE_TORCH, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        u = jax.nn.silu(self.convolution(self.input(x), segment_ids=segment_ids, mask=mask))
        delta, B, C = self._selected(u)
        if mask is not None:
            delta = jnp.where(mask[..., None], delta, 0)
        ids = () if segment_ids is None else (segment_ids,)

        def op(*arrays: Array, axis: str | None) -> Array:
            own = arrays[6] if ids else None
            if axis is None:
                return selective_scan(*arrays[:6], segment_ids=own)[0]
            return split_selective_scan(*arrays[:6], axis=axis, segment_ids=own)

        axes = (OVER_TIME, OVER_TIME, ("mlp", None), SHARED, SHARED, ("mlp",), *(OVER_TIME[:2],) * len(ids))
        y = over_time(op, (u, delta, -jnp.exp(self.A_log), B, C, self.D, *ids), axes, OVER_TIME)
        return self.out(y * jax.nn.silu(self.gate(x)))

    def initial_state(self, batch: int, capacity: int = 2048) -> MambaState:
        scan = jnp.zeros((batch, self.expand * self.dim, self.states), jnp.float32)
        return MambaState(self.convolution.initial_state(batch), scan)

    def step(self, x: Float[Array, "B D"], state: MambaState) -> tuple[Float[Array, "B D"], MambaState]:
        u, window = self.convolution.step(self.input(x), state.window)
        u = jax.nn.silu(u)
        delta, B, C = self._selected(u)
        y, scan = selective_scan_step(u, delta, -jnp.exp(self.A_log), B, C, state.scan, self.D)
        return self.out(y * jax.nn.silu(self.gate(x))), MambaState(window, scan)

    @nn.nowrap
    def step_rank(self) -> int:
        """R."""
        return -(-self.dim // 16) if self.rank is None else self.rank

    def _selected(self, u: Float[Array, "*lead F"]) -> tuple[Array, Array, Array]:
        """Δ [*lead, F] in float32, B and C [*lead, N] of tokens."""
        rank = self.step_rank()
        step, B, C = jnp.split(self.selection(u), (rank, rank + self.states), axis=-1)
        return jax.nn.softplus(self.step_map(step).astype(jnp.float32) + self.step_bias), B, C
