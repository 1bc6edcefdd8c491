"""Can a linear classifier read the classes off frozen features? Within a person and from person to person.

Within a person: k folds, each a contiguous run of the person's trials, with a gap around it, so that slow
drifts and overlapping windows cannot tell a test trial's class. Across people: fitted on all people but one,
tested on that one (with two people: each on the other).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.errors import ZooError
from zoo.evaluate.linear import Estimator, LogisticProbe
from zoo.evaluate.metrics import Interval, Scores, paired_difference, scores

if TYPE_CHECKING:
    from zoo.data.windows import Windows


@dataclass(frozen=True)
class Trials:
    """What is known of N trials besides their features.

    label: [N] int in 0..K−1. classes: K names. subject: [N] who. time: [N] int, first sample of the window on
    one time line a person. length: samples of a window.
    """

    label: np.ndarray
    classes: tuple[str, ...]
    subject: np.ndarray
    time: np.ndarray
    length: int

    def __post_init__(self) -> None:
        if not self.label.shape == self.subject.shape == self.time.shape:
            raise ZooError(
                f"trials: label {self.label.shape}, subject {self.subject.shape}, time {self.time.shape}; "
                "wanted one of each a trial"
            )

    @classmethod
    def of(cls, windows: Windows) -> Trials:
        """The trials of cut windows; recordings are laid one after the other on the time line."""
        length = windows.signal.shape[-1]
        stride = int(windows.onset.max()) + length
        time = windows.recording.astype(np.int64) * stride + windows.onset
        return cls(windows.label, windows.classes, windows.subject, time, length)

    @property
    def people(self) -> tuple[str, ...]:
        return tuple(str(name) for name in np.unique(self.subject))

    def of_person(self, person: str) -> np.ndarray:
        """Indices of a person's trials in time order."""
        rows = np.flatnonzero(self.subject == person)
        return rows[np.argsort(self.time[rows], kind="stable")]

    @property
    def blocks(self) -> np.ndarray:
        """[N] ids of runs of about n^(1/3) neighbouring trials of a person's n, to be drawn together.

        That rate is the one at which the block bootstrap's error falls fastest (Hall, Horowitz and Jing
        1995).
        """
        ids = np.empty(len(self.label), np.int64)
        count = 0
        for person in self.people:
            rows = self.of_person(person)
            runs = np.array_split(rows, round(len(rows) ** (2 / 3)))
            for number, run in enumerate(runs, start=count):
                ids[run] = number
            count += len(runs)
        return ids


@dataclass(frozen=True)
class Fold:
    """Indices of training trials, in person and time order, and of test trials."""

    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Predictions:
    """Out-of-fold predictions of every trial: prediction [N] int, probability [N, K]."""

    prediction: np.ndarray
    probability: np.ndarray
    scores: dict[str, Scores]
    """A person's name, or "mean" over people → scores on that person's trials."""


@dataclass(frozen=True)
class ProbeResult:
    """Predictions within each person and from the others to each person (None when there is one person)."""

    trials: Trials
    within: Predictions
    across: Predictions | None

    def to_json(self) -> dict[str, Any]:
        return {
            "classes": list(self.trials.classes),
            **{
                name: {who: s.to_json() for who, s in part.scores.items()}
                for name, part in (("within", self.within), ("across", self.across))
                if part is not None
            },
        }


def linear_probe(features: np.ndarray, trials: Trials, *, folds: int = 5) -> ProbeResult:
    """Logistic regression on frozen features [N, F]; everything is learned on training trials only.

    Raises ZooError for features that are not finite or not one row a trial, and for too few trials.
    """
    return cross_validate(features, trials, LogisticProbe(), folds=folds)


def cross_validate(features: np.ndarray, trials: Trials, estimator: Estimator, *, folds: int = 5) -> ProbeResult:
    """Fits a fresh copy of `estimator` on every fold and scores it; see `linear_probe`.

    Estimators compared in one table share these folds.
    """
    if features.ndim != 2 or len(features) != len(trials.label):
        raise ZooError(f"features {features.shape} for {len(trials.label)} trials; wanted one row a trial")
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
        raise ZooError(f"features of trial {row} are not all finite")
    within = [fold for person in trials.people for fold in blocked_folds(trials, person, folds)]
    across = across_folds(trials) if len(trials.people) > 1 else None
    return ProbeResult(
        trials,
        _predict(features, trials, estimator, within),
        None if across is None else _predict(features, trials, estimator, across),
    )


def blocked_folds(trials: Trials, person: str, folds: int) -> list[Fold]:
    """A person's trials as `folds` contiguous runs, each the test set once.

    Left out of training besides the run itself: one trial at either side of it, and every trial whose window
    overlaps one of the run's.
    """
    rows = trials.of_person(person)
    if len(rows) < 2 * folds:
        raise ZooError(f"{person}: {len(rows)} trials for {folds} folds; wanted at least {2 * folds}")
    time = trials.time[rows]
    result = []
    for run in np.array_split(np.arange(len(rows)), folds):
        first, last = run[0], run[-1]
        before = (np.arange(len(rows)) < first - 1) & (time + trials.length <= time[first])
        after = (np.arange(len(rows)) > last + 1) & (time >= time[last] + trials.length)
        result.append(Fold(rows[before | after], rows[run]))
    return result


def across_folds(trials: Trials) -> list[Fold]:
    """Each person tested once, by a model that never saw that person."""
    rows = {person: trials.of_person(person) for person in trials.people}
    return [Fold(np.concatenate([rows[other] for other in rows if other != person]), rows[person]) for person in rows]


def compare(a: ProbeResult, b: ProbeResult) -> dict[str, Interval]:
    """Balanced accuracy of a minus that of b, mean over people, "within" and "across", paired over trials."""
    return {
        name: paired_difference(
            a.trials.label,
            ours.prediction,
            theirs.prediction,
            subject=a.trials.subject,
            block=a.trials.blocks,
        )
        for name, ours, theirs in (("within", a.within, b.within), ("across", a.across, b.across))
        if ours is not None and theirs is not None
    }


def _predict(features: np.ndarray, trials: Trials, estimator: Estimator, folds: list[Fold]) -> Predictions:
    """Every trial predicted by the fold that holds it out."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    classes = np.arange(len(trials.classes))
    probability = np.full((len(trials.label), len(classes)), np.nan)
    for fold in folds:
        if not np.array_equal(np.unique(trials.label[fold.train]), classes):
            raise ZooError(
                f"{trials.subject[fold.test[0]]}: the training trials of a fold lack a class of "
                f"{', '.join(trials.classes)}; "
                "wanted every class throughout the recording"
            )
        model = copy.deepcopy(estimator)
        # Iterative solvers make thousands of small products: with a second thread they are 5 times slower, and
        # 25 times where other programs use the cores too.
        with threadpool_limits(1):
            model.fit(features[fold.train], trials.label[fold.train])
        probability[fold.test] = model.predict_proba(features[fold.test])
    prediction, blocks = probability.argmax(1), trials.blocks
    subsets = {person: trials.of_person(person) for person in trials.people}
    subsets["mean"] = np.arange(len(trials.label))
    return Predictions(
        prediction,
        probability,
        {
            name: scores(
                trials.label[rows],
                prediction[rows],
                probability[rows],
                trials.classes,
                subject=trials.subject[rows],
                block=blocks[rows],
            )
            for name, rows in subsets.items()
        },
    )
