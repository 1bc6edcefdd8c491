"""Ranks on a fixed bank, and the test of them."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.evaluate.retrieval import ranks, retrieval


def test_ranks_are_those_of_sorting():
    scores = np.random.default_rng(0).normal(size=(7, 12))
    wanted = [1 + sorted(row, reverse=True).index(row[i]) for i, row in enumerate(scores)]
    np.testing.assert_array_equal(ranks(scores), wanted)
    np.testing.assert_array_equal(ranks(scores, np.full(7, 3)), [1 + (row > row[3]).sum() for row in scores])


def test_equals_share_their_ranks():
    np.testing.assert_array_equal(ranks(np.zeros((2, 5))), [3, 3])
    np.testing.assert_array_equal(ranks(np.array([[1.0, 2.0, 1.0]])), [2.5])


def test_what_is_always_right_is_not_by_chance():
    found = retrieval([np.eye(20), np.eye(30)], permutations=99, top=(1, 10))
    assert found.p == 0.01
    assert found.median_rank == 1
    assert tuple(found.top[1]) == (1, 1, 1)
    np.testing.assert_allclose(found.chance[1], (20 / 20 + 30 / 30) / 50)
    np.testing.assert_allclose(found.chance[10], (20 * 0.5 + 30 / 3) / 50)


def test_p_is_uniform_where_there_is_nothing_to_find():
    rng = np.random.default_rng(0)
    p = [retrieval([rng.normal(size=(8, 10))], permutations=100, seed=seed).p for seed in range(200)]
    assert 0.4 < np.mean(p) < 0.6
    assert np.mean(np.array(p) <= 0.1) < 0.17


def test_scores_without_an_order_are_refused():
    with pytest.raises(ZooError, match="1 scores are not finite"):
        ranks(np.array([[0.0, np.nan]]))
