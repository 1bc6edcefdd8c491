"""Causal Grassmann mixing: pairs of tokens as planes, read by their Plücker coordinates.

Source: Zhang Chong, "Attention Is Not What You Need" (2512.19428), §3, its causal mixing layer; read through public
re-implementations that name its steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from kernels.decoding import taken, written
from kernels.packing import runs
from zoo.errors import ZooError
from zoo.layers.mixer import Mixer
from zoo.layers.parameters import dense, norm
from zoo.types import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GrassmannState:
    """The reduced tokens that offsets still reach."""

    z: Array
    """[B, S, r] float32: a ring of S = the largest offset"""
    length: Array
    """[B] int32, how many tokens have come"""


def plucker(a: Float[Array, "*lead r"], b: Float[Array, "*lead r"], epsilon: float) -> Float[Array, "*lead p"]:
    """a_i b_j − a_j b_i for i < j, r (r − 1) / 2 of them, divided by their norm: the plane that a and b span.

    The norm is √(‖p‖² + ε²), whose gradient is finite where a and b are parallel.
    """
    i, j = np.triu_indices(a.shape[-1], 1)
    p = a[..., i] * b[..., j] - a[..., j] * b[..., i]
    return p * jax.lax.rsqrt(jnp.sum(p * p, axis=-1, keepdims=True) + epsilon**2)


class Grassmann(Mixer):
    """z_t = W_r h_t + b_r; g_t = mean over offsets Δ of (W_p p̂(z_t, z_{t−Δ}) + b_p);
    α_t = σ(W_g [h_t, g_t] + b_g); out_t = LN(α_t ⊙ h_t + (1 − α_t) ⊙ g_t).

    The mean is over those offsets whose token is there and of the same segment; g_t = 0 where none is. W_p is one for
    all offsets, so the coordinates are averaged before it. They are differences of products that cancel: z is float32.

    width    r
    offsets  Δ
    fusion   "blend" as above, "residual" h_t + α_t ⊙ g_t
    epsilon  of the coordinates' norm. The source's 1e-8 is below rounding: tokens that are parallel but for it get a
             plane all the same, and gradients through equal ones grow to 1 / ε. Where signals are flat, 1e-3 is safer
    dropout  rate, after the last norm
    """

    width: int = 32
    offsets: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    fusion: str = "blend"
    epsilon: float = 1e-8
    dropout: float = 0.0

    def setup(self) -> None:
        if self.fusion not in ("blend", "residual"):
            raise ZooError(f"grassmann: fusion is blend or residual, got {self.fusion!r}")
        if not self.offsets or min(self.offsets) < 1 or self.width < 2:
            raise ZooError(f"grassmann: got offsets {self.offsets} and width {self.width}, wanted from 1 and from 2 on")
        self.reduce = dense(self.width, ("embed", None), bias=True, dtype=self.dtype)
        self.lift = dense(self.dim, (None, "embed"), bias=True, dtype=self.dtype)
        self.gate = dense(self.dim, (None, "embed"), bias=True, dtype=self.dtype)
        self.norm = norm("layer", epsilon=1e-5, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        z = self.reduce(x).astype(jnp.float32)
        run = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else runs(segment_ids)
        partner = run if mask is None else jnp.where(mask, run, -1)
        total, count = jnp.zeros(()), jnp.zeros(x.shape[:2], jnp.int32)
        for offset in self.offsets:
            earlier = _shifted(z, offset, 0)
            valid = _shifted(partner, offset, -1) == run
            total += jnp.where(valid[..., None], plucker(z, earlier, self.epsilon), 0)
            count += valid
        return self._fused(x, total, count, train)

    def initial_state(self, batch: int, capacity: int = 2048) -> GrassmannState:
        ring = jnp.zeros((batch, max(self.offsets), self.width), jnp.float32)
        return GrassmannState(ring, jnp.zeros(batch, jnp.int32))

    def step(self, x: Float[Array, "B D"], state: GrassmannState) -> tuple[Float[Array, "B D"], GrassmannState]:
        z = self.reduce(x).astype(jnp.float32)
        time, size = state.length, state.z.shape[1]
        wanted = time[:, None] - jnp.asarray(self.offsets)
        earlier = taken(state.z, wanted % size)
        planes = plucker(jnp.broadcast_to(z[:, None], earlier.shape), earlier, self.epsilon)
        valid = wanted >= 0
        total = jnp.sum(jnp.where(valid[..., None], planes, 0), axis=1)
        out = self._fused(x, total, jnp.sum(valid, axis=1), False)
        return out, GrassmannState(written(state.z, z, time % size), time + 1)

    def _fused(
        self, h: Float[Array, "*lead D"], total: Float[Array, "*lead p"], count: Int[Array, "*lead"], train: bool
    ) -> Float[Array, "*lead D"]:
        """Output of tokens, the sum of their planes' coordinates and how many they are."""
        count = count[..., None]
        mean = total / jnp.maximum(count, 1)
        g = jnp.where(count > 0, self.lift(mean), 0)
        h = h.astype(self.dtype)
        alpha = jax.nn.sigmoid(self.gate(jnp.concatenate([h, g], axis=-1)))
        mixed = alpha * h + (1 - alpha) * g if self.fusion == "blend" else h + alpha * g
        return self.drop(self.norm(mixed), deterministic=not train)


def _shifted(x: Float[Array, "B T *F"] | Int[Array, "B T"], offset: int, fill: int) -> Array:
    """x of `offset` tokens before; `fill` before the first."""
    pad = ((0, 0), (offset, 0), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, pad, constant_values=fill)[:, : x.shape[1]]
