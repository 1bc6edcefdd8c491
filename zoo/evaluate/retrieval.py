"""Retrieval: how far up the right candidate of a fixed bank stands for each query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from zoo.errors import ZooError
from zoo.evaluate.metrics import Interval, percentile_interval


@dataclass(frozen=True)
class Retrieval:
    """What `retrieval` finds.

    top          k → share of queries whose candidate is among the first k
    chance       k → what guessing gives
    median_rank  1 is the best
    p            of the mean reciprocal rank
    """

    top: Mapping[int, Interval]
    chance: Mapping[int, float]
    median_rank: float
    p: float


def ranks(scores: Float[np.ndarray, "N M"], answer: Int[np.ndarray, " N"] | None = None) -> Float[np.ndarray, " N"]:
    """Rank from 1 of candidate `answer[i]` (i unless given) among the M of row i; of equals half stand before it.

    Raises ZooError for scores that are not finite: they have no order.
    """
    scores = np.asarray(scores)
    if not np.isfinite(scores).all():
        raise ZooError(f"retrieval: {int((~np.isfinite(scores)).sum())} scores are not finite")
    rows = np.arange(len(scores))
    own = scores[rows, rows if answer is None else answer][:, None]
    return 1 + (scores > own).sum(1) + 0.5 * ((scores == own).sum(1) - 1)


def retrieval(
    folds: Sequence[Float[np.ndarray, "_ _"]],
    *,
    top: Sequence[int] = (1, 10),
    permutations: int = 10_000,
    seed: int = 0,
) -> Retrieval:
    """Scores [N, M] of N queries with M ≥ N candidates, query i belonging to candidate i; a matrix a fold and its bank.

    p is the share of assignments of queries to candidates, drawn within each fold, the true one among them, whose mean
    reciprocal rank is no less than the true one's. Intervals are those of a bootstrap over queries, 95 %. Queries that
    are not independent of one another, as those of overlapping windows are not, make both too small.
    """
    rng = np.random.default_rng(seed)
    rank = np.concatenate([ranks(scores) for scores in folds])
    drawn = np.zeros(permutations)
    for scores in folds:
        # The rank of every candidate in every row once, so that an assignment only looks up.
        rows = np.arange(len(scores))
        answers = [np.full(len(scores), column) for column in rows]
        inverse = 1 / np.stack([ranks(scores, answer) for answer in answers], axis=1)
        drawn += [inverse[rows, rng.permutation(rows)].sum() for _ in range(permutations)]
    as_good = int(np.sum(drawn >= np.sum(1 / rank) - 1e-9))
    again = rng.integers(len(rank), size=(2000, len(rank)))
    found = {k: (rank <= k).astype(float) for k in top}
    return Retrieval(
        top={k: percentile_interval(each.mean(), each[again].mean(1)) for k, each in found.items()},
        chance={
            k: float(np.concatenate([np.full(len(scores), min(k / scores.shape[1], 1.0)) for scores in folds]).mean())
            for k in top
        },
        median_rank=float(np.median(rank)),
        p=(1 + as_good) / (1 + permutations),
    )
