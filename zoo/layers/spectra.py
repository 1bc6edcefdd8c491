"""Short-time Fourier transforms without padding, and signals from magnitudes alone.

A window of W samples moves by a hop that divides it; the first frame begins at the first sample, and samples that fill
no frame are left out: A = ⌊(T − W) / hop⌋ + 1 frames of W // 2 + 1 bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Complex, Float

from zoo.errors import ZooError
from zoo.types import Array

EDGE = 0.01
"""Overlapping tapers count for at least this share of their largest sum: where a taper ends in zeros, the first and
last samples are in one frame only, and dividing by less would blow its errors up."""


def hann(samples: int) -> Float[np.ndarray, " W"]:
    """The periodic Hann window sin²(πn / W), as `torch.hann_window` and `scipy.signal.get_window` give it."""
    return np.square(np.sin(np.pi * np.arange(samples) / samples)).astype(np.float32)


def frames(x: Float[Array, "*lead T"], window: int, hop: int) -> Float[Array, "*lead A W"]:
    """Frame a is samples a · hop to a · hop + W. Raises ZooError where the hop does not divide or T is below W."""
    if window % hop or x.shape[-1] < window:
        raise ZooError(f"frames of {window} samples every {hop}: got {x.shape[-1]} samples; a hop must divide a frame")
    count = (x.shape[-1] - window) // hop + 1
    parts = window // hop
    blocks = x[..., : (count + parts - 1) * hop].reshape(*x.shape[:-1], count + parts - 1, hop)
    return jnp.concatenate([blocks[..., part : part + count, :] for part in range(parts)], axis=-1)


def overlap_add(x: Float[Array, "*lead A W"], hop: int) -> Float[Array, "*lead T"]:
    """The transpose of `frames`: each sample the sum of what the frames over it say, T = (A − 1) · hop + W."""
    *lead, count, window = x.shape
    parts = window // hop
    blocks = x.reshape(*lead, count, parts, hop)
    rows = [(0, 0)] * len(lead)
    placed = [jnp.pad(blocks[..., part, :], [*rows, (part, parts - 1 - part), (0, 0)]) for part in range(parts)]
    return sum(placed[1:], placed[0]).reshape(*lead, -1)


def stft(x: Float[Array, "*lead T"], taper: Float[np.ndarray, " W"], hop: int) -> Complex[Array, "*lead A F"]:
    """Fourier transforms of frames times the taper, not normalised. Float32."""
    return jnp.fft.rfft(frames(x.astype(jnp.float32), len(taper), hop) * taper)


def inverse_stft(
    spectrum: Complex[Array, "*lead A F"], taper: Float[np.ndarray, " W"], hop: int
) -> Float[Array, "*lead T"]:
    """The signal whose transform is nearest to `spectrum` (Griffin and Lim, 1984, equation 6), but for its edges."""
    told = overlap_add(jnp.fft.irfft(spectrum, len(taper)) * taper, hop)
    weight = overlap_add(jnp.broadcast_to(jnp.square(taper), (spectrum.shape[-2], len(taper))), hop)
    return told / jnp.maximum(weight, EDGE * weight.max())


def griffin_lim(
    magnitude: Float[Array, "*lead A F"], taper: Float[np.ndarray, " W"], hop: int, iterations: int
) -> Float[Array, "*lead T"]:
    """A signal whose transform has nearly this magnitude (Griffin and Lim, IEEE TASSP 32, 1984, section III).

    Phases begin as drawn once and for all, and are then `iterations` times those of the transform of the signal that
    they give. What a magnitude cannot tell stays open: the sign of the signal, and where overlap is small (a hop of
    half a window has as many bins as samples) much of its shape.
    """
    drawn = np.random.default_rng(0).uniform(-np.pi, np.pi, magnitude.shape[-2:])

    def step(_: Array, spectrum: Array) -> Array:
        found = stft(inverse_stft(spectrum, taper, hop), taper, hop)
        return magnitude * found / jnp.maximum(jnp.abs(found), 1e-12)

    start = magnitude * np.exp(1j * drawn).astype(np.complex64)
    return inverse_stft(jax.lax.fori_loop(0, iterations, step, start), taper, hop)


def band_variance(
    x: Float[Array, "*lead T"], rate_hz: float, bands: Sequence[tuple[float, float]]
) -> Float[Array, "*lead F"]:
    """Variance of what a window has in each band, lower ≤ f < upper Hz: the sum of its power there (Parseval). Float32.

    Raises ZooError for a band that holds no frequency of the window's Fourier transform.
    """
    samples = x.shape[-1]
    frequency = np.fft.rfftfreq(samples, 1 / rate_hz)
    inside = np.array([(lower <= frequency) & (frequency < upper) & (frequency > 0) for lower, upper in bands])
    for band, found in zip(bands, inside, strict=True):
        if not found.any():
            raise ZooError(
                f"band {band[0]:g} to {band[1]:g} Hz: a window of {samples} samples at {rate_hz:g} Hz has no frequency "
                f"in it; its frequencies are {rate_hz / samples:g} Hz apart, up to {rate_hz / 2:g} Hz"
            )
    # Every frequency but the last of an even window stands for its negative too.
    twice = np.where((np.arange(len(frequency)) * 2 == samples), 1.0, 2.0)
    share = (inside * twice / samples**2).astype(np.float32)
    bins = jnp.fft.rfft(x.astype(jnp.float32))
    return (jnp.square(bins.real) + jnp.square(bins.imag)) @ share.T
