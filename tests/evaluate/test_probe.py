"""Folds that cannot leak, and classifiers that find what is there and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score

from zoo.errors import ZooError
from zoo.evaluate.linear import LogisticProbe, RowSpace
from zoo.evaluate.probe import Trials, across_folds, blocked_folds, compare, cross_validate, linear_probe


def trials_of(label: np.ndarray, people: int = 1, *, spacing: int = 150, length: int = 200) -> Trials:
    """Trials shared out evenly among people, `spacing` samples apart."""
    n = len(label)
    subject = np.array([f"s{i + 1}" for i in range(people)]).repeat(n // people)
    classes = tuple("abcd"[: label.max() + 1])
    return Trials(label, classes, subject, np.arange(n) % (n // people) * spacing, length)


@dataclass
class Recorder:
    """An estimator that remembers the features it was fitted on and answers class 0."""

    k: int
    log: list[np.ndarray]

    def __deepcopy__(self, memo: dict) -> Recorder:
        return Recorder(self.k, self.log)

    def fit(self, features: np.ndarray, label: np.ndarray) -> None:
        self.log.append(features)

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        return np.tile(np.eye(self.k)[0], (len(features), 1))


@pytest.mark.parametrize("spacing", [30, 150, 500])
def test_blocked_folds_test_every_trial_once_and_keep_a_gap(spacing):
    order = np.random.default_rng(0).permutation(103)
    trials = trials_of(np.arange(103) % 2, spacing=spacing)
    shuffled = Trials(trials.label[order], trials.classes, trials.subject, trials.time[order], 200)
    folds = blocked_folds(shuffled, "s1", 5)
    assert np.array_equal(np.sort(np.concatenate([f.test for f in folds])), np.arange(103))
    for fold in folds:
        train, test = shuffled.time[fold.train], shuffled.time[fold.test]
        assert np.array_equal(test, np.arange(test[0], test[-1] + 1, spacing))
        assert np.array_equal(train, np.sort(train))
        distance = np.abs(train[:, None] - test[None]).min()
        # No window overlaps, one trial at least is left out, and no more than that rule asks.
        assert distance >= max(200, 2 * spacing)
        assert distance < max(200, 2 * spacing) + spacing
        assert len(train) + len(test) >= 103 - 2 * max(1, 200 // spacing)


def test_blocked_folds_defeat_features_that_only_know_the_time():
    # A block design: the class changes every ten trials and the features say which ten these are.
    rng = np.random.default_rng(0)
    run = np.arange(300) // 10
    label = rng.permutation(np.arange(30) % 3)[run]
    features = 3 * rng.normal(size=(30, 40))[run] + rng.normal(size=(300, 40))
    shuffled = StratifiedKFold(5, shuffle=True, random_state=0)
    assert cross_val_score(LogisticRegression(max_iter=1000), features, label, cv=shuffled).mean() > 0.9
    accuracy = linear_probe(features, trials_of(label)).within.scores["s1"].balanced_accuracy
    # Below one third is to be expected: the class of a run left out is rarer among the others.
    assert accuracy.value < 0.4


def test_a_class_in_the_features_is_found_within_and_across():
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, 240)
    features = np.eye(3)[label] @ rng.normal(size=(3, 20)) + rng.normal(size=(240, 20))
    result = linear_probe(features, trials_of(label, people=2))
    for part in (result.within, result.across):
        assert set(part.scores) == {"s1", "s2", "mean"}
        assert part.scores["mean"].balanced_accuracy.low > 0.8
        people = [part.scores[p].balanced_accuracy.value for p in ("s1", "s2")]
        assert part.scores["mean"].balanced_accuracy.value == pytest.approx(np.mean(people))
        assert np.allclose(part.probability.sum(1), 1)
    noisier = linear_probe(features + 3 * rng.normal(size=features.shape), trials_of(label, people=2))
    assert compare(result, noisier)["within"].low > 0
    assert compare(noisier, result)["across"].high < 0


def test_features_of_noise_give_chance():
    rng = np.random.default_rng(2)
    label = rng.integers(0, 2, 400)
    result = linear_probe(rng.normal(size=(400, 30)), trials_of(label, people=2))
    for part in (result.within, result.across):
        assert part.scores["mean"].balanced_accuracy.low < 0.5 < part.scores["mean"].balanced_accuracy.high


@pytest.mark.parametrize("people", [2, 3])
def test_across_never_fits_on_the_tested_person(people):
    trials = trials_of(np.arange(30 * people) % 2, people)
    person = np.searchsorted(trials.people, trials.subject)
    log: list[np.ndarray] = []
    result = cross_validate(person[:, None].astype(float), trials, Recorder(2, log))
    assert result.across is not None
    assert [set(seen.ravel()) for seen in log[: 5 * people]] == [{p} for p in range(people) for _ in range(5)]
    assert [set(seen.ravel()) for seen in log[5 * people :]] == [set(range(people)) - {p} for p in range(people)]
    assert np.array_equal(np.sort(np.concatenate([f.test for f in across_folds(trials)])), np.arange(30 * people))


def test_a_test_trial_is_judged_alone():
    # Nothing is learned from test trials, so wrecking half of a person leaves the other half's predictions.
    rng = np.random.default_rng(3)
    label = rng.integers(0, 2, 120)
    features = label[:, None] + rng.normal(size=(120, 200))
    trials = trials_of(label, people=2)
    wrecked = features.copy()
    wrecked[90:] *= 1e6
    before, after = (
        cross_validate(f, trials, LogisticProbe(inner_folds=2)).across.probability for f in (features, wrecked)
    )
    assert np.array_equal(before[60:90], after[60:90])
    assert not np.allclose(before[90:], after[90:])


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("width", [20, 400])
def test_fitting_in_the_row_space_is_fitting_on_the_features(k, width):
    rng = np.random.default_rng(4)
    label = np.arange(90) % k
    features = rng.normal(size=(90, width)) * rng.uniform(0.1, 10, width) + rng.normal(size=width)
    features[:, :5] += label[:, None]
    features[:, 7] = 3.25  # a dead feature
    new = rng.normal(size=(50, width))
    new[:, 7] = 3.25
    model = LogisticProbe(strengths=(1.0,)).fit(features, label)
    scale = np.where(features.std(0) > 0, features.std(0), 1)
    direct = LogisticRegression(C=1 / width, max_iter=5000, tol=1e-8).fit((features - features.mean(0)) / scale, label)
    expected = direct.predict_proba((new - features.mean(0)) / scale)
    assert np.allclose(model.predict_proba(new), expected, atol=2e-3)
    assert RowSpace.of(features).coordinates.shape == (90, min(89, width))


def test_the_penalty_is_chosen_to_suit_the_data():
    rng = np.random.default_rng(5)
    label = np.arange(200) % 2
    noise = rng.normal(size=(200, 300))
    weak, strong = LogisticProbe(), LogisticProbe(strengths=(1e5,))
    informative = noise.copy()
    informative[:, 0] += 2 * label
    new = rng.normal(size=(200, 300))
    new[:, 0] += 2 * label
    chosen, overfitted = (m.fit(informative, label).predict_proba(new) for m in (weak, strong))
    loss = [-np.log(p[np.arange(200), label]).mean() for p in (chosen, overfitted)]
    assert loss[0] < loss[1] - 0.05


def test_trials_of_windows_put_recordings_one_after_the_other():
    windows = SimpleNamespace(
        signal=np.zeros((4, 2, 50)),
        label=np.array([0, 1, 0, 1]),
        classes=("a", "b"),
        subject=np.array(["s1"] * 4),
        recording=np.array([1, 0, 1, 0]),
        onset=np.array([10, 400, 300, 20]),
    )
    trials = Trials.of(windows)
    assert trials.length == 50
    assert trials.of_person("s1").tolist() == [3, 1, 0, 2]
    assert np.diff(np.sort(trials.time)).min() >= 50


def test_blocks_are_runs_of_one_person():
    trials = trials_of(np.arange(250) % 2, people=2)
    for block in np.unique(trials.blocks):
        rows = np.flatnonzero(trials.blocks == block)
        assert len(set(trials.subject[rows])) == 1
        assert np.array_equal(rows, np.arange(rows[0], rows[-1] + 1))
        assert len(rows) == 5


def test_one_person_has_no_across_and_json_holds_every_score():
    rng = np.random.default_rng(6)
    label = np.arange(60) % 2
    result = linear_probe(label[:, None] + rng.normal(size=(60, 3)), trials_of(label))
    assert result.across is None
    read = json.loads(json.dumps(result.to_json()))
    assert read["classes"] == ["a", "b"]
    assert set(read) == {"classes", "within"}
    assert set(read["within"]["s1"]["kappa"]) == {"value", "low", "high"}
    assert np.sum(read["within"]["mean"]["confusion"]) == 60


def test_bad_input_is_named():
    label = np.arange(40) % 2
    features = np.random.default_rng(0).normal(size=(40, 3))
    trials = trials_of(label)
    with pytest.raises(ZooError, match="trial 7 are not all finite"):
        linear_probe(np.where(np.arange(40)[:, None] == 7, np.nan, features), trials)
    with pytest.raises(ZooError, match=r"\(39, 3\) for 40 trials"):
        linear_probe(features[1:], trials)
    with pytest.raises(ZooError, match="s1: 40 trials for 25 folds"):
        linear_probe(features, trials, folds=25)
    with pytest.raises(ZooError, match="s1: the training trials of a fold lack a class of a, b"):
        linear_probe(features, trials_of(np.repeat([1, 0], [4, 36])))
    with pytest.raises(ZooError, match="one of each a trial"):
        Trials(label, ("a", "b"), np.array(["s1"]), label, 10)
