"""The figures of a training run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.image import imread

from zoo.errors import ZooError
from zoo.train.plots import curves, reconstruction


def written(path, lines) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_draw_what_the_run_wrote(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "loss": 1 / (s + 1), "learning_rate": 1e-3, "gradient_norm": 1.0} for s in range(40)]
    written(metrics, [*lines, {"step": 20, "validation_loss": 0.5}, {"step": 39, "validation_loss": 0.4}])
    curves(metrics, tmp_path / "curves.png")
    three_panels = imread(tmp_path / "curves.png")
    assert three_panels.std() > 0.05
    written(metrics, [{"step": s, "loss": 1.0} for s in range(40)])
    curves(metrics, tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").shape[0] < 0.6 * three_panels.shape[0]


def test_a_step_written_twice_counts_as_written_last(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    written(metrics, [{"step": s, "loss": 9.0} for s in (1, 2)] + [{"step": s, "loss": float(s)} for s in (2, 3)])
    curves(metrics, tmp_path / "resumed.png")
    written(metrics, [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 3.0}])
    curves(metrics, tmp_path / "straight.png")
    assert np.array_equal(imread(tmp_path / "resumed.png"), imread(tmp_path / "straight.png"))


def test_curves_name_a_file_they_cannot_use(tmp_path):
    with pytest.raises(ZooError, match=r"absent\.jsonl: not a metrics file"):
        curves(tmp_path / "absent.jsonl", tmp_path / "out.png")
    written(tmp_path / "other.jsonl", [{"step": 1, "speed": 3}])
    with pytest.raises(ZooError, match=r"other\.jsonl: holds none of loss"):
        curves(tmp_path / "other.jsonl", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_reconstruction_is_drawn_for_masked_channels(tmp_path):
    rng = np.random.default_rng(0)
    original = rng.normal(size=(8, 400))
    mask = np.zeros((8, 4), bool)
    mask[5, 1:3] = True
    names = [f"E{i}" for i in range(8)]
    reconstruction(original, 0.5 * original, mask, 200, names, tmp_path / "one.png", unit="µV")
    mask[2:4, 0] = True
    reconstruction(original, 0.5 * original, mask, 200, names, tmp_path / "three.png", unit="µV")
    one, three = imread(tmp_path / "one.png"), imread(tmp_path / "three.png")
    assert one.std() > 0.05
    assert three.shape[0] > 1.5 * one.shape[0]


def test_reconstruction_refuses_arrays_that_do_not_fit(tmp_path):
    signal = np.zeros((2, 100))
    with pytest.raises(ZooError, match=r"mask \(2, 3\); wanted"):
        reconstruction(signal, signal, np.ones((2, 3), bool), 100, "ab", tmp_path / "out.png")
    with pytest.raises(ZooError, match="something masked"):
        reconstruction(signal, signal, np.zeros((2, 4), bool), 100, "ab", tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_rebuilt_whole_needs_no_mask(tmp_path):
    original = np.random.default_rng(0).normal(size=(4, 200))
    reconstruction(original, 0.5 * original, None, 200, "abcd", tmp_path / "whole.png")
    assert imread(tmp_path / "whole.png").std() > 0.05
