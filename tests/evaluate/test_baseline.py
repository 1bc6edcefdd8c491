"""Shrinkage LDA: equal to scikit-learn's, and a fair opponent on real windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from zoo.errors import ZooError
from zoo.evaluate.baseline import ShrinkageLDA, lda_baseline, window_features
from zoo.evaluate.probe import Trials


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("width", [15, 250])
def test_equals_scikit_learn_on_the_standardised_features(k, width):
    rng = np.random.default_rng(0)
    label = np.arange(60) % k
    mixing = rng.normal(size=(width, width))
    features = (rng.normal(size=(60, width)) + 0.5 * np.eye(k, width)[label]) @ mixing
    new = rng.normal(size=(40, width)) @ mixing
    mean, scale = features.mean(0), features.std(0)
    reference = LinearDiscriminantAnalysis("lsqr", covariance_estimator=LedoitWolf())
    reference.fit((features - mean) / scale, label)
    ours = ShrinkageLDA().fit(features, label).predict_proba(new)
    assert np.allclose(ours, reference.predict_proba((new - mean) / scale), atol=1e-6)


def test_features_are_means_of_runs_at_25_to_50_hz():
    signal = np.arange(2 * 3 * 206, dtype=np.float32).reshape(2, 3, 206)
    features = window_features(signal, 200)
    assert features.shape == (2, 3 * 25)
    assert features[0, 0] == signal[0, 0, :8].mean()
    assert features[1, 25 + 3] == signal[1, 1, 24:32].mean()
    assert np.array_equal(window_features(signal, 45), signal.reshape(2, -1))
    with pytest.raises(ZooError, match="5 samples at 200 Hz; wanted at least 8"):
        window_features(signal[..., :5], 200)


def test_reads_faces_from_real_recordings(faces_eeg: Path):
    from zoo.data.readers import discover, read

    windows, label, subject, time = [], [], [], []
    for source in discover(faces_eeg):
        raw = read(source).raw.pick("eeg").crop(0, 420).load_data()
        raw.set_eeg_reference("average", verbose="ERROR").filter(0.5, 15, method="iir", verbose="ERROR")
        raw.resample(50, verbose="ERROR")
        signal = raw.get_data(units="uV").astype(np.float32)
        for event in raw.annotations:
            kind = event["description"].split("-")[0]
            start = round(event["onset"] * 50) - 5
            if kind in ("checker", "face", "house") and 0 <= start <= signal.shape[1] - 50:
                windows.append(signal[:, start : start + 50])
                label.append(("checker", "face", "house").index(kind))
                subject.append(source.subject)
                time.append(start)
    trials = Trials(np.array(label), ("checker", "face", "house"), np.array(subject), np.array(time), 50)
    result = lda_baseline(np.stack(windows), 50, trials)
    assert len(trials.people) == 2
    for person in trials.people:
        assert result.within.scores[person].balanced_accuracy.low > 0.6
        assert result.across.scores[person].balanced_accuracy.low > 0.4
