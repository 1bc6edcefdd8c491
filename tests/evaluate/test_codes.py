"""Measures of codes and reconstructions, on signals and codes whose scores are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.evaluate.codes import BANDS, BOLD_BANDS, bits_per_second, entropy, reconstruction, usage

RATE = 200.0


def noise(windows: int = 12, channels: int = 2, samples: int = 400, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(windows, channels, samples))


def test_usage_of_known_counts():
    codes = np.array([[[0, 0], [1, 0], [-1, -1]], [[2, 0], [3, 0], [-1, 0]]])
    found = usage(codes, (8, 4))
    np.testing.assert_array_equal(found.counts[0], [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.counts[1], [5, 0, 0, 0])
    np.testing.assert_allclose(found.entropy, [2, 0])
    np.testing.assert_allclose(found.perplexity, [4, 1])
    np.testing.assert_allclose(found.live, [0.5, 0.25])
    assert set(json.loads(json.dumps(found.to_json()))) == {"entropy", "perplexity", "live"}


def test_classes_weigh_the_same_whatever_their_number():
    # Of nine windows of class a and one of class b; each class has a code of its own, used without exception.
    label = np.array(["a"] * 9 + ["b"])
    codes = np.where(label == "a", 0, 1)[:, None, None].repeat(6, 1)
    told = entropy(codes, (4,), label)
    np.testing.assert_allclose([told.balanced, told.within, told.information], [[1.0], [0.0], [1.0]], atol=1e-12)
    assert usage(codes, (4,)).entropy[0] == pytest.approx(-0.9 * np.log2(0.9) - 0.1 * np.log2(0.1))


def test_codes_that_do_not_know_the_class_tell_as_much_as_chance():
    rng = np.random.default_rng(0)
    codes, label = rng.integers(0, 16, (60, 5, 2)), rng.integers(0, 3, 60)
    told = entropy(codes, (16, 16), label)
    # 15 × 2 degrees of freedom over 300 tokens: 30 / (2 · 300 ln 2) bits are expected of counts alone.
    np.testing.assert_allclose(told.chance, 30 / (600 * np.log(2)), rtol=0.25)
    np.testing.assert_allclose(told.information, told.chance, atol=0.06)


@pytest.mark.parametrize(
    ("codes", "sizes", "label", "says"),
    [
        ([[[4]]], (4,), [0], "wanted -1 to 3"),
        ([[[-2]]], (4,), [0], "wanted -1 to 3"),
        ([[[0, 0]]], (4,), [0], "2 codebooks, wanted 1"),
        ([[[0]]], (4,), [0, 1], r"labels \(2,\)"),
        ([[[0]], [[-1]]], (4,), [0, 1], "no token in one class"),
    ],
)
def test_codes_that_cannot_be_scored(codes, sizes, label, says):
    with pytest.raises(ZooError, match=says):
        entropy(np.array(codes), sizes, np.array(label))


def test_usage_wants_a_token():
    with pytest.raises(ZooError, match="codebook 0 has no token"):
        usage(np.full((2, 3, 1), -1), (4,))


def test_bits_per_second():
    assert bits_per_second((256, 1024), 10, 2.0) == pytest.approx(10 * (8 + 10) / 2)


def test_the_signal_itself_is_perfect():
    found = reconstruction(noise(), noise(), RATE)
    assert found.windows == 12
    assert tuple(found.r2) == (1, 1, 1)
    assert tuple(found.variance_explained) == (100, 100, 100)
    assert set(found.bands) == set(BANDS)
    for band in found.bands.values():
        np.testing.assert_allclose([*band.spectrum, *band.waveform, *band.explained], 1, atol=1e-9)
        np.testing.assert_allclose(band.phase, 0, atol=1e-6)
    json.dumps(found.to_json())


def test_half_the_signal_explains_three_quarters():
    found = reconstruction(noise(), noise() / 2, RATE)
    assert found.variance_explained.value == pytest.approx(75)
    assert found.bands["alpha"].explained.value == pytest.approx(0.75)
    assert found.bands["alpha"].waveform.value == pytest.approx(1)


def test_an_offset_counts_as_explained_variance_but_not_as_r2():
    signal = noise() + 100
    still = np.broadcast_to(signal.mean(-1, keepdims=True), signal.shape)
    found = reconstruction(signal, still, RATE)
    assert found.variance_explained.value > 99.9
    assert found.r2.value == pytest.approx(0, abs=1e-12)


def test_a_silent_reconstruction_scores_as_chance_everywhere():
    for band in reconstruction(noise(), np.zeros_like(noise()), RATE).bands.values():
        assert (band.spectrum.value, band.waveform.value, band.explained.value) == (0, 0, 0)
        assert band.phase.value == pytest.approx(np.pi / 2)


def test_other_noise_has_the_phase_error_of_chance_and_no_correlation():
    found = reconstruction(noise(40), noise(40, seed=1), RATE)
    for band in found.bands.values():
        assert band.phase.low < np.pi / 2 < band.phase.high
        assert band.waveform.low < 0 < band.waveform.high


def test_a_wave_that_lags_is_wrong_in_phase_alone():
    time = np.arange(800) / RATE
    start = np.random.default_rng(0).uniform(0, 2 * np.pi, (6, 1, 1))
    wave, late = (np.sin(2 * np.pi * 10 * time + start - lag) for lag in (0.0, 1.0))
    alpha = reconstruction(wave, late, RATE).bands["alpha"]
    assert alpha.phase.value == pytest.approx(1.0, abs=0.02)
    assert alpha.waveform.value == pytest.approx(np.cos(1.0), abs=0.02)
    assert alpha.spectrum.value > 0.99


def test_each_band_sees_its_own_loss():
    """Without its fast part a signal keeps its slow bands and loses the fast ones."""
    spectrum = np.fft.rfft(noise(20))
    slow = np.fft.irfft(np.where(np.fft.rfftfreq(400, 1 / RATE) < 20, spectrum, 0), 400)
    bands = reconstruction(noise(20), slow, RATE).bands
    assert bands["theta"].waveform.value > 0.99
    assert bands["gamma"].waveform.value < 0.1
    assert bands["gamma"].spectrum.value < 0.3 < 0.99 < bands["theta"].spectrum.value


def test_what_is_not_valid_is_not_read():
    signal, other = noise(), noise(seed=1)
    valid = np.ones((12, 2), bool)
    valid[3], valid[:, 1] = False, False
    spoiled = [np.where(valid[..., None], each, np.nan) for each in (signal, other)]
    found = reconstruction(*spoiled, RATE, valid)
    keep = np.arange(12) != 3
    alone = reconstruction(signal[keep, :1], other[keep, :1], RATE)
    assert found.windows == alone.windows == 11
    np.testing.assert_allclose(found.r2, alone.r2)
    for name, band in found.bands.items():
        for measure, interval in vars(band).items():
            np.testing.assert_allclose(interval, getattr(alone.bands[name], measure), rtol=1e-9)


def test_bands_that_rate_or_window_cannot_show_are_left_out():
    assert list(reconstruction(noise(), noise(), 50.0).bands) == ["delta", "theta", "alpha", "beta"]
    assert list(reconstruction(noise(samples=80), noise(samples=80), RATE).bands) == ["theta", "alpha", "beta", "gamma"]
    assert list(reconstruction(noise(), noise(), 1 / 0.72, bands=BOLD_BANDS).bands) == list(BOLD_BANDS)


def test_windows_of_a_block_are_drawn_together():
    """Three people, each of ten windows that are rebuilt alike: the interval is that of three, not of thirty."""
    share = np.repeat([0.1, 0.5, 0.9], 10)
    signal = noise(30)
    rebuilt = signal * share[:, None, None]
    alone = reconstruction(signal, rebuilt, RATE, bands={}).r2
    together = reconstruction(signal, rebuilt, RATE, bands={}, block=np.repeat([0, 1, 2], 10)).r2
    assert together.high - together.low > 2 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("signal", "rebuilt", "valid", "says"),
    [
        (noise(), noise(11), None, "wanted"),
        (noise(), noise() * np.nan, None, "finite"),
        (noise(), noise(), np.zeros((12, 2), bool), "a valid channel"),
        (np.ones((2, 1, 50)), np.ones((2, 1, 50)), None, "does not vary"),
    ],
)
def test_signals_that_cannot_be_compared(signal, rebuilt, valid, says):
    with pytest.raises(ZooError, match=says):
        reconstruction(signal, rebuilt, RATE, valid)
