"""Losses between signals, and between spectra, as functions of arrays.

All are means over the rows that are `valid`: a bool array over the leading axes of what is compared, as many of them
as it has; None stands for all. What is not valid is not read, not even where it is NaN. The last axis is time, or
frequency, and always counts whole. Everything is float32, and gradients are finite where signals are silent: what has
no direction there (a phase, a correlation) passes none.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from zoo.errors import ZooError
from zoo.types import AnyArray, Array

RESOLUTIONS = ((64, 6, 30), (128, 15, 75), (256, 30, 150))
"""(transform, hop, window) in samples: those of Parallel WaveGAN (1910.11480, table 1) for sound at 24 kHz, divided by
eight. At 200 Hz the windows are 0.15, 0.375 and 0.75 s."""


def mean_square(
    prediction: Float[AnyArray, "*rows T"],
    target: Float[AnyArray, "*rows T"],
    valid: Bool[AnyArray, "*_"] | None = None,
) -> Float[Array, ""]:
    """Mean of (prediction − target)²."""
    prediction, target = _there(valid, prediction, target)
    return _mean(jnp.square(prediction - target), valid)


def mean_absolute(
    prediction: Float[AnyArray, "*rows T"],
    target: Float[AnyArray, "*rows T"],
    valid: Bool[AnyArray, "*_"] | None = None,
) -> Float[Array, ""]:
    """Mean of |prediction − target|."""
    prediction, target = _there(valid, prediction, target)
    return _mean(jnp.abs(prediction - target), valid)


def pearson(
    prediction: Float[AnyArray, "*rows T"],
    target: Float[AnyArray, "*rows T"],
    valid: Bool[AnyArray, "*_"] | None = None,
) -> Float[Array, ""]:
    """Mean over rows of the correlation along the last axis, in [−1, 1]; 0 for a row that is constant.

    Constant is what deviates from its mean by less than a millionth of it, the rounding of float32.
    """
    prediction, target = _there(valid, prediction, target)
    a, varies = _direction(prediction)
    b, also = _direction(target)
    return _mean(jnp.where(varies & also, a * b, 0).sum(-1, keepdims=True), valid)


def spectrum(patches: Float[AnyArray, "*rows T"]) -> tuple[Float[Array, "*rows T"], Float[Array, "*rows T"]]:
    """Amplitude and phase, radians in (−π, π], of the two-sided Fourier transform of the last axis: T bins each.

    The bins of a real signal that are real, the first and at even T the middle one, have phase exactly 0 or π. A bin
    of amplitude 0 has phase 0 and passes no gradient.
    """
    patches = jnp.asarray(patches, jnp.float32)
    samples = patches.shape[-1]
    real_bins = [0] + [samples // 2] * (samples % 2 == 0)
    half = jnp.fft.rfft(patches)
    real, imaginary = half.real, half.imag.at[..., jnp.array(real_bins)].set(0)
    power = jnp.square(real) + jnp.square(imaginary)
    silent = power == 0
    amplitude = root(power)
    phase = jnp.where(silent, 0, jnp.arctan2(imaginary, jnp.where(silent, 1, real)))
    mirrored = slice((samples - 1) // 2, 0, -1)
    return (
        jnp.concatenate([amplitude, amplitude[..., mirrored]], -1),
        jnp.concatenate([phase, -phase[..., mirrored]], -1),
    )


def from_spectrum(
    amplitude: Float[AnyArray, "*rows T"], cosine: Float[AnyArray, "*rows T"], sine: Float[AnyArray, "*rows T"]
) -> Float[Array, "*rows T"]:
    """Real part of the inverse transform of amplitude · (cosine + i sine), two-sided: undoes `spectrum`."""
    bins = amplitude * jnp.asarray(cosine, jnp.float32) + 1j * (amplitude * jnp.asarray(sine, jnp.float32))
    return jnp.fft.ifft(bins).real


def sine_cosine(
    sine: Float[AnyArray, "*rows F"],
    cosine: Float[AnyArray, "*rows F"],
    phase_sine: Float[AnyArray, "*rows F"],
    phase_cosine: Float[AnyArray, "*rows F"],
    valid: Bool[AnyArray, "*_"] | None = None,
    *,
    circle: float = 0.1,
) -> Float[Array, ""]:
    """1 − cos(angle between (cosine, sine) and the true ones), plus circle · (sine² + cosine² − 1)², mean over bins.

    Source: NeuroRVQ (2510.13068). Unlike the error of an angle it does not jump where phase wraps at ±π. A prediction
    of (0, 0) counts as at a right angle.
    """
    sine, cosine, phase_sine, phase_cosine = _there(valid, sine, cosine, phase_sine, phase_cosine)
    square = jnp.square(sine) + jnp.square(cosine)
    lengths = jnp.sqrt(jnp.maximum(square * (jnp.square(phase_sine) + jnp.square(phase_cosine)), 1e-16))
    alike = (sine * phase_sine + cosine * phase_cosine) / lengths
    return _mean(1 - alike + circle * jnp.square(square - 1), valid)


def multi_resolution_stft(
    prediction: Float[AnyArray, "*rows T"],
    target: Float[AnyArray, "*rows T"],
    valid: Bool[AnyArray, "*_"] | None = None,
    *,
    resolutions: Sequence[tuple[int, int, int]] = RESOLUTIONS,
    floor: float = 1e-7,
) -> Float[Array, ""]:
    """Mean over resolutions of spectral convergence and of the log magnitudes' mean absolute error, summed.

    Source: Parallel WaveGAN, 1910.11480, equations 4 to 6. Spectral convergence is ‖|S| − |Ŝ|‖ / ‖|S|‖ (Frobenius) of
    a row, S its transform; the loss is the mean over rows.

    resolutions  of (transform, hop, window) samples; windows are Hann, centred, the signal reflected at its ends
    floor        least power of a bin: what is below is silence, and passes no gradient

    Raises ZooError for a signal not longer than half a transform.
    """
    prediction, target = _there(valid, prediction, target)
    terms = []
    for transform, hop, window in resolutions:
        if prediction.shape[-1] <= transform // 2:
            raise ZooError(
                f"multi_resolution_stft: got {prediction.shape[-1]} samples, a transform of {transform} wants more "
                f"than {transform // 2}"
            )
        a, b = (_magnitude(each, transform, hop, window, floor) for each in (prediction, target))
        convergence = root(jnp.square(b - a).sum((-2, -1))) / root(jnp.square(b).sum((-2, -1)))
        logarithmic = jnp.abs(jnp.log(b) - jnp.log(a)).mean((-2, -1))
        terms.append(_mean((convergence + logarithmic)[..., None], valid))
    return jnp.stack(terms).mean()


def standardised_where(
    values: Float[AnyArray, "*shape"], valid: Bool[AnyArray, "*_"] | None = None, axes: Sequence[int] | None = None
) -> tuple[Float[Array, "*shape"], Float[Array, "*_"], Float[Array, "*_"]]:
    """(values − mean) / deviation, mean and deviation over `axes`, which both keep with length 1.

    axes  all but the first, where not given: one mean and one deviation an example

    The deviation is that of a sample (n − 1). Only what is `valid` (over the leading axes) counts; the rest becomes 0.
    What does not vary becomes 0, and its deviation is given as 1.
    """
    (values,) = _there(valid, values)
    axes = tuple(range(1, values.ndim)) if axes is None else tuple(axes)
    here = jnp.broadcast_to(True if valid is None else _aligned(valid, values), values.shape)
    count = here.sum(axes, keepdims=True)
    mean = values.sum(axes, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(here, values - mean, 0)
    deviation = root(jnp.square(centred).sum(axes, keepdims=True) / jnp.maximum(count - 1, 1))
    deviation = jnp.where(deviation > 0, deviation, 1)
    return centred / deviation, mean, deviation


def root(square: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Square root whose gradient at 0 is 0."""
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def _aligned(valid: AnyArray, values: Array) -> Array:
    """`valid`, with an axis of length 1 for each that `values` has beyond its own."""
    return jnp.asarray(valid).reshape(valid.shape + (1,) * (values.ndim - valid.ndim))


def _there(valid: AnyArray | None, *arrays: AnyArray) -> tuple[Array, ...]:
    """The arrays in float32, 0 where they are not valid."""
    floats = tuple(jnp.asarray(each, jnp.float32) for each in arrays)
    if valid is None:
        return floats
    return tuple(jnp.where(_aligned(valid, each), each, 0) for each in floats)


def _mean(values: Array, valid: AnyArray | None) -> Array:
    if valid is None:
        return values.mean()
    here = jnp.broadcast_to(_aligned(valid, values), values.shape)
    return jnp.sum(values, where=here) / jnp.maximum(here.sum(), 1)


def _direction(x: Array) -> tuple[Array, Array]:
    """x without its mean and of length one along the last axis, and whether it has a direction at all."""
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    length = root(jnp.square(centred).sum(-1, keepdims=True))
    varies = length > 1e-6 * jnp.abs(mean) * np.sqrt(x.shape[-1])
    return jnp.where(varies, centred / jnp.where(varies, length, 1), 0), varies


def _magnitude(x: Array, transform: int, hop: int, window: int, floor: float) -> Array:
    """Magnitudes [..., frames, bins] of the short-time Fourier transform of [..., T]."""
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(transform // 2,) * 2], mode="reflect")
    starts = np.arange(0, padded.shape[-1] - transform + 1, hop)
    taper = np.zeros(transform, np.float32)
    before = (transform - window) // 2
    taper[before : before + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    bins = jnp.fft.rfft(padded[..., starts[:, None] + np.arange(transform)] * taper)
    return jnp.sqrt(jnp.maximum(jnp.square(bins.real) + jnp.square(bins.imag), floor))
