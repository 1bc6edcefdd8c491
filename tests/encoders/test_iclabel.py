"""ICLabel: the network's symmetries and size, its key map, and the features of components with known answers."""

from __future__ import annotations

import jax
import mne
import numpy as np
import pytest

import zoo
from zoo.encoders.iclabel import CLASSES, KEYS, ICLabel
from zoo.errors import ZooError
from zoo.evaluate import components
from zoo.registry import parameter_count
from zoo.weights.keys import Ignore, Key, WeightsMismatch, fill

RATE_HZ = 128.0
PLACES = {
    "Fp1": (90, -18),
    "Fp2": (90, 18),
    "F7": (90, -54),
    "F8": (90, 54),
    "C3": (45, -90),
    "Cz": (0, 0),
    "C4": (45, 90),
    "P7": (90, -126),
    "P8": (90, 126),
    "O1": (90, -162),
    "Oz": (90, 180),
    "O2": (90, 162),
}


@pytest.fixture(scope="module")
def tensors():
    """Tensors of the shapes and names of the published file, small."""
    random = np.random.default_rng(0)
    widths = {"img_conv": (128, 256, 512), "psds_conv": (128, 256, 1), "autocorr_conv": (128, 256, 1)}
    made = {}
    for tower, outputs in widths.items():
        sides = (4, 4) if tower == "img_conv" else (1, 3)
        for number, (before, after) in enumerate(zip((1, *outputs), outputs, strict=False), 1):
            made[f"{tower}.conv{number}.weight"] = random.normal(size=(after, before, *sides), scale=before**-0.5)
            made[f"{tower}.conv{number}.bias"] = random.normal(size=after, scale=0.1)
    made["conv.weight"] = random.normal(size=(7, 712, 4, 4), scale=0.02)
    made["conv.bias"] = random.normal(size=7)
    return {name: tensor.astype(np.float32) for name, tensor in made.items()}


@pytest.fixture(scope="module")
def filled(tensors):
    model = ICLabel()
    return fill(KEYS, tensors, jax.eval_shape(model.init, jax.random.key(0), *model.example()))[0]


@pytest.fixture(scope="module")
def probabilities(filled):
    apply = jax.jit(ICLabel().apply)
    return lambda *given: apply(filled, *given)


@pytest.fixture(scope="module")
def given():
    random = np.random.default_rng(1)
    shapes = ((3, 32, 32), (3, 100), (3, 100))
    return tuple(random.uniform(-1, 1, shape).astype(np.float32) for shape in shapes)


def test_it_has_the_published_size():
    assert parameter_count(zoo.create("iclabel_base")) == 2_903_817


def test_rows_sum_to_one_and_sign_and_side_do_not_matter(probabilities, given):
    maps, *curves = given
    out = np.asarray(probabilities(*given))
    assert out.shape == (3, 7)
    np.testing.assert_allclose(out.sum(1), 1, atol=1e-6)
    assert np.ptp(out, axis=0).max() > 1e-3
    for same in (-maps, maps[:, :, ::-1], -maps[:, :, ::-1]):
        np.testing.assert_allclose(probabilities(same, *curves), out, atol=1e-6)
    assert np.abs(probabilities(maps[:, ::-1], *curves) - out).max() > 1e-4


def test_copies_are_averaged_and_each_component_stays_itself(filled, probabilities, given):
    maps, *curves = given
    alone = jax.jit(ICLabel(copies=False).apply)
    copies = [alone(filled, each, *curves) for each in (maps, -maps, maps[:, :, ::-1], -maps[:, :, ::-1])]
    assert np.abs(copies[0] - copies[1]).max() > 1e-4
    np.testing.assert_allclose(probabilities(*given), np.mean(copies, axis=0), atol=1e-6)
    turned = probabilities(*(each[::-1] for each in given))
    np.testing.assert_allclose(turned, probabilities(*given)[::-1], atol=1e-6)


def test_layers_that_the_file_lists_twice_must_be_equal(tensors, filled):
    again = {rule.source: tensors[rule.same_as] for rule in KEYS if isinstance(rule, Ignore)}
    assert len(again) == sum(isinstance(rule, Key) for rule in KEYS) == 20
    fill(KEYS, {**tensors, **again}, filled)
    with pytest.raises(WeightsMismatch, match=r"seq\.0\.bias: wanted a repetition of conv\.bias"):
        fill(KEYS, {**tensors, **again, "seq.0.bias": tensors["conv.bias"] + 1}, filled)


def test_an_oscillation_shows_in_spectrum_and_autocorrelation():
    time = np.arange(10 * int(RATE_HZ)) / RATE_HZ
    noise = np.random.default_rng(0).normal(size=(2, len(time)))
    sources = (np.sin(2 * np.pi * np.array([[10.0], [20.0]]) * time) + 0.1 * noise)[None]
    spectrum = components.spectra(sources, RATE_HZ)
    assert spectrum.argmax(1).tolist() == [9, 19]
    assert np.abs(spectrum).max(1) == pytest.approx(1)
    np.testing.assert_array_equal(spectrum[:, 64:], np.repeat(spectrum[:, 63:64], 36, axis=1))
    for lags in (components.stretch_autocorrelations, components.autocorrelations):
        curve = lags(sources, RATE_HZ)
        assert curve.shape == (2, 100)
        # A tenth of a second is a whole turn of either; a twentieth half a turn of the first.
        np.testing.assert_allclose(curve[:, 9], 1, atol=0.05)
        np.testing.assert_allclose(curve[:, 4], [-1, 1], atol=0.05)


def test_a_notched_line_is_filled_from_its_neighbours():
    noise = np.random.default_rng(0).normal(size=(1, 1, 20 * 256))
    notched = mne.filter.notch_filter(noise, 256.0, 50.0, notch_widths=1.0, verbose="error")
    spectrum = components.spectra(notched, 256.0)[0]
    assert spectrum[49] == pytest.approx((spectrum[48] + spectrum[50]) / 2, abs=1e-6)
    assert np.abs(spectrum[59] - (spectrum[58] + spectrum[60]) / 2) > 1e-6


def test_a_map_shows_where_its_values_are():
    positions = np.array(list(montage().get_positions()["ch_pos"].values()))
    maps = components.topographies(positions.T, positions)
    rightward, forward, _ = maps
    assert np.abs(maps).reshape(3, -1).max(1) == pytest.approx(1)
    assert rightward[16, 28] > 0.3
    assert rightward[16, 3] < -0.3
    assert forward[28, 16] > 0.3
    assert forward[3, 16] < -0.3
    assert np.all(maps[:, 0, 0] == 0)


def test_the_spline_goes_through_its_points_and_averages_those_that_coincide():
    random = np.random.default_rng(0)
    places = random.normal(size=9) + 1j * random.normal(size=9)
    values = random.normal(size=9)
    np.testing.assert_allclose(components.spline(places, values, places), values, atol=1e-9)
    twice = components.spline(np.append(places, places[3]), np.append(values, values[3] + 2), places)
    np.testing.assert_allclose(twice, values + 1.0 * (np.arange(9) == 3), atol=1e-9)


def test_maps_after_the_first_shrink_only_when_asked_and_only_with_an_electrode_under_the_head():
    positions = np.array(list(montage().get_positions()["ch_pos"].values()))
    values = np.stack([positions[:, 0]] * 3)
    np.testing.assert_allclose(
        components.topographies(values, positions, True), components.topographies(values, positions), atol=1e-6
    )
    below = np.vstack([positions, [0.0, -0.001, -0.09]])
    values = np.stack([below[:, 0]] * 3)
    once, again = components.topographies(values, below), components.topographies(values, below, True)
    np.testing.assert_array_equal(once[0], once[2])
    np.testing.assert_array_equal(once[0], again[0])
    assert np.abs(again[1] - again[0]).max() > 1e-3


def test_components_of_a_recording_get_names(filled, recording, fitted):
    names, out = components.label_components(recording, fitted, filled)
    assert [CLASSES.index(name) for name in names] == out.argmax(1).tolist()
    assert out.shape == (3, 7)
    epochs = mne.make_fixed_length_epochs(recording, 2.0, preload=True, verbose="error")
    in_epochs = components.features(epochs, fitted)
    whole = components.features(recording, fitted)
    np.testing.assert_allclose(in_epochs.topography, whole.topography, atol=1e-6)
    # Epochs are too short for their late lags, which are not made up for.
    assert np.abs(in_epochs.autocorrelation[0, 90:]).max() < 0.8 * np.abs(whole.autocorrelation[0, 90:]).max()


def test_what_cannot_be_labelled_is_named(recording, fitted):
    with pytest.raises(ZooError, match="the ICA is not fitted"):
        components.features(recording, mne.preprocessing.ICA(2))
    with pytest.raises(ZooError, match="lacks Cz, channels of the ICA"):
        components.features(recording.copy().drop_channels(["Cz"]), fitted)
    with pytest.raises(ZooError, match="channel Fp1 has no position"):
        components.features(recording.copy().set_montage(None), fitted)
    with pytest.raises(ZooError, match="Cz is ecog, wanted EEG"):
        components.features(recording.copy().set_channel_types({"Cz": "ecog"}, verbose="error"), fitted)
    with pytest.raises(ZooError, match=r"got 0\.50 s of signal, wanted a second or more"):
        components.features(recording.copy().crop(0, 0.5, include_tmax=False), fitted)
    with pytest.raises(ZooError, match="got a signal at 64 Hz, wanted 100 Hz or more"):
        components.features(recording.copy().resample(64, verbose="error"), fitted)
    other = recording.copy()
    with other.info._unlock():
        other.info["lowpass"], other.info["custom_ref_applied"] = 40.0, 0
    with pytest.warns(UserWarning, match="is not in average reference; has a band of 1 to 40 Hz, not of 1 to 100 Hz"):
        components.features(other, fitted)


def montage():
    """On a sphere of 9 cm: degrees from the top of the head, and from the nose to the right."""
    places = {}
    for name, (down, turned) in PLACES.items():
        down, turned = np.radians((down, turned))
        places[name] = 0.09 * np.array([np.sin(down) * np.sin(turned), np.sin(down) * np.cos(turned), np.cos(down)])
    return mne.channels.make_dig_montage(places, coord_frame="head")


@pytest.fixture(scope="module")
def recording():
    random = np.random.default_rng(0)
    time = np.arange(20 * 256) / 256
    sources = np.stack([np.sin(2 * np.pi * 10 * time), random.laplace(size=len(time)), np.sign(np.sin(5 * time))])
    signal = 1e-5 * random.normal(size=(len(PLACES), 3)) @ sources + 1e-6 * random.normal(size=(len(PLACES), len(time)))
    raw = mne.io.RawArray(signal, mne.create_info(list(PLACES), 256.0, "eeg"), verbose="error")
    raw.set_montage(montage()).set_eeg_reference("average", verbose="error")
    with raw.info._unlock():
        raw.info["highpass"], raw.info["lowpass"] = 1.0, 100.0
    return raw


@pytest.fixture(scope="module")
def fitted(recording):
    ica = mne.preprocessing.ICA(3, method="infomax", fit_params={"extended": True}, random_state=0, verbose="error")
    return ica.fit(recording, verbose="error")
