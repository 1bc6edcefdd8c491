"""Windows hold the samples around their events, and count what they leave out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import PLAIN

from zoo.data.prepare import prepare
from zoo.data.recipes import Window
from zoo.data.store import Dataset
from zoo.data.windows import event_windows
from zoo.errors import ZooError

SIDES = {"left": ("left",), "right": ("right",)}


def test_windows_are_the_samples_around_the_events(dataset: Dataset) -> None:
    windows = event_windows(dataset, SIDES, -0.5, 1.2)
    assert windows.signal.shape == (6 * 3 + 4, 6, 170)  # the last event of the 21 s runs comes too late
    assert windows.left_out == {"reaches beyond an end of the recording": 2}
    assert windows.classes == ("left", "right")
    assert windows.label[:3].tolist() == [0, 1, 0]
    assert windows.onset[:3].tolist() == [200, 500, 900]
    for window, number, onset in zip(windows.signal, windows.recording, windows.onset, strict=True):
        wanted = dataset.read(number, onset - 50, onset + 120)
        np.testing.assert_array_equal(window[: len(wanted)], wanted)
        assert not window[len(wanted) :].any()
    subjects = [dataset.recordings[number].subject for number in windows.recording]
    assert windows.subject.tolist() == subjects


def test_sensors_follow_the_recording(dataset: Dataset) -> None:
    windows = event_windows(dataset, SIDES, 0.0, 0.5)
    valid = windows.sensors["valid"][windows.recording]
    assert valid.shape == (len(windows.label), 6)
    assert not valid[windows.subject == "s3", 4:].any()
    assert valid[windows.subject == "s1"].all()


def test_one_class_may_pool_several_labels(dataset: Dataset) -> None:
    pooled = event_windows(dataset, {"side": ("left", "right")}, 0.0, 0.5)
    assert len(pooled.label) == len(event_windows(dataset, SIDES, 0.0, 0.5).label)
    assert not pooled.label.any()


def test_baseline_is_subtracted(dataset: Dataset) -> None:
    windows = event_windows(dataset, SIDES, -0.2, 0.5, baseline=(-0.2, 0.0))
    np.testing.assert_allclose(windows.signal[:, :, :20].mean(axis=-1), 0, atol=1e-5)
    plain = event_windows(dataset, SIDES, -0.2, 0.5)
    np.testing.assert_allclose(np.diff(windows.signal), np.diff(plain.signal), atol=2e-5)


def test_windows_that_touch_a_bad_stretch_can_be_rejected(dataset: Dataset) -> None:
    # The jump lasts from 12.5 to 13.5 s; the windows of the events at 9 s reach to 13 s.
    kept = event_windows(dataset, {"left": ("left",)}, 0.0, 4.0)
    clean = event_windows(dataset, {"left": ("left",)}, 0.0, 4.0, reject_bad=True)
    assert len(kept.label) == 12
    assert clean.onset.tolist() == [200] * 6
    assert clean.left_out == {"touches a bad stretch": 6}


@pytest.mark.parametrize(
    ("classes", "tmin", "tmax", "message"),
    [
        (
            {"up": ("upward",)},
            0.0,
            1.0,
            "class 'up' wants events called 'upward'; the recordings have BAD_jump, left",
        ),
        ({"a": ("left",), "b": ("left",)}, 0.0, 1.0, "'left' belong to two classes"),
        (SIDES, 1.0, 1.0, "has no samples"),
        (SIDES, 0.0, 60.0, "no window from 0.0 s to 60.0 s is left"),
    ],
)
def test_bad_requests(dataset: Dataset, classes: dict, tmin: float, tmax: float, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        event_windows(dataset, classes, tmin, tmax)


def test_a_baseline_outside_the_window_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(ZooError, match="outside the window"):
        event_windows(dataset, SIDES, 0.0, 1.0, baseline=(-0.2, 0.0))


def test_windows_stored_by_the_recipe_are_the_same(recordings: Path, dataset: Dataset, tmp_path: Path) -> None:
    recipe = replace(PLAIN, window=Window(("left", "right"), -0.5, 1.0))
    prepare(recordings, tmp_path / "out", recipe)
    stored = Dataset.open(tmp_path / "out")
    cut = event_windows(dataset, SIDES, -0.5, 1.0)
    assert stored.label.tolist() == cut.label.tolist()
    for i, window in enumerate(cut.signal):
        np.testing.assert_array_equal(stored[i], window[: len(stored[i])])
    np.testing.assert_array_equal(event_windows(stored, SIDES, -0.5, 1.0).signal, cut.signal)
