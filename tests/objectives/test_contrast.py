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
from zoo.objectives.contrast import ContrastHead, clip_loss, info_nce, retrieval, siglip_loss, similarities

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
