"""Scores against hand-computed values, scikit-learn and their promised coverage."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from zoo.errors import ZooError
from zoo.evaluate import metrics
from zoo.evaluate.metrics import paired_difference, scores

ABC = ("a", "b", "c")


def certain(prediction: np.ndarray, k: int) -> np.ndarray:
    return np.eye(k)[prediction]


def test_perfect_predictions_score_one_without_spread():
    label = np.tile([0, 1, 2], 20)
    result = scores(label, label, certain(label, 3), ABC)
    for score in (result.balanced_accuracy, result.kappa, result.weighted_f1, result.auroc):
        assert score == (1, 1, 1)
    assert np.array_equal(result.confusion, 20 * np.eye(3))


def test_guessing_scores_chance_inside_the_interval():
    rng = np.random.default_rng(0)
    label, guess = rng.integers(0, 3, (2, 900))
    result = scores(label, guess, rng.dirichlet(np.ones(3), 900), ABC)
    for score, chance in (
        (result.balanced_accuracy, 1 / 3),
        (result.kappa, 0),
        (result.weighted_f1, 1 / 3),
        (result.auroc, 1 / 2),
    ):
        assert score.low < chance < score.high
        assert score.high - score.low < 0.12


def test_scores_of_a_confusion_matrix_worked_by_hand():
    # 20 of 25 and 15 of 25 right: agreement .7, expected (25 · 30 + 25 · 20) / 50² = .5, kappa .2 / .5.
    label = np.repeat([0, 1], 25)
    prediction = np.r_[np.repeat([0, 1], [20, 5]), np.repeat([0, 1], [10, 15])]
    result = scores(label, prediction, certain(prediction, 2), ("a", "b"))
    assert result.confusion.tolist() == [[20, 5], [10, 15]]
    assert result.balanced_accuracy.value == pytest.approx(0.7)
    assert result.kappa.value == pytest.approx(0.4)
    assert result.weighted_f1.value == pytest.approx((40 / 55 + 30 / 45) / 2)
    assert result.auroc.value == pytest.approx(0.7)


@pytest.mark.parametrize("k", [2, 3])
def test_every_draw_equals_scikit_learn_on_the_drawn_trials(k):
    rng = np.random.default_rng(1)
    label = np.r_[np.arange(k), rng.integers(0, k, 60)]
    # Coarse probabilities tie often.
    raw = np.round(rng.dirichlet(np.ones(k), len(label)), 1)[:, 1:]
    probability = np.column_stack([1 - raw.sum(1), raw])
    prediction = probability.argmax(1)
    weights = metrics.draw_weights(label, None, rng)[:5]
    counted = metrics._count_scores(weights, label, prediction, k)
    areas = metrics._auroc(weights, label, probability)
    for draw, weight in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(len(label)), weight)
        y, p, q = label[rows], prediction[rows], probability[rows]
        assert counted["balanced_accuracy"][draw] == pytest.approx(sk.balanced_accuracy_score(y, p))
        assert counted["kappa"][draw] == pytest.approx(sk.cohen_kappa_score(y, p))
        assert counted["weighted_f1"][draw] == pytest.approx(sk.f1_score(y, p, average="weighted"))
        area = sk.roc_auc_score(y, q[:, 1] if k == 2 else q, multi_class="ovr")
        assert areas[draw] == pytest.approx(area, rel=1e-5)


def test_draws_keep_class_counts_without_blocks_and_keep_blocks_whole_with_them():
    label = np.repeat([0, 1], [30, 10])
    rng = np.random.default_rng(0)
    alone = metrics.draw_weights(label, None, rng)
    assert (alone[:, label == 0].sum(1) == 30).all()
    assert (alone[:, label == 1].sum(1) == 10).all()
    block = np.arange(40) // 5
    together = metrics.draw_weights(label, block, rng).reshape(-1, 8, 5)
    assert (together == together[:, :, :1]).all()
    assert (together.sum((1, 2)) == 40).all()


def coverage(monkeypatch, run: int, use_blocks: bool) -> float:
    """Share of 200 experiments whose interval holds the true .8; trials are right or wrong in whole runs."""
    monkeypatch.setattr(metrics, "DRAWS", 400)
    rng = np.random.default_rng(2)
    label = np.tile([0, 1], 120)
    held = 0
    for _ in range(200):
        right = np.repeat(rng.random(len(label) // run) < 0.8, run)
        prediction = np.where(right, label, 1 - label)
        block = np.arange(len(label)) // run if use_blocks else None
        accuracy = scores(label, prediction, certain(prediction, 2), ("a", "b"), block=block).balanced_accuracy
        held += accuracy.low <= 0.8 <= accuracy.high
    return held / 200


def test_intervals_of_independent_trials_hold_the_truth_as_often_as_they_say(monkeypatch):
    assert 0.91 <= coverage(monkeypatch, run=1, use_blocks=False) <= 0.99


def test_only_blocks_give_dependent_trials_honest_intervals(monkeypatch):
    assert coverage(monkeypatch, run=8, use_blocks=False) < 0.75
    assert coverage(monkeypatch, run=8, use_blocks=True) > 0.88


def test_several_people_are_scored_apart_and_averaged():
    # One person all right with many trials, one all wrong with few: the mean does not follow the many.
    label = np.tile([0, 1], 50)
    subject = np.repeat(["s1", "s2"], [80, 20])
    prediction = np.where(subject == "s1", label, 1 - label)
    result = scores(label, prediction, certain(prediction, 2), ("a", "b"), subject=subject)
    assert result.balanced_accuracy == (0.5, 0.5, 0.5)
    assert result.confusion.tolist() == [[40, 10], [10, 40]]


def test_paired_difference_is_narrower_than_two_separate_intervals():
    rng = np.random.default_rng(3)
    label = rng.integers(0, 3, 400)
    a = np.where(rng.random(400) < 0.7, label, (label + 1) % 3)
    b = np.where(rng.random(400) < 0.1, (label + 1) % 3, a)
    difference = paired_difference(label, a, b)
    one = scores(label, a, certain(a, 3), ABC).balanced_accuracy
    two = scores(label, b, certain(b, 3), ABC).balanced_accuracy
    assert difference.value == pytest.approx(one.value - two.value)
    assert 0 < difference.low < difference.value < difference.high
    assert difference.high - difference.low < 0.7 * (one.high - one.low)
    assert paired_difference(label, a, a) == (0, 0, 0)


def test_same_seed_same_interval():
    label = np.tile([0, 1], 20)
    prediction = np.roll(label, 7)
    prediction[:20] = label[:20]
    one, same, other = (
        scores(label, prediction, certain(prediction, 2), ("a", "b"), seed=seed).balanced_accuracy for seed in (0, 0, 1)
    )
    assert one == same
    assert one.value == other.value


def test_bad_input_is_named():
    label = np.array([0, 1, 0, 1])
    with pytest.raises(ZooError, match=r"s2 has no trial of class 'b'"):
        scores(np.array([0, 1, 0, 0]), label, certain(label, 2), ("a", "b"), subject=np.repeat(["s1", "s2"], 2))
    with pytest.raises(ZooError, match=r"wanted \[N\], \[N\] and \[N, 3\]"):
        scores(label, label, certain(label, 2), ABC)
    with pytest.raises(ZooError, match="class numbers 0 to 1"):
        scores(label + 1, label, certain(label, 2), ("a", "b"))
