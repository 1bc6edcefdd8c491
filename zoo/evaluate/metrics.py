"""Scores of a classifier on single trials, with confidence intervals.

Point values come from scikit-learn. Intervals are percentile bootstrap intervals over trials: they say how
far the score would move with other trials of the same people and the same trained model, and nothing about
other people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from zoo.errors import ZooError

DRAWS = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """A score and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Scores of N trials in K classes; with several people each score is the mean of the people's scores.

    confusion: [K, K] int, rows the true class, columns the predicted one, summed over people.
    """

    trials: int
    balanced_accuracy: Interval
    kappa: Interval
    weighted_f1: Interval
    auroc: Interval
    confusion: np.ndarray

    def to_json(self) -> dict[str, Any]:
        intervals = {name: value._asdict() for name, value in vars(self).items() if isinstance(value, Interval)}
        return {"trials": self.trials, **intervals, "confusion": self.confusion.tolist()}


def scores(
    label: np.ndarray,
    prediction: np.ndarray,
    probability: np.ndarray,
    classes: Sequence[str],
    *,
    subject: np.ndarray | None = None,
    block: np.ndarray | None = None,
    seed: int = 0,
) -> Scores:
    """Balanced accuracy, Cohen's kappa, weighted F1, one-against-rest macro AUROC and the confusion matrix.

    label, prediction: [N] int in 0..K−1. probability: [N, K], rows sum to one. classes: the K names.
    subject: [N] who each trial came from; scores are computed a person and averaged. None: one person.
    block: [N] ids of the runs of neighbouring trials that are drawn together (see `draw_weights`). None:
    single trials. Raises ZooError when shapes disagree or a person has no trial of a class.
    """
    label, prediction, probability = np.asarray(label), np.asarray(prediction), np.asarray(probability)
    k = len(classes)
    if not label.shape == prediction.shape == probability.shape[:1] or probability.shape[1:] != (k,):
        raise ZooError(
            f"scores: label {label.shape}, prediction {prediction.shape}, probability {probability.shape}; "
            f"wanted [N], [N] and [N, {k}]"
        )
    if not np.isin(label, range(k)).all() or not np.isin(prediction, range(k)).all():
        raise ZooError(f"scores: labels and predictions must be class numbers 0 to {k - 1}")
    people = _people(label, subject)
    for name, rows in people.items():
        for missing in set(range(k)) - set(label[rows].tolist()):
            raise ZooError(f"scores: {name} has no trial of class {classes[missing]!r}; wanted at least one")
    rng = np.random.default_rng(seed)
    points, draws = [], []
    for rows in people.values():
        trials = label[rows], prediction[rows], probability[rows]
        weights = draw_weights(label[rows], None if block is None else block[rows], rng)
        points.append(_point_scores(*trials))
        draws.append({**_count_scores(weights, *trials[:2], k), "auroc": _auroc(weights, label[rows], trials[2])})
    means = {
        name: percentile_interval(np.mean([p[name] for p in points]), np.mean([d[name] for d in draws], axis=0))
        for name in points[0]
    }
    return Scores(len(label), **means, confusion=_confusion(label, prediction, k))


def paired_difference(
    label: np.ndarray,
    prediction_a: np.ndarray,
    prediction_b: np.ndarray,
    *,
    subject: np.ndarray | None = None,
    block: np.ndarray | None = None,
    seed: int = 0,
) -> Interval:
    """Balanced accuracy of a minus that of b on the same trials [N], both scored on the same bootstrap draws.

    Narrower than the difference of two separate intervals, as hard trials are hard for both. `subject` and
    `block` as in `scores`.
    """
    k = int(max(np.max(label), np.max(prediction_a), np.max(prediction_b))) + 1
    rng = np.random.default_rng(seed)
    points, draws = [], []
    for rows in _people(label, subject).values():
        weights = draw_weights(label[rows], None if block is None else block[rows], rng)
        # The first row counts every trial once, which is the point value.
        weights = np.concatenate([np.ones_like(weights[:1]), weights])
        a, b = (_count_scores(weights, label[rows], p[rows], k) for p in (prediction_a, prediction_b))
        difference = a["balanced_accuracy"] - b["balanced_accuracy"]
        points.append(difference[0])
        draws.append(difference[1:])
    return percentile_interval(np.mean(points), np.mean(draws, axis=0))


def draw_weights(label: np.ndarray, block: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """[DRAWS, N] float32: how often each bootstrap draw holds each trial.

    Without blocks the draws are stratified by class: an experiment fixes the number of trials a class, so
    redrawing it would add a spread that no repetition has. With blocks, neighbouring trials (overlapping
    windows, slow drifts of attention) stay together and class counts are left to vary, as whole blocks cannot
    be stratified.
    """
    strata = np.zeros_like(label) if block is not None else label
    unit = np.arange(len(label)) if block is None else np.unique(block, return_inverse=True)[1]
    weights = np.empty((DRAWS, len(label)), np.float32)
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        units, unit_of_row = np.unique(unit[rows], return_inverse=True)
        counts = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=DRAWS)
        weights[:, rows] = counts[:, unit_of_row]
    return weights


def _people(label: np.ndarray, subject: np.ndarray | None) -> dict[str, np.ndarray]:
    if subject is None:
        return {"the only person": np.arange(len(label))}
    return {str(name): np.flatnonzero(subject == name) for name in np.unique(subject)}


def percentile_interval(value: np.floating, draws: np.ndarray) -> Interval:
    """`value` between the ends of the middle 95 % of its bootstrap draws; draws that are NaN do not count."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high))


def _point_scores(label: np.ndarray, prediction: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    from sklearn import metrics

    binary = probability.shape[1] == 2
    return {
        "balanced_accuracy": metrics.balanced_accuracy_score(label, prediction),
        "kappa": metrics.cohen_kappa_score(label, prediction),
        "weighted_f1": metrics.f1_score(label, prediction, average="weighted"),
        "auroc": metrics.roc_auc_score(label, probability[:, 1] if binary else probability, multi_class="ovr"),
    }


def _confusion(label: np.ndarray, prediction: np.ndarray, k: int) -> np.ndarray:
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(label, prediction, labels=np.arange(k))


def _count_scores(weights: np.ndarray, label: np.ndarray, prediction: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """The scores that a confusion matrix gives, for every row of weights [D, N] at once: each [D]."""
    cell = np.zeros((len(label), k * k), np.float32)
    cell[np.arange(len(label)), label * k + prediction] = 1
    confusion = (weights @ cell).reshape(-1, k, k).astype(float)
    total = confusion.sum((1, 2))
    true, predicted, hit = confusion.sum(2), confusion.sum(1), np.diagonal(confusion, axis1=1, axis2=2)
    with np.errstate(invalid="ignore"):  # a draw that lacks a class scores the classes it has
        recall = np.where(true > 0, hit / true, np.nan)
        expected = (true * predicted).sum(1) / total**2
        f1 = np.where(true + predicted > 0, 2 * hit / (true + predicted), 0.0)
        kappa = (hit.sum(1) / total - expected) / (1 - expected)
    return {
        "balanced_accuracy": np.nanmean(recall, axis=1),
        "kappa": kappa,
        "weighted_f1": (f1 * true).sum(1) / total,
    }


def _auroc(weights: np.ndarray, label: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Macro one-against-rest area under the ROC curve, ties counting half: [D] for weights [D, N]."""
    areas = []
    for k in range(probability.shape[1]):
        order = np.argsort(probability[:, k], kind="stable")
        _, starts = np.unique(probability[order, k], return_index=True)
        positive = np.add.reduceat(weights[:, order] * (label[order] == k), starts, axis=1)
        negative = np.add.reduceat(weights[:, order] * (label[order] != k), starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative / 2
        with np.errstate(invalid="ignore"):
            areas.append((positive * below).sum(1) / (positive.sum(1) * negative.sum(1)))
    defined = np.isfinite(areas)
    with np.errstate(invalid="ignore"):
        return np.sum(areas, axis=0, where=defined) / defined.sum(0)
