"""Contrastive losses against plain numpy, with rows missing, on several devices, and learned."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from zoo.errors import ZooError
from zoo.objectives.contrast import (
    ContrastHead,
    candidate_scores,
    clip_loss,
    info_nce,
    nt_xent,
    retrieval,
    siglip_loss,
    similarities,
    soft_clip_loss,
)

ROWS, WIDTH = 8, 5
VALID = np.arange(ROWS) % 3 != 1


def pairs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(ROWS, WIDTH)).astype(np.float32), rng.normal(size=(ROWS, WIDTH)).astype(np.float32)


def by_hand(logits: np.ndarray, kind: str) -> float:
    rows = range(len(logits))
    if kind == "siglip":
        return sum(np.log1p(np.exp(-logits[i, j] if i == j else logits[i, j])) for i in rows for j in rows) / len(rows)
    each = [np.log(np.exp(logits[i]).sum()) - logits[i, i] for i in rows]
    other = [np.log(np.exp(logits[:, i]).sum()) - logits[i, i] for i in rows]
    return float(np.mean(each) if kind == "info_nce" else (np.mean(each) + np.mean(other)) / 2)


@pytest.mark.parametrize("loss", [info_nce, clip_loss, siglip_loss])
def test_losses_are_those_of_their_papers(loss: Any):
    ours, theirs = pairs()
    logits = 3 * np.asarray(similarities(ours, theirs))
    cosine = (ours / np.linalg.norm(ours, axis=1)[:, None]) @ (theirs / np.linalg.norm(theirs, axis=1)[:, None]).T
    np.testing.assert_allclose(logits, 3 * cosine, atol=1e-5)
    np.testing.assert_allclose(similarities(ours, theirs, cosine=False), ours @ theirs.T, rtol=1e-5, atol=1e-6)
    kind = loss.__name__.removesuffix("_loss")
    np.testing.assert_allclose(loss(logits), by_hand(logits.astype(float), kind), rtol=1e-5)
    there = logits[VALID][:, VALID].astype(float)
    np.testing.assert_allclose(loss(logits, VALID), by_hand(there, kind), rtol=1e-5)


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_rows_that_are_missing_have_no_gradient(loss: Any):
    ours, theirs = pairs()
    for there in (VALID, np.zeros(ROWS, bool)):
        gradient = np.asarray(jax.grad(lambda x, there=there: loss(similarities(x, theirs), there))(ours))
        assert np.isfinite(gradient).all()
        assert (np.abs(gradient).max(1) > 0).tolist() == there.tolist()


def test_retrieval_counts_ranks():
    logits = np.array([[3.0, 1, 2], [5, 4, 0], [0, 0, 0]], np.float32)
    assert retrieval(logits) == pytest.approx(1 / 3)
    assert retrieval(logits, top=2) == pytest.approx(1)
    assert retrieval(logits, np.array([False, True, True])) == pytest.approx(1)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_linear_relation_is_learned_on_any_number_of_devices(loss: str):
    head = ContrastHead(WIDTH, loss)
    ours = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)
    theirs = ours @ np.random.default_rng(1).normal(size=(12, WIDTH)).astype(np.float32)
    variables = nn.unbox(head.init(jax.random.key(0), ours, theirs))
    first, metrics = head.apply(variables, ours, theirs)
    assert metrics["scale"] == pytest.approx(1 / 0.07 if loss == "clip" else 10, rel=1e-5)
    if loss == "clip":
        # Cosines of about ±0.4 by chance, fourteen times: well above ln 64.
        assert math.log(64) < first < 4 * math.log(64)

    def value(params: Any, ours: Any, theirs: Any) -> Any:
        return head.apply({"params": params}, ours, theirs)[0]

    gradient = jax.jit(jax.grad(value))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        split = jax.device_put((ours, theirs), NamedSharding(mesh, PartitionSpec("data")))
        eight = gradient(jax.device_put(variables["params"], NamedSharding(mesh, PartitionSpec())), *split)
    one = gradient(variables["params"], ours, theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), eight, one)

    rule = optax.adam(0.03)
    params, moments = variables["params"], rule.init(variables["params"])
    for _ in range(150):
        updates, moments = rule.update(gradient(params, ours, theirs), moments)
        params = optax.apply_updates(params, updates)
    _, metrics = head.apply({"params": params}, ours, theirs)
    assert metrics["target_retrieval"] > 0.9
    assert metrics["signal_retrieval"] > 0.9


def test_what_does_not_fit_is_refused():
    ours, theirs = pairs()
    with pytest.raises(ZooError, match="loss: got 'triplet', wanted 'clip' or 'siglip'"):
        ContrastHead(WIDTH, "triplet").init(jax.random.key(0), ours, theirs)
    with pytest.raises(ZooError, match="got targets of 5 numbers, wanted 7"):
        ContrastHead(7).init(jax.random.key(0), ours, theirs)


def cross_entropy(logits: np.ndarray, wanted: np.ndarray) -> float:
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-(wanted * log_probs).sum(1).mean())


def test_soft_targets_share_an_answer_among_like_targets():
    ours, theirs = pairs()
    logits, likeness = np.asarray(similarities(ours, theirs)) * 3, np.asarray(similarities(theirs, theirs)) * 4
    for rows in (np.ones(ROWS, bool), VALID):
        there, like = logits[rows][:, rows].astype(float), likeness[rows][:, rows].astype(float)
        wanted = np.exp(like) / np.exp(like).sum(1, keepdims=True)
        by_hand = (cross_entropy(there, wanted) + cross_entropy(there.T, wanted)) / 2
        np.testing.assert_allclose(soft_clip_loss(logits, likeness, rows), by_hand, rtol=1e-5)
    np.testing.assert_allclose(soft_clip_loss(logits, 1e4 * np.eye(ROWS)), clip_loss(logits), rtol=1e-5)
    gradient = jax.grad(lambda logits: soft_clip_loss(logits, likeness, VALID))(logits)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[~VALID].any()


def test_two_views_find_each_other():
    one, other = pairs()
    for rows in (np.ones(ROWS, bool), VALID):
        both = np.concatenate([one[rows], other[rows]]).astype(float)
        both /= np.linalg.norm(both, axis=1, keepdims=True)
        logits, count = both @ both.T / 0.2, len(both)
        np.fill_diagonal(logits, -np.inf)
        pair = (np.arange(count) + count // 2) % count
        by_hand = np.mean([np.log(np.exp(row).sum()) - row[pair[i]] for i, row in enumerate(logits)])
        np.testing.assert_allclose(nt_xent(one, other, rows), by_hand, rtol=1e-5)
    assert nt_xent(one, one, temperature=0.05) < 0.1 < nt_xent(one, other, temperature=0.05)


def test_candidates_alone_have_length_one():
    ours, theirs = (each.reshape(ROWS, 1, WIDTH) for each in pairs())
    scores = candidate_scores(ours, theirs)
    wanted = np.einsum("ict,jct->ij", ours, theirs) / np.linalg.norm(theirs[:, 0], axis=1)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)
    np.testing.assert_allclose(candidate_scores(ours, 7 * theirs), scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(candidate_scores(2 * ours, theirs), 2 * scores, rtol=1e-5)


def test_rows_of_one_segment_are_no_wrong_answers_for_each_other():
    logits = 3 * np.asarray(similarities(*pairs())).astype(float)
    segment = np.array([0, 1, 2, 0, 4, 5, 0, 7])
    each = []
    for i in range(ROWS):
        others = [j for j in range(ROWS) if j == i or segment[j] != segment[i]]
        each.append(np.log(np.exp(logits[i, others]).sum()) - logits[i, i])
    np.testing.assert_allclose(info_nce(logits, segment=segment), np.mean(each), rtol=1e-5)
    np.testing.assert_allclose(info_nce(logits, segment=np.arange(ROWS)), info_nce(logits), rtol=1e-6)
