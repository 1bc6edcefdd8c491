"""Griffin's recurrent block: a gated branch beside a convolution and a diagonal recurrence whose decay is gated.

Source: De et al., "Griffin" (2402.19427), §2.4 (eq. 1–4) and appendix B (complex states); initial values, the bound on
the gradient of the square root and what happens at the start of a sequence as in google-deepmind/recurrentgemma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from kernels.linear_scan import linear_scan_step
from kernels.packing import starts
from zoo.errors import ZooError
from zoo.layers.convolution import ShortConvolution
from zoo.layers.devices import linear_scan
from zoo.layers.mixer import Mixer
from zoo.layers.parameters import dense, partitioned
from zoo.types import Array

SHARPNESS = 8.0
"""c of eq. 3: the decay is (its parameter) to the power c · gate."""
LARGEST_RADIUS = 0.999
LARGEST_ANGLE = 0.1 * math.pi
STEEPEST = 1000.0
"""Largest gradient of the square root."""
NORMAL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RGLRUState:
    """What the recurrent block remembers."""

    window: Array
    """[B, width − 1, F], what the convolution still sees"""
    hidden: Array
    """[B, F] float32, or [B, F / 2] complex64"""
    begun: Array
    """[B] bool: a token has come"""


@jax.custom_jvp
def bounded_sqrt(x: Array) -> Array:
    """√x, its gradient at most STEEPEST."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = jnp.sqrt(primals[0])
    return root, tangents[0] / jnp.maximum(2 * root, 1 / STEEPEST)


def first_there(shape: tuple[int, ...], segment_ids: Array | None, mask: Array | None) -> Bool[Array, "B T"]:
    """[B, T]: True at each segment's first token that is there."""
    ids = jnp.zeros(shape, jnp.int32) if segment_ids is None else segment_ids
    begin = starts(ids).at[:, 0].set(True)
    if mask is None:
        return begin
    before = jnp.cumsum(mask, axis=1) - mask
    before_segment = jax.lax.cummax(jnp.where(begin, before, 0), axis=1)
    return mask & (before == before_segment)


def decay_init(smallest_radius: float) -> Any:
    """Initialiser of Λ such that exp(−softplus(Λ)) lies uniformly in the area of a ring."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        area = jax.random.uniform(key, shape, dtype, smallest_radius**2, LARGEST_RADIUS**2)
        return jnp.log(jnp.expm1(-0.5 * jnp.log(area)))

    return init


def angle_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, 0.0, LARGEST_ANGLE)


class BlockDiagonal(nn.Module):
    """[..., F] → [..., G]: `blocks` maps with biases, each from its own share of the features."""

    features: int
    outputs: int
    blocks: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*lead F"]) -> Float[Array, "*lead G"]:
        shape = (self.blocks, self.features // self.blocks, self.outputs // self.blocks)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        kernel = self.param("kernel", partitioned(init, "heads", None, None), shape)
        bias = self.param("bias", partitioned(nn.initializers.zeros, "heads", None), (shape[0], shape[2]))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.einsum("...hi,hij->...hj", x.reshape(*x.shape[:-1], *shape[:2]), kernel) + bias
        return y.reshape(*x.shape[:-1], self.outputs)


class RGLRU(Mixer):
    """out = W_out (gelu(W_1 x) ⊙ h), with the real-gated linear recurrent unit on u = conv(W_2 x):

    r_t = σ(W_a u_t + b_a), i_t = σ(W_i u_t + b_i), log a_t = −8 r_t softplus(Λ),
    h_t = a_t h_{t−1} + √(1 − a_t²) (i_t ⊙ u_t); the first token enters whole, without the root.

    All maps have biases. Gates and states are float32.

    heads     blocks of the diagonal maps W_a and W_i
    features  F, width of the recurrence; 4/3 · D, rounded up to what blocks divide, unless given
    width     tokens that the convolution sees
    real      False makes states complex, F / 2 of them: the first half of u is real parts, the second imaginary ones,
              and log a_t has the imaginary part r_t θ
    radius    smallest exp(−softplus(Λ)) when drawn; the largest is 0.999
    """

    heads: int = 16
    features: int | None = None
    width: int = 4
    real: bool = True
    radius: float = 0.9

    def setup(self) -> None:
        parts = 1 if self.real else 2
        shares = self.heads * parts
        if shares < 1:
            raise ZooError(f"rg_lru: heads: got {self.heads}, wanted at least 1")
        features = -(-4 * self.dim // (3 * shares)) * shares if self.features is None else self.features
        if features % shares:
            raise ZooError(f"rg_lru: features: got {features}, wanted a multiple of {shares}")
        states = features // parts
        if not 0 < self.radius < LARGEST_RADIUS:
            raise ZooError(f"rg_lru: radius: got {self.radius}, wanted more than 0 and less than {LARGEST_RADIUS}")
        self.gate = dense(features, bias=True, init=NORMAL, dtype=self.dtype)
        self.input = dense(features, bias=True, init=NORMAL, dtype=self.dtype)
        self.convolution = ShortConvolution(
            features, self.width, True, nn.initializers.variance_scaling(0.01, "fan_in", "normal"), self.dtype
        )
        self.decay_gate, self.input_gate = (
            BlockDiagonal(features, states, self.heads, dtype=self.dtype) for _ in range(2)
        )
        self.decay = self.param("decay", partitioned(decay_init(self.radius), "mlp"), (states,))
        if not self.real:
            self.angle = self.param("angle", partitioned(angle_init, "mlp"), (states,))
        self.out = dense(self.dim, ("mlp", "embed"), bias=True, init=NORMAL, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        u = self.convolution(self.input(x), segment_ids=segment_ids, mask=mask)
        log_decay, added = self._gated(u, first_there(x.shape[:2], segment_ids, mask))
        if mask is not None:
            log_decay, added = (jnp.where(mask[..., None], each, 0) for each in (log_decay, added))
        hidden, _ = linear_scan(added, log_decay, segment_ids=segment_ids)
        return self._read_out(x, hidden)

    def initial_state(self, batch: int, capacity: int = 2048) -> RGLRUState:
        hidden = jnp.zeros((batch, *self.decay.shape), jnp.float32 if self.real else jnp.complex64)
        return RGLRUState(self.convolution.initial_state(batch), hidden, jnp.zeros(batch, bool))

    def step(self, x: Float[Array, "B D"], state: RGLRUState) -> tuple[Float[Array, "B D"], RGLRUState]:
        u, window = self.convolution.step(self.input(x), state.window)
        log_decay, added = self._gated(u, ~state.begun)
        hidden, new = linear_scan_step(added, log_decay, state.hidden)
        return self._read_out(x, hidden), RGLRUState(window, new, jnp.ones_like(state.begun))

    def _gated(self, u: Float[Array, "*lead F"], first: Bool[Array, "*lead"]) -> tuple[Array, Array]:
        """Log decays and what enters the states [*lead, F or F/2], float32 or complex64."""
        r, i = (jax.nn.sigmoid(gate(u).astype(jnp.float32)) for gate in (self.decay_gate, self.input_gate))
        log_decay: Array = -SHARPNESS * r * jax.nn.softplus(self.decay)
        entering = jnp.where(first[..., None], 1.0, bounded_sqrt(-jnp.expm1(2 * log_decay)))
        u = u.astype(jnp.float32)
        if not self.real:
            u = jax.lax.complex(*jnp.split(u, 2, axis=-1))
            log_decay = jax.lax.complex(log_decay, r * self.angle)
        return log_decay, entering * i * u

    def _read_out(self, x: Float[Array, "*lead D"], hidden: Array) -> Float[Array, "*lead D"]:
        if not self.real:
            hidden = jnp.concatenate([hidden.real, hidden.imag], axis=-1)
        return self.out(jax.nn.gelu(self.gate(x)) * hidden.astype(self.dtype))
