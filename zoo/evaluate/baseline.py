"""The classical decoder every learned one has to beat: shrinkage LDA on the low-passed windows themselves.

Linear discriminant analysis with a shrunken covariance on spatiotemporal features is the standard of single-
trial event-related potentials (Blankertz, Lemm, Treder, Haufe and Müller 2011, NeuroImage 56: 814–825).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.errors import ZooError
from zoo.evaluate.linear import LinearClassifier, RowSpace, class_logits
from zoo.evaluate.probe import ProbeResult, Trials, cross_validate

FEATURE_RATE_HZ = 25.0


def lda_baseline(signal: np.ndarray, rate_hz: float, trials: Trials, *, folds: int = 5) -> ProbeResult:
    """Shrinkage LDA on windows [N, C, T] in the folds of `zoo.evaluate.probe.linear_probe`.

    The reference, filters and channels are those the windows were prepared with.
    """
    return cross_validate(window_features(signal, rate_hz), trials, ShrinkageLDA(), folds=folds)


def window_features(signal: np.ndarray, rate_hz: float) -> np.ndarray:
    """Windows [N, C, T] as [N, C × T'] float32: means of runs of samples, T' at 25 to 50 Hz.

    Averaging is a low-pass (half amplitude near 0.6 × the new rate) that keeps the evoked potentials (below
    about 10 Hz) and leaves few enough features to estimate a covariance. Samples after the last whole run are
    not used.
    """
    run = max(1, int(rate_hz // FEATURE_RATE_HZ))
    trials, channels, samples = signal.shape
    count = samples // run
    if count == 0:
        raise ZooError(f"windows of {samples} samples at {rate_hz:g} Hz; wanted at least {run} samples")
    runs = signal[..., : count * run].reshape(trials, channels, count, run)
    return runs.mean(-1, dtype=np.float32).reshape(trials, channels * count)


@dataclass
class ShrinkageLDA(LinearClassifier):
    """LDA on standardised features with the Ledoit-Wolf covariance within classes.

    Equal to scikit-learn's `LinearDiscriminantAnalysis("lsqr", covariance_estimator=LedoitWolf())`, but
    fitted in the span of the training trials, which is many times faster for 3,200 features.
    """

    def fit(self, features: np.ndarray, label: np.ndarray) -> ShrinkageLDA:
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        space = RowSpace.of(features)
        covariance = _PaddedLedoitWolf(features.shape[1])
        model = LinearDiscriminantAnalysis("lsqr", covariance_estimator=covariance).fit(space.coordinates, label)
        self.weights, self.intercept = space.on_features(*class_logits(model))
        return self


@dataclass
class _PaddedLedoitWolf:
    """Ledoit-Wolf covariance of [n, R] data that stand for [n, n_features] data, zero in the others.

    The estimate turns with the data, but its target (the mean variance) and its shrinkage are averages over
    all features.
    """

    n_features: int

    def fit(self, x: np.ndarray) -> _PaddedLedoitWolf:
        n, f = len(x), self.n_features
        x = x - x.mean(0)
        covariance = x.T @ x / n
        squared_norm = np.einsum("nr,nr->n", x, x)
        variance = squared_norm.mean() / f
        spread = (covariance**2).sum() / f - variance**2
        noise = ((squared_norm**2).mean() - (covariance**2).sum()) / (f * n)
        shrinkage = min(noise / spread, 1.0)
        self.covariance_ = (1 - shrinkage) * covariance + shrinkage * variance * np.eye(len(covariance))
        return self
