"""How generated signals are judged: the control, spectra and correlations against what is known of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.image import imread

from zoo.cli import main
from zoo.generate import (
    GENERATED,
    REAL,
    REBUILT,
    SHUFFLED,
    Spectrum,
    correlation_error,
    plot,
    shuffled,
    spectra,
    spectral_distance,
)

RATE = 100.0


def test_the_control_keeps_each_rows_codes_and_nothing_of_their_order():
    codes = np.arange(2 * 3 * 40 * 2).reshape(2, 120, 2)
    codes[1, 80:] = -1
    mixed = shuffled(codes, np.random.default_rng(0), rows=3)
    before, after = (each.reshape(2, 3, 40, 2) for each in (codes, mixed))
    np.testing.assert_array_equal(np.sort(after, axis=2), before)
    # Codes of one frame stay together.
    np.testing.assert_array_equal(after[0, ..., 1] - after[0, ..., 0], 1)
    orders = after[0, :, :, 0] - after[0, :, :, 0].min(1, keepdims=True)
    assert (orders[0] != orders[1]).any()
    assert (orders[0] != np.arange(0, 80, 2)).any()


def test_spectra_are_power_per_hertz_of_valid_channels():
    time = np.arange(1000) / RATE
    signal = np.stack([3 * np.sin(2 * np.pi * 10 * time), np.full_like(time, np.nan)])[None]
    found = spectra(signal, RATE, valid=np.array([[True, False]]))
    assert found.hz[found.power.argmax()] == 10
    # A sine of amplitude 3 has power 4.5; a Hann window leaves all of it within two bins.
    assert found.power.sum() * (found.hz[1] - found.hz[0]) == pytest.approx(4.5, rel=0.01)
    share = spectra(signal[:, :1], RATE, relative=True)
    assert share.power.sum() * (share.hz[1] - share.hz[0]) == pytest.approx(1)
    assert spectra(signal[:, :1, :60], RATE).hz[0] == pytest.approx(RATE / 60)


def test_the_distance_of_spectra_is_in_decibels():
    hz = np.arange(1.0, 51.0)
    one = Spectrum(hz, 1 / hz)
    assert spectral_distance(one, one) == 0
    assert spectral_distance(Spectrum(hz, 10 / hz), one) == pytest.approx(10)
    half = np.where(hz <= 25, 100.0, 1.0)
    assert spectral_distance(Spectrum(hz, half / hz), one) == pytest.approx(20 / math.sqrt(2))
    # Where the other has next to no power, nothing is compared.
    cut = Spectrum(hz, np.where(hz <= 25, 1.0, 1e-6))
    assert spectral_distance(Spectrum(hz, np.ones(50)), cut) == pytest.approx(0)
    assert spectral_distance(cut, Spectrum(hz, np.ones(50))) == pytest.approx(60 / math.sqrt(2))
    # At a coarser resolution it is looked up in between.
    assert spectral_distance(Spectrum(hz[::2], 10 * np.ones(25)), Spectrum(hz, np.ones(50))) == pytest.approx(10)


def test_correlations_are_compared_between_valid_channels():
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(2, 1, 1, 5000)), rng.normal(size=(2, 3, 5000))
    together, apart = shared[0] + 0 * own, own
    together = together + 1e-3 * own
    valid = np.array([[True, True, False], [True, False, False]])
    spoiled = np.where(valid[..., None], apart, np.nan)
    # The first example alone has a pair; it correlates fully in one and, but for chance of 1/√5000, not in the other.
    assert correlation_error(together, spoiled, valid) == pytest.approx(1, abs=0.06)
    assert correlation_error(spoiled, spoiled, valid) == 0
    assert math.isnan(correlation_error(apart, apart, valid & [True, False, False]))
    assert correlation_error(np.zeros_like(apart), apart, np.ones((2, 3), bool)) < 0.06


def test_the_figure_is_a_picture(tmp_path):
    hz = np.arange(1.0, 51.0)
    powers = {name: Spectrum(hz, (i + 1) / hz) for i, name in enumerate((REAL, REBUILT, GENERATED, SHUFFLED))}
    plot(powers, tmp_path / "spectra.png", relative=True)
    picture = imread(tmp_path / "spectra.png")
    assert picture[..., :3].std() > 0.05


def test_the_command_refuses_what_is_not_there(tmp_path, capsys):
    assert main(["generate", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "not a run's folder" in capsys.readouterr().err
    assert main(["generate", str(tmp_path)]) == 2
    assert "usage: zoo generate RUN OUT" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "out", "--frame", "3"]) == 2
    assert "unknown option --frame; the nearest is --frames" in capsys.readouterr().err
