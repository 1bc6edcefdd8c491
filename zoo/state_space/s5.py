"""S5: one diagonal linear system in continuous time that all features share.

Source: Smith, Warrington and Linderman, "Simplified State Space Layers for Sequence Modeling" (2208.04933): §3, initial
values in §3.3 and appendix B.1, the layer around it in appendix G.1; as in lindermanlab/S5 (`ssm.py`, `layers.py`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Complex, Float, Int

from kernels.linear_scan import linear_scan_step
from zoo.errors import ZooError
from zoo.layers.devices import linear_scan
from zoo.layers.mixer import Mixer
from zoo.layers.parameters import dense, partitioned
from zoo.state_space.s4d import DISCRETIZATIONS, as_complex, check_time, hippo_normal, log_uniform, pairs
from zoo.types import Array

SLOWEST = 1e-4
"""Least decay that clipping leaves."""


class S5(Mixer):
    """x_t = Λ̄_t x_{t−1} + B̄_t u_t, y_t = 2 Re(C x_t) + D ⊙ u_t; out = g ⊙ σ(W g + b) with g = gelu(y).

    States are complex, and each has its own step Δ. Λ starts as the eigenvalues of blocks of HiPPO-N, B and C as random
    matrices turned into their eigenvectors' coordinates.

    states          P, all of them; D unless given
    blocks          of HiPPO-N, each of P / blocks
    conjugate       keeps one state of each conjugate pair, hence the factor 2; False keeps all, with factor 1
    discretization  zoh or bilinear
    negative        how the real part of Λ is kept below 0: "clip" at −1e-4, or "exp" of a parameter
    steps           smallest and largest Δ that are drawn
    rate            multiplies Δ: the time between samples over that in training
    causal          False also runs the system backwards, and C reads both states
    """

    states: int | None = None
    blocks: int = 8
    conjugate: bool = True
    discretization: str = "zoh"
    negative: str = "clip"
    steps: tuple[float, float] = (1e-3, 0.1)
    rate: float = 1.0

    ways = (True, False)

    def setup(self) -> None:
        whole = self.dim if self.states is None else self.states
        if self.blocks < 1 or whole % self.blocks or (self.conjugate and whole // self.blocks % 2):
            raise ZooError(f"s5: {whole} states do not divide into {self.blocks} blocks of conjugate pairs")
        if self.negative not in ("clip", "exp"):
            raise ZooError(f"s5: negative is clip or exp, got {self.negative!r}")
        check_time("s5", self.discretization, self.steps, self.rate)
        frequencies, vectors = self._initial_system(whole // self.blocks)
        kept = frequencies.size
        real = -0.5 if self.negative == "clip" else np.log(0.5)
        self.real = self.param("real", partitioned(nn.initializers.constant(real), "mlp"), (kept,))
        self.imaginary = self.param(
            "imaginary", partitioned(lambda key, shape: jnp.asarray(frequencies, jnp.float32), "mlp"), (kept,)
        )
        self.log_step = self.param("log_step", partitioned(log_uniform(*self.steps), "mlp"), (kept,))

        lecun = nn.initializers.lecun_normal()

        def turned_input(key: Array, shape: tuple[int, ...]) -> Array:
            return jnp.asarray(vectors.conj().T, jnp.complex64) @ lecun(key, (whole, shape[1]))

        def turned_output(key: Array, shape: tuple[int, ...]) -> Array:
            # As in the official code: parts have variance 1 / P each.
            drawn = jax.random.truncated_normal(key, -2, 2, (2, *shape[:2], whole)) / np.sqrt(0.7737 * whole)
            return jax.lax.complex(drawn[0], drawn[1]) @ jnp.asarray(vectors, jnp.complex64)

        self.B = self.param("B", pairs(turned_input, "mlp", "embed"), (kept, self.dim, 2))
        ways = 1 if self.causal else 2
        self.C = self.param("C", pairs(turned_output, None, "embed", "mlp"), (ways, self.dim, kept, 2))
        self.D = self.param("D", partitioned(nn.initializers.normal(1.0), "embed"), (self.dim,))
        self.gate = dense(self.dim, ("embed", "mlp"), bias=True, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
        times: Float[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """times [B, T]: how long each token lasts, in units of Δ, for signals sampled irregularly; 1 unless given."""
        return self._gated(self.filtered(x, segment_ids=segment_ids, mask=mask, times=times))

    def filtered(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        times: Float[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """y, what the system makes of tokens, before the gate."""
        if mask is not None:
            times = jnp.where(mask, 1.0 if times is None else times, 0.0)
        log_decay, added = self._driven(x, times)
        states = [linear_scan(added, log_decay, segment_ids=segment_ids)[0]]
        if not self.causal:
            states.append(linear_scan(added, log_decay, segment_ids=segment_ids, reverse=True)[0])
        return self._read_out(x, states)

    def initial_state(self, batch: int, capacity: int = 2048) -> Complex[Array, "B P"]:
        self.check_causal()
        return jnp.zeros((batch, *self.real.shape), jnp.complex64)

    def step(
        self, x: Float[Array, "B D"], state: Complex[Array, "B P"], times: Float[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B D"], Complex[Array, "B P"]]:
        self.check_causal()
        log_decay, added = self._driven(x, times)
        states, state = linear_scan_step(added, log_decay, state)
        return self._gated(self._read_out(x, [states])), state

    @nn.nowrap
    def _initial_system(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Imaginary parts of Λ [P or P / 2] and eigenvectors [P, P or P / 2], from blocks of `size` states."""
        w, V, _ = hippo_normal(size)
        kept = size // 2 if self.conjugate else size
        return np.tile(w[:kept], self.blocks), np.kron(np.eye(self.blocks), V[:, :kept])

    def _system(self, times: Array | None) -> tuple[Array, Array]:
        """(log Λ̄, B̄ / B) [P], or [*lead, P] where `times` [*lead] multiplies the steps."""
        real = -jnp.exp(self.real) if self.negative == "exp" else jnp.minimum(self.real, -SLOWEST)
        step = self.rate * jnp.exp(self.log_step)
        step = step if times is None else times[..., None] * step
        return DISCRETIZATIONS[self.discretization](jax.lax.complex(real, self.imaginary), step)

    def _driven(self, x: Float[Array, "*lead D"], times: Array | None) -> tuple[Array, Array]:
        """log Λ̄ and B̄ u_t [*lead, P]."""
        log_decay, scale = self._system(times)
        x = x.astype(self.dtype)
        parts = (jnp.matmul(x, self.B[..., n].astype(self.dtype).T).astype(jnp.float32) for n in range(2))
        return log_decay, scale * jax.lax.complex(*parts)

    def _read_out(self, x: Float[Array, "*lead D"], states: list[Any]) -> Float[Array, "*lead D"]:
        y = self.D * x.astype(jnp.float32)
        for C, state in zip(as_complex(self.C), states, strict=True):
            real, imaginary = (
                jnp.matmul(part.astype(self.dtype), weights.T.astype(self.dtype))
                for part, weights in ((state.real, C.real), (state.imag, C.imag))
            )
            y += (2 if self.conjugate else 1) * (real - imaginary).astype(jnp.float32)
        return y

    def _gated(self, y: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        y = nn.gelu(y).astype(self.dtype)
        return y * jax.nn.sigmoid(self.gate(y))
