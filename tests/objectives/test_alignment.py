"""Canonical correlations and transport against definitions, programs of others, and with gradients that lead there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import fractional_matrix_power
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance

from zoo.errors import ZooError
from zoo.objectives.alignment import cca_loss, sinkhorn, wasserstein

RNG = np.random.default_rng(0)


def drawn(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def correlations(a: np.ndarray, b: np.ndarray, regulariser: float) -> np.ndarray:
    """Singular values of Σ₁^-½ Σ₁₂ Σ₂^-½, as the paper writes it."""
    a, b = (each - each.mean(0) for each in (a.astype(float), b.astype(float)))
    roots = [
        fractional_matrix_power(each.T @ each / (len(a) - 1) + regulariser * np.eye(each.shape[1]), -0.5)
        for each in (a, b)
    ]
    return np.linalg.svd(roots[0] @ (a.T @ b / (len(a) - 1)) @ roots[1], compute_uv=False)


def test_cca_is_minus_the_sum_of_the_largest_singular_values() -> None:
    a, b, valid = drawn(40, 4), drawn(40, 3), np.arange(40) % 4 != 1
    b[:, 0] += 2 * a[:, 1]
    wanted = correlations(a, b, 1e-3)
    np.testing.assert_allclose(cca_loss(a, b), -wanted.sum(), rtol=1e-4)
    np.testing.assert_allclose(cca_loss(a, b, 2), -wanted[:2].sum(), rtol=1e-4)
    a[~valid], b[~valid] = np.nan, 100
    there = -correlations(a[valid], b[valid], 1e-3).sum()
    np.testing.assert_allclose(cca_loss(a, b, valid=valid), there, rtol=1e-4)


def test_cca_of_a_set_with_its_own_image_counts_all_directions() -> None:
    a = drawn(60, 3)
    turned = a @ drawn(3, 3) + 5
    np.testing.assert_allclose(cca_loss(a, turned, regulariser=1e-6), -3, atol=1e-3)
    # Equal eigenvalues and equal singular values, where gradients of eigenvectors do not exist.
    gradient = jax.grad(lambda a: cca_loss(a, jnp.asarray(a)))(np.tile(np.eye(4, dtype=np.float32), (5, 1)))
    assert np.isfinite(gradient).all()


def test_cca_has_gradients_that_raise_correlation() -> None:
    a, b = drawn(50, 3), drawn(50, 3)
    gradient = jax.jit(jax.value_and_grad(cca_loss))
    first = float(gradient(a, b)[0])
    for _ in range(60):
        a = a - 2.0 * gradient(a, b)[1]
    assert float(gradient(a, b)[0]) < first - 0.8


def test_cca_refuses_more_components_than_there_are() -> None:
    with pytest.raises(ZooError, match="components: got 4, wanted 0 to 3"):
        cca_loss(drawn(9, 5), drawn(9, 3), 4)


@pytest.mark.parametrize("sizes", [(7, 7), (6, 9), (5, 1)])
def test_wasserstein_is_exact(sizes: tuple[int, int]) -> None:
    a, b = drawn(2, sizes[0]), drawn(2, sizes[1]) + 0.5
    wanted = [wasserstein_distance(*rows) for rows in zip(a, b, strict=True)]
    np.testing.assert_allclose(wasserstein(a, b), wanted, rtol=1e-5)
    gradient = jax.grad(lambda a: wasserstein(a, b).sum())(a)
    # Moving a number moves the distance by the share it has.
    np.testing.assert_allclose(np.abs(gradient).sum(-1) <= 1 + 1e-6, True)
    assert (np.abs(gradient).sum(-1) > 0).all()


def test_wasserstein_has_no_gradient_only_where_sets_are_equal() -> None:
    a = drawn(8)
    np.testing.assert_allclose(jax.grad(lambda a: wasserstein(a, a.copy() + 1))(a), 0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(wasserstein)(a, a + 10), -1 / 8, atol=1e-6)


def test_sinkhorn_comes_near_the_best_assignment() -> None:
    a, b = drawn(12, 2), drawn(12, 2) + 1
    cost = np.linalg.norm(a[:, None] - b, axis=-1)
    best = cost[linear_sum_assignment(cost)].mean()
    sharp = float(sinkhorn(a, b, blur=0.01, iterations=3000))
    # Entropy adds at most blur · ln 12 to the least cost.
    assert best - 1e-3 <= sharp <= best + 0.01 * np.log(12) + 1e-3
    assert float(sinkhorn(a, b, blur=10.0)) == pytest.approx(cost.mean(), rel=0.02)


def test_gradient_of_sinkhorn_is_that_of_its_value() -> None:
    a, b, direction = drawn(6, 2), drawn(5, 2) + 1, drawn(6, 2) + 1
    value, gradient = jax.jit(sinkhorn), jax.jit(jax.grad(sinkhorn))
    slope = float((gradient(a, b) * direction).sum())
    step = 1e-2
    change = (value(a + step * direction, b) - value(a - step * direction, b)) / (2 * step)
    assert slope == pytest.approx(float(change), rel=1e-2)  # float32 over a step of .01
    assert np.isfinite(gradient(a, a[:5])).all()
