"""S4D: a diagonal linear system in continuous time for every feature, applied as a convolution or step by step.

Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (2206.11893): §3 for the
parameters, §4 for initial values; the layer around the system as in state-spaces/s4 (`s4d.py`); both ways of time as
in its `FFTConv`, which EEGDM ("EEG Representation Learning via Generative Diffusion Model", 2025) uses.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Complex, Float, Int

from kernels.linear_scan import linear_scan_step
from kernels.packing import runs
from zoo.errors import ZooError
from zoo.layers.devices import linear_scan, on_devices
from zoo.layers.mixer import Mixer
from zoo.layers.parameters import LIKE_TORCH, dense, partitioned
from zoo.types import Array

LARGEST_INPUT = 2.0
"""Bound on B where it is HiPPO's, as in the official code."""


def hippo_normal(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The normal part of HiPPO-LegS, diagonalised: (w [N], V [N, N], b [N]).

    The matrix is V (−½ + i diag w) Vᴴ, w ascending; the input vector is V b (S4, 2111.00396, theorem 1; S5, 2208.04933,
    appendix B.1.1). float64 and complex128.
    """
    n = np.arange(size)
    root = np.sqrt(2 * n + 1)
    matrix = np.diag(n) - np.tril(np.outer(root, root)) + 0.5 * np.outer(root, root)
    w, V = np.linalg.eigh(-1j * matrix)
    return w, V, V.conj().T @ root


def initial_frequencies(kind: str, states: int) -> tuple[np.ndarray, np.ndarray]:
    """(−Im A, B) [N/2] of the states that are kept of each conjugate pair; Re A is −½ in all.

    lin: πn. inv: N/π (N / (2n + 1) − 1). legs: eigenvalues and input of the diagonalised HiPPO-LegS, its input's phase
    left to C, which is drawn without one. Raises ZooError for another name.
    """
    n = np.arange(states // 2)
    match kind:
        case "lin":
            return np.pi * n, np.ones(n.size)
        case "inv":
            return states / np.pi * (states / (2 * n + 1) - 1), np.ones(n.size)
        case "legs":
            w, _, b = hippo_normal(states)
            return -w[: n.size], np.minimum(np.abs(b[: n.size]), LARGEST_INPUT)
    raise ZooError(f"s4d: frequencies are lin, inv or legs, got {kind!r}")


def zero_order_hold(A: Array, step: Array) -> tuple[Array, Array]:
    """(log Ā, B̄ / B) of an input held for a step: Ā = exp(ΔA), B̄ = (exp(ΔA) − 1) A⁻¹ B."""
    return step * A, jnp.expm1(step * A) / A


def bilinear(A: Array, step: Array) -> tuple[Array, Array]:
    """(log Ā, B̄ / B) of Tustin's rule: Ā = (1 + ΔA/2) / (1 − ΔA/2), B̄ = ΔB / (1 − ΔA/2)."""
    half = step * A / 2
    return jnp.log((1 + half) / (1 - half)), step / (1 - half)


DISCRETIZATIONS = {"zoh": zero_order_hold, "bilinear": bilinear}
"""A and steps Δ that broadcast. A step of 0 leaves states as they are."""


def check_time(mixer: str, discretization: str, steps: tuple[float, float], rate: float) -> None:
    """Raises ZooError for options that are no way to measure time."""
    if discretization not in DISCRETIZATIONS:
        raise ZooError(f"{mixer}: discretization is zoh or bilinear, got {discretization!r}")
    if not 0 < steps[0] <= steps[1] or rate <= 0:
        raise ZooError(f"{mixer}: steps {steps}, rate {rate}: wanted 0 < smallest <= largest and 0 < rate")


def log_uniform(smallest: float, largest: float) -> Any:
    """Initialiser of log Δ."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, math.log(smallest), math.log(largest))

    return init


def pairs(init: Any, *axes: str | None) -> Any:
    """The initialiser of a complex parameter, boxed, as real and imaginary parts along a last axis."""

    def parts(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        value = init(key, shape[:-1])
        return jnp.stack([value.real, value.imag], axis=-1).astype(dtype)

    return partitioned(parts, *axes, None)


def as_complex(x: Float[Array, "*shape 2"]) -> Complex[Array, "*shape"]:
    return jax.lax.complex(x[..., 0], x[..., 1])


def complex_normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Unit variance: ½ for each part."""
    return jax.random.normal(key, shape, jnp.complex64)


class DiagonalStateSpace(nn.Module):
    """x_t = Ā x_{t−1} + B̄ u_t, y_t = 2 Re(C · x_t) + D u_t for every feature on its own.

    A = −exp(A_re) − i A_im and B, C have N / 2 states: the conjugate half is left out, hence the factor 2. Computed in
    float32 and complex64 whatever the dtype of u; y is float32.

    features, states  F and N
    frequencies       of A when drawn: lin, inv or legs, see `initial_frequencies`
    discretization    zoh or bilinear
    steps             smallest and largest Δ that are drawn, one for each feature
    rate              multiplies Δ: the time between samples over that in training
    causal            False adds a second C that reads the system run backwards: y_t = sum_j k_0[j] u_{t−j} +
                      sum_j k_1[j] u_{t+1+j}, so that the token itself counts once
    """

    features: int
    states: int = 64
    frequencies: str = "lin"
    discretization: str = "zoh"
    steps: tuple[float, float] = (1e-3, 0.1)
    rate: float = 1.0
    causal: bool = True

    def setup(self) -> None:
        if self.states < 2 or self.states % 2:
            raise ZooError(f"s4d: states: got {self.states}, wanted an even number of them")
        check_time("s4d", self.discretization, self.steps, self.rate)
        imaginary, B = initial_frequencies(self.frequencies, self.states)
        shape = (self.features, self.states // 2)

        def repeated(row: np.ndarray) -> Any:
            return lambda key, shape, dtype=jnp.float32: jnp.broadcast_to(jnp.asarray(row, dtype), shape)

        self.log_step = self.param("log_step", partitioned(log_uniform(*self.steps), "mlp"), (self.features,))
        self.A_re = self.param("A_re", partitioned(nn.initializers.constant(math.log(0.5)), "mlp", None), shape)
        self.A_im = self.param("A_im", partitioned(repeated(imaginary), "mlp", None), shape)
        self.B = self.param("B", pairs(repeated(B), "mlp", None), (*shape, 2))
        ways = 1 if self.causal else 2
        self.C = self.param("C", pairs(complex_normal, None, "mlp", None), (ways, *shape, 2))
        self.D = self.param("D", partitioned(nn.initializers.normal(1.0), "mlp"), (self.features,))

    def __call__(
        self,
        u: Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T F"]:
        """By the convolution, or by the scan where segments or missing tokens make time differ between examples."""
        if segment_ids is None and mask is None:
            return self.convolved(u)
        return self.scanned(u, segment_ids, mask)

    def convolved(self, u: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """T log T operations a feature, whatever the number of states; each device has all of time."""
        time = u.shape[1]

        def op(u: Array, kernel: Array) -> Array:
            two_sided = jnp.pad(kernel[0], ((0, 0), (0, time)))
            if not self.causal:
                two_sided += jnp.pad(kernel[1, :, ::-1], ((0, 0), (time, 0)))
            spectrum = jnp.fft.rfft(two_sided.T, axis=0)
            return jnp.fft.irfft(jnp.fft.rfft(u, 2 * time, axis=1) * spectrum, 2 * time, axis=1)[:, :time]

        axes = ("batch", None, "mlp")
        u = u.astype(jnp.float32)
        return on_devices(op, (u, self.kernel(time)), (axes, (None, "mlp", None)), axes) + self.D * u

    def scanned(
        self,
        u: Float[Array, "B T F"],
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T F"]:
        """The same, with states [B, T, F, N / 2] that segments reset and missing tokens leave alone."""
        u = u.astype(jnp.float32)
        log_decay, added = self._driven(u, None if mask is None else mask.astype(jnp.float32))
        C = as_complex(self.C)
        states, _ = linear_scan(added, log_decay, segment_ids=segment_ids)
        y = jnp.einsum("btfn,fn->btf", states, C[0]).real
        if not self.causal:
            states, _ = linear_scan(added, log_decay, segment_ids=segment_ids, reverse=True)
            later = jnp.pad(states[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
            if segment_ids is not None:
                run = runs(segment_ids)
                goes_on = run == jnp.pad(run[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
                later = jnp.where(goes_on[..., None, None], later, 0)
            y += jnp.einsum("btfn,fn->btf", later, C[1]).real
        return 2 * y + self.D * u

    def initial_state(self, batch: int) -> Complex[Array, "B F N"]:
        return jnp.zeros((batch, self.features, self.states // 2), jnp.complex64)

    def step(
        self, u: Float[Array, "B F"], state: Complex[Array, "B F N"]
    ) -> tuple[Float[Array, "B F"], Complex[Array, "B F N"]]:
        u = u.astype(jnp.float32)
        log_decay, added = self._driven(u, None)
        states, state = linear_scan_step(added, log_decay, state)
        return 2 * jnp.sum(states * as_complex(self.C)[0], axis=-1).real + self.D * u, state

    def kernel(self, length: int) -> Float[Array, "ways F L"]:
        """k[l] = 2 Re sum_n C_n B̄_n Ā_n^l for l < length."""
        log_decay, scale = self._system(None)
        # Powers l = stride · i + j as products: √L of them twice, and not L for every state.
        stride = math.isqrt(length - 1) + 1
        fine = jnp.exp(log_decay[..., None] * jnp.arange(stride))
        coarse = jnp.exp(log_decay[..., None] * (stride * jnp.arange(-(-length // stride))))
        weights = as_complex(self.C) * as_complex(self.B) * scale
        k = jnp.einsum("wfn,fni,fnj->wfij", weights, coarse, fine, precision="highest").real
        return 2 * k.reshape(*k.shape[:2], -1)[..., :length]

    def _system(self, time: Array | None) -> tuple[Array, Array]:
        """(log Ā, B̄ / B) [F, N / 2], or [B, T, F, N / 2] where `time` [B, T] multiplies the steps."""
        A = jax.lax.complex(-jnp.exp(self.A_re), -self.A_im)
        step = self.rate * jnp.exp(self.log_step)[:, None]
        return DISCRETIZATIONS[self.discretization](A, step if time is None else time[..., None, None] * step)

    def _driven(self, u: Float[Array, "*lead F"], time: Array | None) -> tuple[Array, Array]:
        """log Ā and B̄ u_t [*lead, F, N / 2]."""
        log_decay, scale = self._system(time)
        return log_decay, scale * as_complex(self.B) * u[..., None]


class S4D(Mixer):
    """out = v ⊙ σ(g), where v and g are maps with biases of gelu(y), and y is the output of `DiagonalStateSpace`.

    v and g are one matrix in the official code. Biases start at zero here.

    states, frequencies, discretization, steps, rate   see `DiagonalStateSpace`
    causal                                             False also runs the system backwards
    """

    states: int = 64
    frequencies: str = "lin"
    discretization: str = "zoh"
    steps: tuple[float, float] = (1e-3, 0.1)
    rate: float = 1.0

    ways = (True, False)

    def setup(self) -> None:
        self.system = DiagonalStateSpace(
            self.dim, self.states, self.frequencies, self.discretization, self.steps, self.rate, self.causal
        )
        self.value, self.gate = (
            dense(self.dim, ("mlp", "embed"), bias=True, init=LIKE_TORCH, dtype=self.dtype) for _ in range(2)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        return self._read_out(self.system(x, segment_ids=segment_ids, mask=mask))

    def initial_state(self, batch: int, capacity: int = 2048) -> Complex[Array, "B D N"]:
        self.check_causal()
        return self.system.initial_state(batch)

    def step(
        self, x: Float[Array, "B D"], state: Complex[Array, "B D N"]
    ) -> tuple[Float[Array, "B D"], Complex[Array, "B D N"]]:
        self.check_causal()
        y, state = self.system.step(x, state)
        return self._read_out(y), state

    def _read_out(self, y: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        y = nn.gelu(y, approximate=False).astype(self.dtype)
        return self.value(y) * jax.nn.sigmoid(self.gate(y))
