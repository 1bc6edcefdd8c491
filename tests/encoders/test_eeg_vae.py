"""β-VAE and SCAN: their divergences, latents one at a time, and labels made into windows."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes
from loop import trained
from quick import compiled
from scipy import stats

from zoo.errors import ZooError
from zoo.objectives.eeg_vae import BetaVAE, Scan, kl_gaussians, sampled, traversals
from zoo.train.config import Optimizer

NAMES = ("FZ", "CZ")
SMALL = {"channels": NAMES, "samples": 32, "widths": (16, 16), "hidden": 32, "latents": 4}
ADAM = Optimizer(learning_rate=3e-3, weight_decay=0.0, warmup_steps=1)


def batch(seed: int = 0, size: int = 32) -> dict[str, Any]:
    """A bump whose place is the label, in noise."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, size).astype(np.int32)
    place = np.where(label, 22, 9)[:, None, None] + rng.normal(size=(size, 1, 1))
    bump = np.exp(-0.5 * np.square((np.arange(32) - place) / 2))
    signal = (5 * bump + 0.2 * rng.normal(size=(size, 2, 32))).astype(np.float32)
    return {"signal": signal, "sensors": electrodes(NAMES, size), "label": label}


def test_divergence_is_the_integral_it_stands_for() -> None:
    one, other = stats.norm(0.5, 1.3), stats.norm(-0.7, 0.6)
    grid = np.linspace(-12, 12, 40001)
    wanted = np.trapezoid(one.pdf(grid) * (one.logpdf(grid) - other.logpdf(grid)), grid)

    def numbers(*values: float) -> np.ndarray:
        return np.array([values], np.float32)

    mean, log_variance = numbers(0.5, 0), numbers(2 * np.log(1.3), 0)
    forward = kl_gaussians(mean, log_variance, numbers(-0.7, 0), numbers(2 * np.log(0.6), 0))
    np.testing.assert_allclose(forward, wanted, rtol=1e-5)
    backward = kl_gaussians(numbers(-0.7, 0), numbers(2 * np.log(0.6), 0), mean, log_variance)
    assert abs(float(backward[0]) - wanted) > 1
    standard = np.trapezoid(one.pdf(grid) * (one.logpdf(grid) - stats.norm().logpdf(grid)), grid)
    np.testing.assert_allclose(kl_gaussians(mean, log_variance), standard, rtol=1e-5)


def test_samples_have_the_mean_and_variance_they_are_asked_for() -> None:
    mean, log_variance = jnp.full((20000, 2), jnp.array([1.0, -2.0])), jnp.full((20000, 2), jnp.array([0.0, 2.0]))
    drawn = sampled(jax.random.key(0), mean, log_variance)
    np.testing.assert_allclose(drawn.mean(0), [1, -2], atol=0.1)
    np.testing.assert_allclose(drawn.var(0), np.exp([0, 2]), rtol=0.05)


def test_a_traversal_changes_one_latent_at_a_time() -> None:
    found = traversals(np.array([0.0, 0.1, 0.2]), np.array([-3.0, 3.0]))
    assert found.shape == (3, 2, 3)
    np.testing.assert_allclose(found[1], [[0, -3, 0.2], [0, 3, 0.2]], atol=1e-6)


def test_the_loss_is_half_the_square_error_and_the_weighed_divergence() -> None:
    """In validation, where nothing is drawn; a channel that is not valid has no error."""
    task = BetaVAE("eeg_vae_tiny", SMALL, beta=4.0)
    given = batch(size=4)
    given["sensors"].valid[:, 1] = False
    variables = compiled(lambda: nn.meta.unbox(task.init(jax.random.key(0), given)))()

    @compiled
    def both(variables: Any) -> Any:
        standard = task.encoder().standardised(given["signal"], given["sensors"])
        mean, log_variance = task.posterior(variables, standard)
        return (
            task.loss(variables, given, jax.random.key(0), False),
            (standard, mean, log_variance),
            task.decode(variables, mean),
        )

    (value, metrics, _), (standard, mean, log_variance), made = both(variables)
    error = 0.5 * np.square(np.asarray(standard - made))[:, 0].sum() / 4
    np.testing.assert_allclose(metrics["error"], error, rtol=1e-5)
    np.testing.assert_allclose(value, error + 4 * np.mean(kl_gaussians(mean, log_variance)), rtol=1e-5)
    with pytest.raises(ZooError, match="needs batches with labels"):
        Scan(task).loss(variables, {"signal": 0}, jax.random.key(0), True)


@pytest.mark.slow
def test_labels_become_the_windows_they_name() -> None:
    task = BetaVAE("eeg_vae_tiny", SMALL, beta=1.0)
    vae, figures = trained(task, batch, ADAM, 300)
    assert figures[-1]["error"] < 0.5 * figures[0]["error"]
    assert figures[-1]["active"] >= 1

    # Some latent moves the window when it is turned, and one that carries nothing does not.
    turned = traversals(np.zeros(4), np.array([-2.0, 2.0]))
    windows = compiled(task.decode)(vae, np.asarray(turned).reshape(8, 4)).reshape(4, 2, 2, 32)
    assert np.abs(windows[:, 0] - windows[:, 1]).max((1, 2)).max() > 1

    concepts = Scan(task, classes=2)
    first = compiled(lambda: nn.meta.unbox(concepts.init(jax.random.key(0), batch())))()
    variables, figures = trained(concepts, batch, ADAM, 200, concepts.with_vae(first, vae))
    jax.tree.map(np.testing.assert_array_equal, variables["params"]["vae"], vae["params"])
    assert np.mean([each["accuracy"] for each in figures[-20:]]) > 0.9
    label = np.arange(64) % 2
    made = compiled(lambda key: concepts.imagine(variables, key, label))(jax.random.key(1))
    # The bump of an imagined window is where its label says.
    early, late = (np.square(np.asarray(made))[..., part].sum((1, 2)) for part in (slice(16), slice(16, 32)))
    assert np.mean((late > early) == (label == 1)) > 0.8
