"""Linear classifiers for few trials and many features, both fitted in the row space of the training trials.

With n training trials of F > n features, a classifier whose penalty does not change under rotation has its
weights in the span of the n trials. Fitting n coordinates instead of F features gives the same classifier and
takes n² instead of F² memory: 26,000 features cost as much as 1,000.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from zoo.errors import ZooError


class Estimator(Protocol):
    """What `zoo.evaluate.probe.cross_validate` fits: scikit-learn's convention, labels 0..K−1."""

    def fit(self, features: np.ndarray, label: np.ndarray) -> Any:
        """Learns from features [n, F] and labels [n], rows in time order, person after person."""

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        """[n, K] class probabilities."""


@dataclass(frozen=True)
class RowSpace:
    """Training trials [n, F], standardised, in coordinates [n, R] of their own span (R < n, or R = F).

    standard: [n, F] float64, mean 0 and variance 1 over the training trials; a feature that never varies is
    zero. dual: [n, R], the coordinates' axes as sums of training trials; None when the coordinates are the
    features.
    """

    mean: np.ndarray
    scale: np.ndarray
    standard: np.ndarray
    coordinates: np.ndarray
    dual: np.ndarray | None

    @classmethod
    def of(cls, features: np.ndarray) -> RowSpace:
        from scipy.linalg import eigh

        standard = features.astype(np.float64)
        mean = standard.mean(0)
        standard -= mean
        scale = np.sqrt(np.einsum("nf,nf->f", standard, standard) / len(standard))
        scale[scale <= 1e-7 * np.abs(mean)] = np.inf
        standard /= scale
        if standard.shape[1] <= standard.shape[0]:
            return cls(mean, scale, standard, standard, None)
        # The eigenvectors of the n × n Gram matrix are the left singular vectors and cheaper than an SVD.
        squared, vectors = eigh(standard @ standard.T)
        kept = squared > 1e-10 * squared[-1]
        singular, vectors = np.sqrt(squared[kept]), vectors[:, kept]
        return cls(mean, scale, standard, vectors * singular, vectors / singular)

    def on_features(self, weights: np.ndarray, intercept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A linear map of the coordinates (weights [R, K], intercept [K]) as one of the features as given."""
        if self.dual is not None:
            weights = self.standard.T @ (self.dual @ weights)
        weights = weights / self.scale[:, None]
        return weights, intercept - self.mean @ weights


class LinearClassifier:
    """Softmax of a linear map of the features: what both classifiers are once fitted."""

    weights: np.ndarray
    intercept: np.ndarray

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        from scipy.special import softmax

        return softmax(features @ self.weights + self.intercept, axis=1)


@dataclass
class LogisticProbe(LinearClassifier):
    """Multinomial logistic regression, L2 penalty chosen by log loss on blocked folds of the training trials.

    strengths: candidates for C × F, ascending (C as in scikit-learn; times the number of features because the
    squared length of a standardised trial is F). Each inner fold scores one contiguous run of training trials
    and leaves out the trial at either side of it, so that overlapping windows never straddle.
    """

    strengths: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    inner_folds: int = 3

    def fit(self, features: np.ndarray, label: np.ndarray) -> LogisticProbe:
        space = RowSpace.of(features)
        penalties = np.asarray(self.strengths) / features.shape[1]
        blocks = np.array_split(np.arange(len(label)), self.inner_folds)
        losses = sum(_inner_losses(space.coordinates, label, block, penalties) for block in blocks)
        best = penalties[[np.argmin(losses)]]
        (model,) = _logistic_path(space.coordinates, label, best)
        self.weights, self.intercept = space.on_features(*class_logits(model))
        return self


def class_logits(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weights [R, K] and intercept [K] of a scikit-learn classifier (one logit for two classes)."""
    weights, intercept = model.coef_.T, model.intercept_
    if weights.shape[1] == 1:
        return np.pad(weights, [(0, 0), (1, 0)]), np.pad(intercept, (1, 0))
    return weights, intercept


def _inner_losses(x: np.ndarray, label: np.ndarray, test: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """Log loss on the trials `test` of models fitted on the others less its neighbours, one a penalty."""
    from sklearn.metrics import log_loss

    train = np.r_[: max(test[0] - 1, 0), test[-1] + 2 : len(label)]
    if set(label[train]) != set(label):
        raise ZooError(
            "logistic probe: the training trials lack a class once a block of them is held out to choose the "
            "penalty; wanted every class throughout the recording"
        )
    models = _logistic_path(x[train], label[train], penalties)
    return np.array([log_loss(label[test], m.predict_proba(x[test]), labels=m.classes_) for m in models])


def _logistic_path(x: np.ndarray, label: np.ndarray, penalties: np.ndarray) -> Iterator[Any]:
    """scikit-learn models fitted at each C in turn, every one started from the last."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=2000, warm_start=True)
    for c in penalties:
        yield model.set_params(C=c).fit(x, label)
