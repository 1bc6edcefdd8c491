"""Train, validation and test sets that share nothing: by subject, by run, or by blocks of time.

Each returns name -> record indices, in order. Never a shuffle of records: neighbouring windows of one
recording overlap or resemble each other, and a model scored on them is scored on what it has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.data.store import Dataset

Split = dict[str, npt.NDArray[np.int64]]
FRACTIONS: Mapping[str, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}


def by_subject(dataset: Dataset, fractions: Mapping[str, float] = FRACTIONS, seed: int = 0) -> Split:
    """Every person in one set only; ZooError when there are fewer people than sets."""
    return _by_group(dataset, [each.subject for each in dataset.recordings], "subjects", fractions, seed)


def by_run(dataset: Dataset, fractions: Mapping[str, float] = FRACTIONS, seed: int = 0) -> Split:
    """Every recording in one set only; ZooError when there are fewer recordings than sets."""
    return _by_group(dataset, [each.id for each in dataset.recordings], "recordings", fractions, seed)


def by_time(dataset: Dataset, fractions: Mapping[str, float] = FRACTIONS, gap_seconds: float = 0.0) -> Split:
    """Each recording cut into consecutive blocks of time, one a set, in the order of `fractions`.

    The cuts are moved to the start of the nearest record. Records that cross a cut (windows of events may),
    or lie within half of `gap_seconds` of it, are in no set, so no sample is in two. A set may be empty for
    short recordings.
    """
    shares = np.cumsum([0.0, *_shares(fractions)])
    margin = round(gap_seconds * dataset.rate_hz / 2)
    chosen: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in fractions}
    ends = np.searchsorted(dataset.recording, np.arange(1, len(dataset.recordings)))
    for stored, records in zip(dataset.recordings, np.split(np.arange(len(dataset)), ends), strict=True):
        start = dataset.start[records]
        stop = start + dataset.length[records]
        cuts = [start[np.abs(start - share * stored.n_samples).argmin()] for share in shares[1:-1]]
        lows = [-margin, *cuts]
        highs = [*cuts, stored.n_samples + margin]
        for name, low, high in zip(fractions, lows, highs, strict=True):
            chosen[name].append(records[(start >= low + margin) & (stop <= high - margin)])
    return {name: np.concatenate(parts) for name, parts in chosen.items()}


SPLITS: dict[str, Callable[[Dataset, Mapping[str, float]], Split]] = {
    "by_subject": by_subject,
    "by_run": by_run,
    "by_time": by_time,
}
"""The splits `zoo prepare` can store as a dataset's default."""


def _by_group(dataset: Dataset, group: Sequence[str], noun: str, fractions: Mapping[str, float], seed: int) -> Split:
    """Whole groups, in a seeded order, to the set that lacks most of its share of records."""
    shares = dict(zip(fractions, _shares(fractions), strict=True))
    names = sorted(set(group))
    if len(names) < len(shares):
        raise ZooError(f"{dataset.path}: {len(names)} {noun} cannot fill {len(shares)} sets ({', '.join(shares)})")
    records = np.array(group)[dataset.recording]
    chosen: dict[str, list[str]] = {name: [] for name in shares}
    filled = dict.fromkeys(shares, 0)
    order = np.random.default_rng(seed).permutation(names)
    for left, each in zip(range(len(order), 0, -1), order, strict=True):
        empty = [name for name in shares if not chosen[name]]
        candidates = empty if left <= len(empty) else list(shares)
        target = max(candidates, key=lambda name: shares[name] - filled[name] / len(records))
        chosen[target].append(each)
        filled[target] += int((records == each).sum())
    return {name: np.flatnonzero(np.isin(records, chosen[name])) for name in shares}


def _shares(fractions: Mapping[str, float]) -> list[float]:
    values = list(fractions.values())
    if not values or min(values) <= 0 or abs(sum(values) - 1) > 1e-6:
        raise ZooError(f"split fractions are {dict(fractions)}, wanted values above 0 that add up to 1")
    return values
