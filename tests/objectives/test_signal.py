"""Losses between signals against numpy and scipy, what they do not read, and their gradients at silence."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal as scipy_signal

from zoo.errors import ZooError
from zoo.objectives import signal

VALID = np.array([[True, True, False], [True, False, False]])
QUICK_STFT = partial(signal.multi_resolution_stft, resolutions=((16, 4, 10), (32, 8, 24)))


def sine_cosine(prediction: Any, target: Any, valid: Any) -> Any:
    """Of angles that are the same numbers."""
    return signal.sine_cosine(jnp.sin(prediction), jnp.cos(prediction), jnp.sin(target), jnp.cos(target), valid)


LOSSES = {
    "mean_square": signal.mean_square,
    "mean_absolute": signal.mean_absolute,
    "pearson": signal.pearson,
    "sine_cosine": sine_cosine,
    "multi_resolution_stft": QUICK_STFT,
}


def pair(shape: tuple[int, ...] = (2, 3, 50)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    target = rng.normal(size=shape)
    return (target + rng.normal(size=shape)).astype(np.float32), target.astype(np.float32)


def expected(name: str, a: np.ndarray, b: np.ndarray) -> float:
    """The loss of one row, by numpy and scipy in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if name == "pearson":
        return np.corrcoef(a, b)[0, 1]
    if name == "sine_cosine":
        return np.mean(1 - np.cos(a - b))
    if name == "multi_resolution_stft":
        terms = []
        for transform, hop, window in QUICK_STFT.keywords["resolutions"]:
            before = (transform - window) // 2
            taper = np.pad(scipy_signal.get_window("hann", window), (before, transform - window - before))
            shape = {"nperseg": transform, "noverlap": transform - hop, "boundary": "even", "padded": False}
            x, y = (np.abs(scipy_signal.stft(each, window=taper, **shape)[2]) * taper.sum() for each in (a, b))
            terms.append(np.linalg.norm(y - x) / np.linalg.norm(y) + np.abs(np.log(y) - np.log(x)).mean())
        return np.mean(terms)
    return np.mean((a - b) ** 2) if name == "mean_square" else np.mean(np.abs(a - b))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_means_of_valid_rows(name):
    a, b = pair()
    rows = np.array([[expected(name, x, y) for x, y in zip(*both, strict=True)] for both in zip(a, b, strict=True)])
    np.testing.assert_allclose(LOSSES[name](a, b, None), rows.mean(), rtol=1e-5)
    np.testing.assert_allclose(LOSSES[name](a, b, VALID), rows[VALID].mean(), rtol=1e-5)
    np.testing.assert_allclose(LOSSES[name](a, b, VALID[:, 0]), rows[VALID[:, 0]].mean(), rtol=1e-5)
    assert LOSSES[name](a, b, np.zeros_like(VALID)) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_not_valid_is_not_read(name):
    a, b = pair()
    nowhere, far = (np.where(VALID[..., None], a, other).astype(np.float32) for other in (np.nan, 1e4))
    assert LOSSES[name](nowhere, b, VALID) == LOSSES[name](a, b, VALID)
    gradient = jax.grad(LOSSES[name])(far, b, VALID)
    np.testing.assert_array_equal(gradient[~VALID], 0)
    np.testing.assert_array_equal(gradient[VALID], jax.grad(LOSSES[name])(a, b, VALID)[VALID])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("predicted", ["silence", "signal"])
@pytest.mark.parametrize("true", ["silence", "signal"])
def test_gradients_at_silence_are_finite(name, predicted, true):
    target = pair()[1]
    a, b = (np.zeros_like(target) if each == "silence" else target for each in (predicted, true))
    value, gradient = jax.value_and_grad(LOSSES[name])(a, b, None)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences(name):
    a, b = pair((1, 1, 40))
    direction = np.random.default_rng(1).normal(size=a.shape).astype(np.float32)
    with jax.enable_x64(False):
        _, slope = jax.jvp(lambda a: LOSSES[name](a, b, None), (a,), (direction,))
    step = 1e-4
    around = [expected(name, (a + sign * step * direction)[0, 0], b[0, 0]) for sign in (1, -1)]
    # float32 arrays moved by the step keep three to four of its digits.
    np.testing.assert_allclose(slope, (around[0] - around[1]) / (2 * step), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("samples", [200, 31])
def test_spectrum_is_the_fourier_transform(samples):
    patches = pair((3, samples))[0]
    amplitude, phase = signal.spectrum(patches)
    truth = np.fft.fft(patches.astype(np.float64))
    np.testing.assert_allclose(amplitude, np.abs(truth), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(amplitude * np.exp(1j * np.asarray(phase)), truth, rtol=1e-4, atol=1e-4)
    assert set(np.abs(phase[:, 0])) <= {0, np.float32(np.pi)}
    back = signal.from_spectrum(amplitude, jnp.cos(phase), jnp.sin(phase))
    np.testing.assert_allclose(back, patches, atol=1e-5)


def test_spectrum_of_silence_has_no_gradient():
    for part in (0, 1):
        gradient = jax.grad(lambda x, part=part: signal.spectrum(x)[part].sum())(np.zeros((2, 8), np.float32))
        np.testing.assert_array_equal(gradient, 0)


def test_sine_cosine_does_not_jump_where_phase_wraps():
    near = np.full((1, 4), np.pi - 1e-3, np.float32)
    assert sine_cosine(near, -near, None) < 1e-5
    assert sine_cosine(near, near - np.pi, None) == pytest.approx(2, abs=1e-5)


def test_sine_cosine_pulls_to_the_circle():
    a = np.full((1, 4), 0.3, np.float32)
    half = signal.sine_cosine(0.5 * np.sin(a), 0.5 * np.cos(a), np.sin(a), np.cos(a))
    np.testing.assert_allclose(half, 0.1 * (0.25 - 1) ** 2, rtol=1e-5)
    np.testing.assert_allclose(
        signal.sine_cosine(0 * a, 0 * a, np.sin(a), np.cos(a), circle=0.0), 1, err_msg="at a right angle"
    )


def test_pearson_of_small_units_and_of_constants():
    a, b = pair((4, 60))
    np.testing.assert_allclose(signal.pearson(a * 1e-13, b * 1e-13), signal.pearson(a, b), rtol=1e-5)
    assert signal.pearson(np.full((1, 60), 0.1, np.float32), b[:1]) == 0


def test_stft_refuses_a_signal_within_half_a_transform():
    with pytest.raises(ZooError, match="got 128 samples, a transform of 256 wants more than 128"):
        signal.multi_resolution_stft(np.zeros((1, 128)), np.zeros((1, 128)))


def test_standardised_where_of_examples_and_of_rows():
    values = 3 + 2 * pair()[0]
    spoiled = np.where(VALID[..., None], values, np.nan)
    standard, mean, deviation = signal.standardised_where(spoiled, VALID)
    for each, valid, m, d, z in zip(values, VALID, mean, deviation, standard, strict=True):
        np.testing.assert_allclose((m.item(), d.item()), (each[valid].mean(), each[valid].std(ddof=1)), rtol=1e-5)
        np.testing.assert_allclose(z[valid], (each[valid] - m) / d, rtol=1e-5, atol=1e-6)
        assert not np.asarray(z)[~valid].any()
    rows, mean, _ = signal.standardised_where(values, axes=(-1,))
    assert mean.shape == (2, 3, 1)
    np.testing.assert_allclose(np.std(rows, axis=-1, ddof=1), 1, rtol=1e-5)


def test_standardised_silence_is_silence():
    blank = np.zeros((2, 3, 50), np.float32)
    gradient = jax.grad(lambda x: jnp.square(signal.standardised_where(x)[0] - 1).sum())(blank)
    assert np.isfinite(gradient).all()
    standard, mean, deviation = signal.standardised_where(blank + 5)
    assert not np.asarray(standard).any()
    np.testing.assert_array_equal((mean.ravel(), deviation.ravel()), ([5, 5], [1, 1]))
