"""What a person has, from what a classifier says of the windows; and how near its guesses of a scale come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from zoo.errors import ZooError


def vote(
    probability: Float[np.ndarray, "N K"], person: Sequence[str], *, by: str = "majority"
) -> tuple[tuple[str, ...], Int[np.ndarray, " S"]]:
    """People, sorted, and the class of each, from all of their windows, wherever among the rows these are.

    by  majority: the class that most windows have; of equals the one of the larger mean probability
        mean: the class of the largest mean probability

    Source: ADHDeepNet (2509.08779), whose code leaves out each person's last window. Raises ZooError for another `by`,
    and where rows are not one person's each.
    """
    if by not in ("majority", "mean"):
        raise ZooError(f"vote by: got {by!r}, wanted 'majority' or 'mean'")
    if len(person) != len(probability):
        raise ZooError(f"vote: got {len(probability)} rows of {len(person)} people")
    people, whose = np.unique(np.asarray(person, str), return_inverse=True)
    classes = probability.shape[1]
    member = np.equal.outer(np.arange(len(people)), whose).astype(float)
    score = member @ probability / member.sum(1, keepdims=True)
    if by == "majority":
        # Means are at most 1, so half of one decides only between equals.
        score = member @ np.eye(classes)[probability.argmax(1)] + score / 2
    return tuple(map(str, people)), score.argmax(1)


class Neighbours(NamedTuple):
    """Shares of windows: the two likeliest classes are next to each other; and the likeliest is right; and one of the
    two is right."""

    adjacent: float
    first: float
    either: float


def neighbours(probability: Float[np.ndarray, "N K"], label: Int[np.ndarray, " N"]) -> Neighbours:
    """How guesses of a scale's steps keep its order (Seq2HR of HiSTN, 2408.15255).

    Raises ZooError without windows, or with fewer than two classes.
    """
    if probability.ndim != 2 or not len(probability) or probability.shape[1] < 2:
        raise ZooError(f"neighbours: got probabilities {list(probability.shape)}, wanted rows of at least two classes")
    second, first = np.argsort(probability, axis=1, kind="stable")[:, -2:].T
    adjacent = np.abs(first - second) == 1
    right = first == label
    return Neighbours(
        *(float(each.mean()) for each in (adjacent, adjacent & right, adjacent & (right | (second == label))))
    )
