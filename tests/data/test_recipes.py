"""Recipes say no to what makes no sense, and do to a signal what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mne
import numpy as np
import pytest
from synthetic import PLAIN, RATE_HZ, make_raw

from zoo.data.readers import Reading
from zoo.data.recipes import RECIPES, Recipe, Window, recipe
from zoo.data.signals import Processed, cut, process
from zoo.errors import ZooError


def run(raw: mne.io.BaseRaw, chosen: Recipe) -> Processed:
    return process(Reading(raw, tuple(raw.get_channel_types())), chosen, "file.fif")


def sines(frequencies: tuple[float, ...], rate_hz: float = 500.0, seconds: float = 60.0) -> mne.io.RawArray:
    """One channel a frequency, 10 µV each."""
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    names = ("Fp1", "Fp2", "C3", "C4", "O1", "O2")[: len(frequencies)]
    info = mne.create_info(list(names), rate_hz, "eeg")
    waves = 10e-6 * np.sin(2 * np.pi * np.array(frequencies)[:, None] * times)
    return mne.io.RawArray(waves, info, verbose="error")


def amplitude(signal: np.ndarray) -> np.ndarray:
    """Of each channel's middle half, free of the filters' ends."""
    quarter = signal.shape[1] // 4
    return np.sqrt(2) * signal[:, quarter : 3 * quarter].astype(np.float64).std(axis=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kinds", ("brain",)),
        ("kinds", ()),
        ("rate_hz", -1.0),
        ("highpass_hz", 80.0),
        ("lowpass_hz", 100.0),
        ("notch_hz", (0.0,)),
        ("scale", "loud"),
        ("sensor_names", "guess"),
        ("bads", "ignore"),
        ("dtype", "int8"),
        ("butterworth_order", -1),
        ("window", Window((), 0.0, 1.0)),
        ("window", Window(("left",), 1.0, 1.0)),
    ],
)
def test_a_senseless_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ZooError, match=field):
        replace(RECIPES["labram"], **{field: value})


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ZooError, match="'labram'"):
        recipe("labra")
    assert recipe("labram").rate_hz == 200.0


def test_labram_keeps_the_band_and_removes_the_line() -> None:
    result = run(sines((10.0, 50.0, 97.0, 0.01)), RECIPES["labram"])
    kept, line, above, below = amplitude(result.signal)
    assert result.rate_hz == 200.0
    assert result.signal.shape == (4, 60 * 200)
    assert result.signal.dtype == np.float32
    assert kept == pytest.approx(0.1, rel=0.01)  # 10 µV in units of 100 µV
    assert max(line, above, below) < 0.003


def test_a_butterworth_recipe_has_its_published_response() -> None:
    result = run(sines((10.0, 44.5, 50.0, 90.0)), RECIPES["neurorvq"])
    kept, edge, line, above = amplitude(result.signal)
    assert kept == pytest.approx(0.1, rel=0.01)
    assert edge == pytest.approx(0.05, rel=0.1)  # −3 dB forward and −3 dB backward
    assert line < 0.003
    assert above < 0.003


def test_events_stay_where_they_happened_when_the_rate_changes() -> None:
    raw = make_raw(seconds=20.0, events=((3.0, 0.5, "bump"), (19.99, 0.0, "last")))
    times = np.arange(raw.n_times) / RATE_HZ
    raw.apply_function(lambda x: 100e-6 * np.exp(-(((times - 3.0) / 0.05) ** 2)), picks=["C3"])
    result = run(raw, replace(PLAIN, rate_hz=64.0))
    bump, last = result.events
    assert bump.label == "bump"
    assert abs(int(result.signal[2].argmax()) - bump.onset) <= 1
    assert bump.duration == 32
    assert last.onset < result.signal.shape[1]


def test_events_of_a_cropped_recording_count_from_its_start() -> None:
    raw = make_raw().crop(1.0)
    assert [event.onset for event in run(raw, PLAIN).events] == [100, 400, 800, 1150, 1890]


def test_an_event_beyond_the_end_is_an_error() -> None:
    raw = make_raw(seconds=10.0, events=())
    raw._annotations = mne.Annotations([12.0], [0.0], ["late"])  # MNE's own setter drops it with a warning
    with pytest.raises(ZooError, match=r"file\.fif: event 'late' at 12\.000 s lies outside .* 10\.000 s"):
        run(raw, PLAIN)


def test_nan_samples_are_an_error_that_says_where() -> None:
    raw = make_raw()
    raw._data[2, 345:350] = np.nan
    with pytest.raises(ZooError, match=r"file\.fif: channel C3 has 5 samples .* at sample 345 \(3\.450 s\)"):
        run(raw, PLAIN)


@pytest.mark.parametrize(("scale", "centre", "width"), [("zscore", "mean", 1.0), ("robust", "median", 1.349**-1)])
def test_scales_taken_from_the_signal(scale: str, centre: str, width: float) -> None:
    signal = run(make_raw(), replace(PLAIN, scale=scale)).signal
    np.testing.assert_allclose(getattr(np, centre)(signal, axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(signal.std(axis=1), width, rtol=0.05)


def test_percentile_scale() -> None:
    signal = run(make_raw(), replace(PLAIN, scale="percentile95")).signal
    np.testing.assert_allclose(np.percentile(np.abs(signal), 95, axis=1), 1, rtol=1e-5)


def test_a_flat_channel_is_zero_and_has_a_line() -> None:
    raw = make_raw()
    raw._data[1] = 3e-6
    result = run(raw, replace(PLAIN, scale="zscore"))
    assert not result.signal[1].any()
    assert "1 flat channels: Fp2" in result.notes


def test_clip_and_float16() -> None:
    result = run(make_raw(), replace(PLAIN, clip=25.0, dtype="float16"))
    assert result.signal.dtype == np.float16
    assert np.abs(result.signal).max() == 25.0


def test_a_signal_too_large_for_the_type_is_an_error() -> None:
    with pytest.raises(ZooError, match="Fp1 does not fit float16"):
        run(make_raw(), replace(PLAIN, unit=1e-12, dtype="float16"))


def test_average_reference_leaves_bad_channels_out_of_the_mean() -> None:
    raw = make_raw(bads=["C3"])
    raw._data[2] *= 100
    signal = run(raw, replace(PLAIN, reference="average")).signal
    np.testing.assert_allclose(np.delete(signal, 2, axis=0).mean(axis=0), 0, atol=1e-4)


def test_interpolated_channels_are_no_longer_bad() -> None:
    raw = make_raw(bads=["C3"])
    raw.set_montage("standard_1005", verbose="error")
    before = raw.get_data("C3")
    result = run(raw, replace(PLAIN, bads="interpolate"))
    assert result.bads == ()
    assert any("interpolated bad channels C3" in note for note in result.notes)
    assert not np.allclose(result.signal[2], before * 1e6)


def test_other_kinds_are_dropped_with_a_line() -> None:
    result = run(make_raw(), PLAIN)
    assert result.montage.names == ("Fp1", "Fp2", "C3", "C4", "O1", "O2")
    assert result.montage.canonical == ("FP1", "FP2", "C3", "C4", "O1", "O2")
    assert result.dropped_channels == 1
    assert "dropped 1 channels: EOG1 (eog)" in result.notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ("mag",)}, "its channels are eeg, eog, wanted mag"),
        ({"lowpass_hz": 60.0}, r"lowpass_hz 60 .* \(50 Hz\)"),
        ({"notch_hz": (50.0,)}, r"notch_hz 50 .* \(50 Hz\)"),
    ],
)
def test_a_recipe_that_does_not_fit_the_file(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        run(make_raw(), replace(PLAIN, **change))


def test_an_unknown_electrode_names_the_file_and_the_channel() -> None:
    with pytest.raises(ZooError, match=r"file\.fif.*XYZ9"):
        run(make_raw(names=("Fp1", "XYZ9")), PLAIN)


def test_meg_positions_and_axes_come_out_in_head_coordinates() -> None:
    info = mne.create_info(["MEG1"], 100.0, "mag")
    quarter_turn = np.array([[0.0, -1, 0, 0.01], [1, 0, 0, 0.02], [0, 0, 1, 0.03], [0, 0, 0, 1]])
    info["chs"][0]["loc"][:] = [0.1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0]
    info["chs"][0]["coord_frame"] = mne.io.constants.FIFF.FIFFV_COORD_DEVICE
    samples = np.random.default_rng(0).normal(0, 1e-12, (1, 300))
    chosen = Recipe(name="meg", kinds=("mag",))
    without = run(mne.io.RawArray(samples, info.copy(), verbose="error"), chosen)
    assert np.isnan(without.montage.position).all()
    assert any("where the head was" in note for note in without.notes)
    with info._unlock():
        info["dev_head_t"] = mne.transforms.Transform("meg", "head", quarter_turn)
    result = run(mne.io.RawArray(samples, info, verbose="error"), chosen)
    np.testing.assert_allclose(result.montage.position, [[0.01, 0.12, 0.03]], atol=1e-7)
    np.testing.assert_allclose(result.montage.orientation, [[0, 1, 0]], atol=1e-7)


def test_continuous_records_cover_every_sample_once() -> None:
    cuts, lost = cut(run(make_raw(seconds=21.0), PLAIN), PLAIN)
    assert not lost
    covered = np.concatenate([np.arange(start, start + size) for start, size, _ in cuts])
    np.testing.assert_array_equal(covered, np.arange(2100))


def test_event_windows_that_cross_an_end_have_a_line() -> None:
    chosen = replace(PLAIN, window=Window(("right", "left"), -0.5, 1.5))
    cuts, lost = cut(run(make_raw(), chosen), chosen)
    assert cuts == [(150, 200, 1), (450, 200, 0), (850, 200, 1)]
    assert lost == ["left out the record at 19.40 s: its window crosses an end of the recording"]


def test_rejected_records_have_a_line() -> None:
    raw = make_raw()
    raw._data[0, 450] = 1e-3
    chosen = replace(PLAIN, reject=500.0)
    cuts, lost = cut(run(raw, chosen), chosen)
    assert 400 not in [start for start, _, _ in cuts]
    assert len(cuts) == 10
    assert len(lost) == 1
    assert "at 4.00 s: its largest magnitude is 1e+03, the recipe rejects 500" in lost[0]
