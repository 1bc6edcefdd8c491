"""An encoder as an estimator: in the probe's folds, aligned, from given weights, and the same every time."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.evaluate import supervised
from zoo.evaluate.probe import Trials, cross_validate
from zoo.evaluate.supervised import SupervisedEstimator, as_features

NAMES = ("F3", "FZ", "F4", "P3")
ROWS, SAMPLES = 96, 64
RNG = np.random.default_rng(0)
LABEL = np.arange(ROWS) % 2
SUBJECT = np.repeat(["a", "b"], ROWS // 2)
SIGNAL = RNG.normal(size=(ROWS, len(NAMES), SAMPLES)).astype(np.float32)
SIGNAL[np.arange(ROWS), LABEL] += 1.5 * np.sin(np.arange(SAMPLES) / 2)


def estimator(**changes: Any) -> SupervisedEstimator:
    options = {"channels": NAMES, "samples": SAMPLES, "dropout": 0.1}
    given = {"epochs": 12, "batch": 16, "learning_rate": 0.01, "options": options} | changes
    return SupervisedEstimator("eegnet_tiny", NAMES, 64.0, **given)


def test_it_is_fitted_in_the_folds_of_the_probe_with_one_program() -> None:
    time = np.tile(np.arange(ROWS // 2) * SAMPLES, 2)
    trials = Trials(LABEL, ("one", "other"), SUBJECT, time, SAMPLES)
    before = supervised._program.cache_info().misses
    result = cross_validate(as_features(SIGNAL, SUBJECT), trials, estimator(), folds=2)
    assert supervised._program.cache_info().misses == before + 1
    for part in (result.within, result.across):
        assert part.scores["mean"].balanced_accuracy.value > 0.8
        np.testing.assert_allclose(part.probability.sum(1), 1, rtol=1e-5)


def test_the_same_seed_gives_the_same_and_an_ensemble_is_a_mean() -> None:
    features = as_features(SIGNAL, SUBJECT)
    one, other = (estimator(epochs=1, seed=seed).fit(features, LABEL).predict_proba(features) for seed in (0, 1000))
    assert np.abs(one - other).max() > 1e-3
    both = estimator(epochs=1, ensemble=2).fit(features, LABEL).predict_proba(features)
    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-6)
    np.testing.assert_array_equal(estimator(epochs=1).fit(features, LABEL).predict_proba(features), one)


def test_alignment_makes_mean_covariances_the_identity_for_people_known_and_not() -> None:
    mixing = RNG.normal(size=(4, 4)) + 2 * np.eye(4)
    signal = SIGNAL.copy()
    signal[SUBJECT == "b"] = np.einsum("cd,ndt->nct", mixing, signal[SUBJECT == "b"])
    model = estimator(align=True, standardise="none", epochs=0.1)
    rows, people = model._windows(as_features(signal, SUBJECT))
    model._fit_scaling(rows[people == 0], people[people == 0])
    aligned = model._scaled(rows, people)
    for person in (0, 1):
        mine = aligned[people == person]
        covariance = np.einsum("nct,ndt->cd", mine, mine) / (len(mine) * SAMPLES)
        np.testing.assert_allclose(covariance, np.eye(4), atol=1e-4)
    # What is known of a person is what training rows said.
    half = model._scaled(rows[:10], people[:10])
    np.testing.assert_allclose(half, aligned[:10], atol=1e-5)


@pytest.mark.slow
def test_it_begins_from_weights_and_may_leave_them() -> None:
    features = as_features(SIGNAL, SUBJECT)
    first = estimator(epochs=2).fit(features, LABEL).members[0]
    initial = {name: value["encoder"] for name, value in first.items() if "encoder" in value}
    frozen = estimator(epochs=2, initial=initial, encoder_rate=0.0, seed=5).fit(features, LABEL).members[0]
    for name, value in initial.items():
        jax.tree.map(np.testing.assert_array_equal, frozen[name]["encoder"], value)
    head = [member["params"]["head"]["linear"]["kernel"] for member in (first, frozen)]
    assert np.abs(head[0] - head[1]).max() > 0
    with pytest.raises(ZooError, match="initial: its params are not those of the encoder"):
        estimator(initial={"params": {"other": np.zeros(3)}}).fit(features, LABEL)


def test_augmentation_moves_silences_and_adds() -> None:
    def change(shift: int = 0, silenced: float = 0.0, noise: float = 0.0) -> np.ndarray:
        return np.asarray(supervised._augmented(jax.random.key(0), SIGNAL, shift, silenced, noise))

    np.testing.assert_array_equal(change(), SIGNAL)
    moved, padded = change(shift=3), np.pad(SIGNAL, ((0, 0), (0, 0), (3, 3)))
    places = [
        next(at for at in range(7) if np.array_equal(row, whole[:, at : at + SAMPLES]))
        for row, whole in zip(moved, padded, strict=True)
    ]
    assert set(places) == set(range(7))
    silent = (change(silenced=0.25) == 0).all(-1)
    assert silent.mean() == pytest.approx(0.25, abs=0.08)  # of 384: ± .02
    np.testing.assert_allclose((change(noise=0.5) - SIGNAL).std() / SIGNAL.std(), 0.5, rtol=0.1)


def test_rows_and_channels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ZooError, match="got rows of 256 numbers, wanted 4 channels times samples, and one"):
        estimator().fit(np.zeros((4, 256), np.float32), LABEL[:4])
    wrong = SupervisedEstimator("eegnet_tiny", NAMES[::-1], 64.0, {"channels": NAMES, "samples": SAMPLES})
    with pytest.raises(ZooError, match="wanted channels F3, FZ, F4, P3"):
        wrong.fit(as_features(SIGNAL, SUBJECT), LABEL)
    with pytest.raises(ZooError, match="standardise: got 'row'"):
        estimator(standardise="row")
