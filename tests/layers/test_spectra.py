"""Short-time spectra against their definition, and what signals from magnitudes can be held to."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from zoo.errors import ZooError
from zoo.layers.spectra import frames, griffin_lim, hann, inverse_stft, overlap_add, stft


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("window", "hop", "samples", "count"), [(8, 4, 20, 4), (8, 2, 21, 7), (6, 6, 13, 2)])
def test_frames_are_stretches_of_the_signal(window, hop, samples, count):
    x = noise(3, samples)
    found = np.asarray(frames(jnp.asarray(x), window, hop))
    assert found.shape == (3, count, window)
    for frame in range(count):
        np.testing.assert_array_equal(found[:, frame], x[:, frame * hop : frame * hop + window])


def test_the_spectrum_is_the_sum_over_each_frame():
    x, taper = noise(2, 30), hann(10)
    n, k = np.arange(10), np.arange(6)
    kernel = np.exp(-2j * np.pi * np.outer(n, k) / 10)
    wanted = np.stack([(x[:, 5 * a : 5 * a + 10] * taper) @ kernel for a in range(5)], axis=1)
    np.testing.assert_allclose(stft(jnp.asarray(x), taper, 5), wanted, atol=1e-5)


def test_the_hann_window_is_the_periodic_one():
    np.testing.assert_allclose(hann(200), scipy.signal.get_window("hann", 200), atol=1e-7)


def test_overlap_add_is_the_transpose_of_frames():
    x, y = noise(32), noise(7, 8, seed=1)
    ours = float(jnp.vdot(overlap_add(jnp.asarray(y), 4), x))
    assert ours == pytest.approx(float(jnp.vdot(y, frames(jnp.asarray(x), 8, 4))), rel=1e-5)


@pytest.mark.parametrize("taper", [hann(20), np.ones(20, np.float32)], ids=["hann", "rectangle"])
def test_a_spectrum_tells_the_signal(taper):
    x = noise(2, 100)
    again = np.asarray(inverse_stft(stft(jnp.asarray(x), taper, 10), taper, 10))
    # sin⁴ of the first three and last two samples' places in the window is below EDGE.
    inside = slice(3, -2) if taper[0] == 0 else slice(None)
    np.testing.assert_allclose(again[:, inside], x[:, inside], atol=1e-5)


def test_griffin_lim_finds_a_signal_of_that_magnitude():
    t = np.arange(640)
    x = np.sin(2 * np.pi * (0.02 * t + 5e-5 * t**2)) + 0.1 * noise(640)
    taper = hann(64)
    magnitude = jnp.abs(stft(jnp.asarray(x, jnp.float32), taper, 16))

    def apart(iterations: int) -> float:
        found = jnp.abs(stft(griffin_lim(magnitude, taper, 16, iterations), taper, 16))
        return float(jnp.linalg.norm(found - magnitude) / jnp.linalg.norm(magnitude))

    errors = [apart(iterations) for iterations in (0, 4, 32)]
    assert errors == sorted(errors, reverse=True)  # each iteration is nearer, as the paper proves
    assert errors[-1] < 0.2 < errors[0]


def test_frames_that_do_not_fit_are_refused():
    with pytest.raises(ZooError, match="frames of 8 samples every 3"):
        frames(jnp.zeros(20), 8, 3)
    with pytest.raises(ZooError, match="got 7 samples"):
        frames(jnp.zeros(7), 8, 4)
