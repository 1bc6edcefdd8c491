"""Wasserstein GAN with a gradient penalty (Gulrajani et al., 1704.00028): what critic and generator minimise.

    value = critic_loss(critic(real), critic(fake)) + 10 * gradient_penalty(critic, real, fake, share)
    value = generator_loss(critic(generator(noise)))

All is float32. `valid` [B] are the rows that are there; the others count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from zoo.objectives.signal import root
from zoo.types import AnyArray, Array


def critic_loss(
    real: Float[AnyArray, " B"], fake: Float[AnyArray, " B"], valid: Bool[AnyArray, " B"] | None = None
) -> Float[Array, ""]:
    """Mean score of what is made less that of what is real (1704.00028, equation 3, first two terms)."""
    return mean_over(jnp.asarray(fake, jnp.float32) - real, valid)


def generator_loss(fake: Float[AnyArray, " B"], valid: Bool[AnyArray, " B"] | None = None) -> Float[Array, ""]:
    """Minus the mean score of what is made."""
    return -mean_over(jnp.asarray(fake, jnp.float32), valid)


def gradient_penalty(
    critic: Callable[[Any], Any],
    real: Float[AnyArray, "B ..."],
    fake: Float[AnyArray, "B ..."],
    share: Float[AnyArray, " B"],
    valid: Bool[AnyArray, " B"] | None = None,
) -> Float[Array, ""]:
    """Mean of (‖gradient of the critic‖ − 1)² between real and made (1704.00028, equation 3, last term, without λ).

    critic  [B, …] → [B], every example on its own: no batch statistics
    share   of the real one in each point between, drawn uniformly from [0, 1)
    """
    share = jnp.asarray(share).reshape((-1,) + (1,) * (real.ndim - 1))
    between = share * jnp.asarray(real, jnp.float32) + (1 - share) * fake
    slope = jax.grad(lambda points: critic(points).sum())(between)
    return mean_over(jnp.square(root(jnp.square(slope).reshape(len(slope), -1).sum(-1)) - 1), valid)


def mean_over(values: Float[AnyArray, " B"], valid: Bool[AnyArray, " B"] | None) -> Float[Array, ""]:
    """Mean over the rows that are there; 0 where none is."""
    if valid is None:
        return jnp.mean(values)
    return jnp.sum(values, where=jnp.asarray(valid)) / jnp.maximum(jnp.sum(valid), 1)
