"""Discriminative Kalman filter: a regression from signals to states, made to agree with how states move.

Source: Burkhart, Brandman, Franco, Hochberg and Harrison, "The Discriminative Kalman Filter for Bayesian Filtering with
Nonlinear and Nongaussian Observation Models", Neural Computation 32 (2020); Burkhart's thesis (2018). States z_t are
stationary, z_t | z_{t−1} ~ N(A z_{t−1}, G), z_t ~ N(0, V), and any regression gives z_t | x_t ~ N(f(x_t), Q(x_t)). Then

    M = A S Aᵀ + G,  S' = (Q⁻¹ + M⁻¹ − V⁻¹)⁻¹,  μ' = S' (Q⁻¹ f + M⁻¹ A μ),  from μ = f(x_1), S = Q(x_1).

Everything is a pure function of one recording, to be jitted and vmapped over recordings of equal length. Shapes: T
time, F features of the signal, Z dimensions of the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve, solve_triangular
from jaxtyping import Bool, Float, Int

from kernels.packing import starts
from zoo.errors import ZooError
from zoo.types import Array

VALIDITY = ("replace", "clip", "robust")

Model = Callable[[Array], Array]
"""A pytree that is called: features [T, F] → values [T, ...]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dynamics:
    """How states move."""

    transition: Array
    """A [Z, Z]"""
    noise: Array
    """G [Z, Z], covariance of z_t − A z_{t−1}"""
    stationary: Array
    """V [Z, Z], covariance of z_t"""
    mean: Array
    """[Z], subtracted from states before all else"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ridge:
    """x ↦ xᵀ weights + intercept."""

    weights: Array
    """[F, Z]"""
    intercept: Array
    """[Z]"""

    def __call__(self, features: Float[Array, "T F"]) -> Float[Array, "T Z"]:
        return features @ self.weights + self.intercept


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NadarayaWatson:
    """x ↦ mean of values, weighted by exp(−|x − x_i|² / 2 bandwidth²). Far from all x_i, the value of the nearest."""

    features: Array
    """[N, F]"""
    values: Array
    """[N, ...]"""
    bandwidth: Array
    """[]"""

    def __call__(self, features: Float[Array, "T F"]) -> Float[Array, "T ..."]:
        weights = jax.nn.softmax(-_squared_distances(features, self.features) / (2 * self.bandwidth**2), axis=-1)
        return jnp.tensordot(weights, self.values, axes=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Constant:
    """The same value for all features."""

    value: Array

    def __call__(self, features: Float[Array, "T F"]) -> Float[Array, "T ..."]:
        return jnp.broadcast_to(self.value, (len(features), *self.value.shape))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DiscriminativeKalman:
    """A fitted filter: `regression` gives f + mean [T, Z], `covariance` gives Q [T, Z, Z]."""

    dynamics: Dynamics
    regression: Any
    covariance: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Filtered:
    """States given all signals so far."""

    mean: Array
    """[T, Z]"""
    covariance: Array
    """[T, Z, Z]"""


def fit_ridge(
    features: Float[Array, "T F"], values: Float[Array, "T Z"], alpha: float | Float[Array, ""] = 1.0
) -> Ridge:
    """Least squares with penalty alpha · |weights|², none on the intercept."""
    centre, mean = features.mean(0), values.mean(0)
    x = features - centre
    weights = cho_solve(cho_factor(x.T @ x + alpha * jnp.eye(x.shape[1], dtype=x.dtype)), x.T @ (values - mean))
    return Ridge(weights, mean - centre @ weights)


def fit_nadaraya_watson(
    features: Float[Array, "T F"],
    values: Float[Array, "T ..."],
    bandwidth: float | Float[Array, ""] | None = None,
    gap: int = 0,
) -> NadarayaWatson:
    """Kernel regression with the given bandwidth, or the best of twelve around the median distance.

    The best one has the least squared error when each sample, with `gap` neighbours on both sides, is predicted from
    the others (the paper: gap 0, any bandwidth by gradient). Memory grows as T².
    """
    if bandwidth is None:
        distances = _squared_distances(features, features)
        times = jnp.arange(len(features))
        near = jnp.abs(times[:, None] - times) <= gap
        flat = values.reshape(len(values), -1)

        def error(bandwidth: Array) -> Array:
            weights = jax.nn.softmax(jnp.where(near, -jnp.inf, -distances / (2 * bandwidth**2)), axis=-1)
            return jnp.mean((weights @ flat - flat) ** 2)

        tried = jnp.sqrt(jnp.median(distances)) * 2.0 ** jnp.linspace(-5, 0.5, 12, dtype=features.dtype)
        bandwidth = tried[jnp.argmin(jax.lax.map(error, tried))]
    return NadarayaWatson(features, values, jnp.asarray(bandwidth, features.dtype))


def fit_constant_covariance(features: Float[Array, "T F"], errors: Float[Array, "T Z"]) -> Constant:
    """Q = mean of errors' outer products."""
    return Constant(errors.T @ errors / len(errors))


def fit_kernel_covariance(
    features: Float[Array, "T F"],
    errors: Float[Array, "T Z"],
    bandwidth: float | Float[Array, ""] | None = None,
    gap: int = 0,
) -> NadarayaWatson:
    """Q(x) = mean of errors' outer products where features are near x, see `fit_nadaraya_watson`."""
    return fit_nadaraya_watson(features, errors[:, :, None] * errors[:, None, :], bandwidth, gap)


def fit_dynamics(states: Float[Array, "T Z"], segment_ids: Int[Array, " T"] | None = None) -> Dynamics:
    """A and G by least squares of each state on the one before, V the covariance of all.

    segment_ids: a state at the beginning of a run of equal ids has none before it.
    """
    mean = states.mean(0)
    z = states - mean
    before, after = z[:-1], z[1:]
    paired = jnp.ones(len(before), z.dtype) if segment_ids is None else (~_starts(segment_ids)[1:]).astype(z.dtype)
    weighted = before * paired[:, None]
    transition = _solve(weighted.T @ before, weighted.T @ after).T
    errors = (after - before @ transition.T) * paired[:, None]
    return Dynamics(transition, errors.T @ errors / paired.sum(), z.T @ z / len(z), mean)


def fit(
    features: Float[Array, "T F"],
    states: Float[Array, "T Z"],
    *,
    regress: Callable[[Array, Array], Model] = fit_ridge,
    covary: Callable[[Array, Array], Model] = fit_constant_covariance,
    segment_ids: Int[Array, " T"] | None = None,
    folds: int = 5,
) -> DiscriminativeKalman:
    """Fits all parts of the filter.

    regress      (features, states) → the regression, such as `fit_ridge`, `fit_nadaraya_watson`
    covary       (features, errors of it) → Q, such as `fit_constant_covariance`, `fit_kernel_covariance`
    segment_ids  of recordings one after another, see `fit_dynamics`
    folds        consecutive blocks of time. Errors are those for each block of a regression fitted to the others: on
                 what it has seen, they would be too small. (The paper holds out one part of 30 %.)

    For a network that is already there: `fit_dynamics`, `covary` on its errors on held-out data, `filter_posteriors`.
    Raises ZooError when there are fewer than two folds or more than samples.
    """
    if not 2 <= folds <= len(states):
        raise ZooError(f"discriminative_kalman: folds: got {folds}, wanted 2 to the {len(states)} samples")
    errors = states - _held_out_predictions(features, states, regress, folds)
    return DiscriminativeKalman(fit_dynamics(states, segment_ids), regress(features, states), covary(features, errors))


def filter(
    model: DiscriminativeKalman,
    features: Float[Array, "T F"],
    *,
    segment_ids: Int[Array, " T"] | None = None,
    validity: str = "replace",
) -> Filtered:
    """States given the signals' features up to each time; starts anew at the beginning of each run of equal ids."""
    means, covariances = model.regression(features), model.covariance(features)
    return filter_posteriors(model.dynamics, means, covariances, segment_ids=segment_ids, validity=validity)


def filter_posteriors(
    dynamics: Dynamics,
    means: Float[Array, "T Z"],
    covariances: Float[Array, "T Z Z"] | Float[Array, "Z Z"],
    *,
    segment_ids: Int[Array, " T"] | None = None,
    validity: str = "replace",
) -> Filtered:
    """The filter on any regression's predictions f + mean [T, Z] and their covariances Q, one or [T, Z, Z].

    validity: the update needs Q⁻¹ − V⁻¹ to be positive definite, which a regression need not give. "replace" takes
    (Q⁻¹ + V⁻¹)⁻¹ for Q where it is not (authors' code), "clip" brings the generalised eigenvalues of (Q, V) down to 1,
    "robust" leaves −V⁻¹ out everywhere (§"robust DKF": a flat prior of states). The first step of a segment uses Q as
    "clip" makes it, else as it is.
    Raises ZooError for another name.
    """
    if validity not in VALIDITY:
        raise ZooError(f"discriminative_kalman: validity is one of {', '.join(VALIDITY)}, got {validity!r}")
    covariances = jnp.broadcast_to(covariances, (len(means), *covariances.shape[-2:]))
    first = jnp.arange(len(means)) == 0
    if segment_ids is not None:
        first |= _starts(segment_ids)
    transition, prior = dynamics.transition, _inverse(dynamics.stationary)
    if validity == "clip":
        covariances = jax.vmap(_clipped, (0, None))(covariances, dynamics.stationary)

    def step(carry: tuple[Array, Array], now: tuple[Array, Array, Array]) -> tuple[Any, tuple[Array, Array]]:
        mean, covariance, first = now
        precision = _inverse(covariance)
        if validity == "replace":
            valid = jnp.linalg.eigvalsh(precision - prior)[0] > 0
            precision = jnp.where(valid, precision, precision + prior)
        predicted = _inverse(transition @ carry[1] @ transition.T + dynamics.noise)
        total = precision + predicted - (0.0 if validity == "robust" else prior)
        filtered = _solve(total, precision @ mean + predicted @ (transition @ carry[0]))
        after = jnp.where(first, mean, filtered), jnp.where(first, covariance, _inverse(total))
        return after, after

    initial = jnp.zeros_like(means[0]), dynamics.stationary
    mean, covariance = jax.lax.scan(step, initial, (means - dynamics.mean, covariances, first))[1]
    return Filtered(mean + dynamics.mean, covariance)


def _held_out_predictions(
    features: Array, values: Array, regress: Callable[[Array, Array], Model], folds: int
) -> Array:
    """[T, Z]: each of `folds` blocks of time predicted from the others."""
    borders = [len(values) * n // folds for n in range(folds + 1)]
    predictions = []
    for start, stop in pairwise(borders):
        rest = [jnp.concatenate([x[:start], x[stop:]]) for x in (features, values)]
        predictions.append(regress(*rest)(features[start:stop]))
    return jnp.concatenate(predictions)


def _starts(segment_ids: Int[Array, " T"]) -> Bool[Array, " T"]:
    return starts(segment_ids[None])[0]


def _squared_distances(x: Float[Array, "T F"], y: Float[Array, "N F"]) -> Float[Array, "T N"]:
    return jnp.maximum((x**2).sum(-1)[:, None] + (y**2).sum(-1) - 2 * x @ y.T, 0)


def _factor(matrix: Float[Array, "Z Z"]) -> Float[Array, "Z Z"]:
    """Cholesky factor of a symmetric matrix, made so, with a few roundings' worth more on its diagonal."""
    jitter = 4 * jnp.finfo(matrix.dtype).eps * jnp.trace(matrix) / len(matrix)
    return jnp.linalg.cholesky((matrix + matrix.T) / 2 + jitter * jnp.eye(len(matrix), dtype=matrix.dtype))


def _solve(matrix: Float[Array, "Z Z"], right: Float[Array, "Z ..."]) -> Float[Array, "Z ..."]:
    return cho_solve((_factor(matrix), True), right)


def _inverse(matrix: Float[Array, "Z Z"]) -> Float[Array, "Z Z"]:
    inverse = _solve(matrix, jnp.eye(len(matrix), dtype=matrix.dtype))
    return (inverse + inverse.T) / 2


def _clipped(covariance: Float[Array, "Z Z"], stationary: Float[Array, "Z Z"]) -> Float[Array, "Z Z"]:
    """Q whose generalised eigenvalues with V are at most 1."""
    factor = _factor(stationary)
    half = solve_triangular(factor, covariance, lower=True)
    values, vectors = jnp.linalg.eigh(solve_triangular(factor, half.T, lower=True))
    vectors = factor @ vectors
    return (vectors * jnp.minimum(values, 1)) @ vectors.T
