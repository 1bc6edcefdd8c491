"""Losses of a Wasserstein GAN with gradient penalty: against plain numpy, and learned."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from zoo.objectives.adversarial import critic_loss, generator_loss, gradient_penalty

RNG = np.random.default_rng(0)
REAL, FAKE = RNG.normal(size=(6, 2, 3)).astype(np.float32), RNG.normal(size=(6, 2, 3)).astype(np.float32)
SHARE = RNG.uniform(size=6).astype(np.float32)
VALID = np.array([1, 1, 0, 1, 0, 1], bool)


def test_scores_are_compared_by_their_means() -> None:
    real, fake = REAL[:, 0, 0], FAKE[:, 0, 0]
    np.testing.assert_allclose(critic_loss(real, fake), fake.mean() - real.mean(), atol=1e-6)
    np.testing.assert_allclose(critic_loss(real, fake, VALID), (fake - real)[VALID].mean(), atol=1e-6)
    np.testing.assert_allclose(generator_loss(fake, VALID), -fake[VALID].mean(), atol=1e-6)


def test_penalty_is_of_the_slope_at_points_between() -> None:
    """The critic Σx²/2 has the slope x."""
    between = SHARE[:, None, None] * REAL + (1 - SHARE[:, None, None]) * FAKE
    each = (np.linalg.norm(between.reshape(6, -1), axis=1) - 1) ** 2

    def critic(x):
        return jnp.square(x).sum((1, 2)) / 2

    np.testing.assert_allclose(gradient_penalty(critic, REAL, FAKE, SHARE), each.mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient_penalty(critic, REAL, FAKE, SHARE, VALID), each[VALID].mean(), rtol=1e-5)


def test_a_critic_without_slope_has_a_finite_gradient() -> None:
    def value(weight):
        return gradient_penalty(lambda x: (weight * x).sum((1, 2)), REAL, FAKE, SHARE)

    flat = np.zeros((2, 3), np.float32)
    assert value(flat) == 1
    assert np.isfinite(jax.grad(value)(flat)).all()


def test_a_linear_critic_finds_the_distance_of_two_clouds() -> None:
    """Kept at slope 1, the difference of mean scores is the Wasserstein distance: the shift, here 3 along an axis."""
    real = RNG.normal(size=(64, 1, 2)).astype(np.float32)
    fake = real + np.array([3.0, 0.0], np.float32)

    @jax.jit
    def value(weight):
        def critic(x):
            return (weight * x).sum((1, 2))

        penalty = gradient_penalty(critic, real, fake, np.full(64, 0.5, np.float32))
        return critic_loss(critic(real), critic(fake)) + 10 * penalty

    weight = np.array([[0.1, 0.1]], np.float32)
    for _ in range(300):
        weight = weight - 0.02 * jax.grad(value)(weight)
    # The optimum of w·3 + 10(|w| − 1)² is w = −1.15, along the shift alone.
    np.testing.assert_allclose(weight, [[-1.15, 0]], atol=1e-3)
