"""The discriminative Kalman filter against the exact one, and its parts against their definitions."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.state_space import discriminative_kalman as dk

A = np.array([[0.9, 0.2], [-0.2, 0.9]])
G = np.array([[0.3, 0.1], [0.1, 0.2]])
C = np.array([[1.0, 0.3], [-0.4, 0.8], [0.2, 0.1]])
R = np.diag([0.8, 1.2, 0.5])


def stationary() -> np.ndarray:
    """V = A V Aᵀ + G."""
    return np.linalg.solve(np.eye(4) - np.kron(A, A), G.ravel()).reshape(2, 2)


def simulated(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """States [T, 2] and what is observed of them [T, 3], both linear and Gaussian."""
    rng = np.random.default_rng(seed)
    z = np.empty((length, 2))
    z[0] = np.linalg.cholesky(stationary()) @ rng.standard_normal(2)
    for t in range(1, length):
        z[t] = A @ z[t - 1] + np.linalg.cholesky(G) @ rng.standard_normal(2)
    return z, z @ C.T + rng.standard_normal((length, 3)) * np.sqrt(np.diag(R))


def exact_posterior(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [T, 2] and covariance [2, 2] of a state given the one observation of its time."""
    covariance = np.linalg.inv(np.linalg.inv(stationary()) + C.T @ np.linalg.inv(R) @ C)
    return x @ np.linalg.inv(R) @ C @ covariance, covariance


def kalman(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Kalman filter, as in any textbook."""
    mean, covariance = np.zeros(2), stationary()
    means, covariances = [], []
    for t, now in enumerate(x):
        if t:
            mean, covariance = A @ mean, A @ covariance @ A.T + G
        gain = covariance @ C.T @ np.linalg.inv(C @ covariance @ C.T + R)
        mean, covariance = mean + gain @ (now - C @ mean), (np.eye(2) - gain @ C) @ covariance
        means.append(mean)
        covariances.append(covariance)
    return np.array(means), np.array(covariances)


def true_dynamics(mean: np.ndarray | None = None) -> dk.Dynamics:
    parts = A, G, stationary(), np.zeros(2) if mean is None else mean
    return dk.Dynamics(*(jnp.asarray(part) for part in parts))


@pytest.mark.parametrize("validity", ["replace", "clip"])
def test_equals_the_kalman_filter_where_that_is_exact(validity: str):
    _, x = simulated(40)
    means, covariance = exact_posterior(x)
    wanted_mean, wanted_covariance = kalman(x)
    with jax.enable_x64(True):
        run = jax.jit(partial(dk.filter_posteriors, validity=validity))
        got = run(true_dynamics(), jnp.asarray(means), jnp.asarray(covariance))
        np.testing.assert_allclose(got.mean, wanted_mean, atol=1e-10)
        np.testing.assert_allclose(got.covariance, wanted_covariance, atol=1e-10)
        shift = np.array([3.0, -5.0])
        moved = run(true_dynamics(shift), jnp.asarray(means + shift), jnp.asarray(covariance))
        np.testing.assert_allclose(moved.mean, wanted_mean + shift, atol=1e-10)


@pytest.mark.slow
def test_a_regression_that_knows_nothing_leaves_the_prediction():
    with jax.enable_x64(True):
        # Of no information: mean 0 and covariance V, but for the first, which is known to within a hundredth.
        means = jnp.zeros((6, 2)).at[0].set(jnp.array([1.0, -2.0]))
        covariances = jnp.broadcast_to(stationary(), (6, 2, 2)).at[0].multiply(1e-2)
        got = dk.filter_posteriors(true_dynamics(), means, covariances, validity="clip")
    for t in range(6):
        power = np.linalg.matrix_power(A, t)
        np.testing.assert_allclose(got.mean[t], power @ [1.0, -2.0], atol=1e-10)
        covariance = stationary() + power @ (0.01 * stationary() - stationary()) @ power.T
        np.testing.assert_allclose(got.covariance[t], covariance, atol=1e-10)


def test_what_is_done_where_a_covariance_is_too_large():
    """One step from a known first state, with Q = diag(2, 0.1) V-wide in one direction, by the formulas in words."""
    v = stationary()
    half = np.linalg.cholesky(v)
    too_wide = half @ np.diag([2.0, 0.1]) @ half.T
    means = np.array([[1.0, 0.5], [0.3, -0.2]])
    predicted = A @ (0.1 * v) @ A.T + G
    inverse = np.linalg.inv
    with jax.enable_x64(True):
        covariances = jnp.asarray(np.stack([0.1 * v, too_wide]))
        for validity, q, prior in (
            ("replace", inverse(inverse(too_wide) + inverse(v)), inverse(v)),
            ("clip", half @ np.diag([1.0, 0.1]) @ half.T, inverse(v)),
            ("robust", too_wide, np.zeros((2, 2))),
        ):
            got = dk.filter_posteriors(true_dynamics(), jnp.asarray(means), covariances, validity=validity)
            covariance = inverse(inverse(q) + inverse(predicted) - prior)
            mean = covariance @ (inverse(q) @ means[1] + inverse(predicted) @ A @ means[0])
            np.testing.assert_allclose(got.covariance[1], covariance, atol=1e-10, err_msg=validity)
            np.testing.assert_allclose(got.mean[1], mean, atol=1e-10, err_msg=validity)


@pytest.mark.slow
def test_segments_start_anew_and_do_not_teach_each_other():
    z, x = simulated(30)
    ids = np.repeat([4, 9], [13, 17])
    run = jax.jit(dk.filter_posteriors)
    means, covariance = (jnp.asarray(each, jnp.float32) for each in exact_posterior(x))
    dynamics = jax.tree.map(lambda part: part.astype(jnp.float32), true_dynamics())
    packed = run(dynamics, means, covariance, segment_ids=jnp.asarray(ids))
    alone = run(dynamics, means[13:], covariance)
    np.testing.assert_allclose(packed.mean[13:], alone.mean, atol=1e-6)
    far = z + 50.0 * (ids == 9)[:, None]
    with jax.enable_x64(True):
        fitted = dk.fit_dynamics(jnp.asarray(far), jnp.asarray(ids))
    pairs = np.delete(np.arange(1, 30), 12)
    centred = far - far.mean(0)
    wanted = np.linalg.lstsq(centred[pairs - 1], centred[pairs], rcond=None)[0].T
    np.testing.assert_allclose(fitted.transition, wanted, atol=1e-10)
    errors = centred[pairs] - centred[pairs - 1] @ wanted.T
    np.testing.assert_allclose(fitted.noise, errors.T @ errors / 28, atol=1e-10)


@pytest.mark.slow
def test_fit_recovers_the_dynamics_and_helps_the_regression():
    z, x = simulated(4000)
    train, test = slice(0, 3000), slice(3000, 4000)
    states, features = jnp.asarray(z, jnp.float32), jnp.asarray(x, jnp.float32)

    @jax.jit
    def decoded(features: jax.Array, states: jax.Array, new: jax.Array) -> tuple[dk.DiscriminativeKalman, dk.Filtered]:
        model = dk.fit(features, states)
        return model, dk.filter(model, new)

    model, filtered = decoded(features[train], states[train], features[test])
    # Three standard errors of coefficients and variances of 3,000 samples.
    np.testing.assert_allclose(model.dynamics.transition, A, atol=0.03)
    np.testing.assert_allclose(model.dynamics.noise, G, atol=0.03)
    np.testing.assert_allclose(model.covariance.value, exact_posterior(x)[1], atol=0.05)
    exact = np.mean((kalman(x)[0][test] - z[test]) ** 2)
    alone = np.mean((model.regression(features[test]) - z[test]) ** 2)
    together = np.mean((filtered.mean - z[test]) ** 2)
    assert together < 1.05 * exact < alone


@pytest.mark.slow
def test_kernels_follow_what_a_line_cannot():
    rng = np.random.default_rng(1)
    x = rng.uniform(-2, 2, (400, 1)).astype(np.float32)
    spread = 0.05 + 0.3 * (x > 0)
    z = (np.abs(x) + spread * rng.standard_normal(x.shape)).astype(np.float32)
    model = jax.jit(partial(dk.fit, regress=dk.fit_nadaraya_watson, covary=dk.fit_kernel_covariance))(x, z)
    new = jnp.array([[-1.5], [-1.0], [1.0], [1.5]])
    np.testing.assert_allclose(model.regression(new)[:, 0], np.abs(new[:, 0]), atol=0.15)
    variances = model.covariance(new)[:, 0, 0]
    # 0.05² and 0.35² with what the regression misses; the bandwidth smears them.
    assert variances[:2].max() < 0.03 < 0.07 < variances[2:].min()


def test_nadaraya_watson_is_its_definition_and_leaves_each_sample_out():
    rng = np.random.default_rng(2)
    x, z, new = (rng.standard_normal(shape) for shape in ((30, 3), (30, 2), (5, 3)))
    with jax.enable_x64(True):
        got = dk.fit_nadaraya_watson(jnp.asarray(x), jnp.asarray(z), 0.7)(jnp.asarray(new))
        chosen = dk.fit_nadaraya_watson(jnp.asarray(x), jnp.asarray(z), gap=2).bandwidth
    weights = np.exp(-((new[:, None] - x) ** 2).sum(-1) / (2 * 0.7**2))
    np.testing.assert_allclose(got, weights @ z / weights.sum(1, keepdims=True), atol=1e-12)
    median = np.sqrt(np.median(((x[:, None] - x) ** 2).sum(-1)))
    errors = {}
    for bandwidth in median * 2.0 ** np.linspace(-5, 0.5, 12):
        missed = []
        for i in range(30):
            others = np.abs(np.arange(30) - i) > 2
            log_weights = -((x[i] - x[others]) ** 2).sum(-1) / (2 * bandwidth**2)
            weights = np.exp(log_weights - log_weights.max())
            missed.append(weights @ z[others] / weights.sum() - z[i])
        errors[bandwidth] = np.mean(np.square(missed))
    assert chosen == pytest.approx(min(errors, key=lambda bandwidth: errors[bandwidth]), rel=1e-9)


def test_ridge_is_scikit_learns():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(3)
    x, z = rng.standard_normal((20, 30)), rng.standard_normal((20, 2))
    with jax.enable_x64(True):
        ours = dk.fit_ridge(jnp.asarray(x), jnp.asarray(z), 2.0)
    theirs = Ridge(2.0).fit(x, z)
    np.testing.assert_allclose(ours.weights.T, theirs.coef_, atol=1e-10)
    np.testing.assert_allclose(ours.intercept, theirs.intercept_, atol=1e-10)


def test_runs_over_recordings_at_once():
    recordings = [simulated(50, seed) for seed in range(3)]
    z, x = (jnp.asarray(np.stack(part), jnp.float32) for part in zip(*recordings, strict=True))

    def decoded(x: jax.Array, z: jax.Array) -> jax.Array:
        return dk.filter(dk.fit(x, z, folds=2), x, validity="clip").mean

    together = jax.jit(jax.vmap(decoded))(x, z)
    np.testing.assert_allclose(together[1], jax.jit(decoded)(x[1], z[1]), atol=1e-4)


@pytest.mark.slow
def test_beats_ridge_regression_on_real_recordings():
    """How loud speech was, after one minute of calibration, with the features of one second: see the benchmark."""
    from benchmarks import filters

    scores = filters.measure(filters.Options(lags_seconds=(1.0,)))
    ridge, filtered = (np.array(scores[f"1 s, {name}"]) for name in ("ridge", "filter on ridge"))
    gains = (filtered - ridge)[:, 0]
    # Mean +.035 with an interval of ± .009 over ten folds.
    assert gains.mean() - 2.3 * gains.std(ddof=1) / np.sqrt(len(gains)) > 0
    assert (filtered - ridge)[:, 1].mean() > 0


def test_wrong_options_are_named():
    x = jnp.zeros((4, 2))
    with pytest.raises(ZooError, match="validity is one of replace, clip, robust, got 'none'"):
        dk.filter_posteriors(true_dynamics(), x, jnp.eye(2), validity="none")
    with pytest.raises(ZooError, match="folds: got 1, wanted 2 to the 4 samples"):
        dk.fit(x, x, folds=1)
