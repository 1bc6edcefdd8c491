"""Schedules, targets and sampling of diffusion, against the equations step by step and against known answers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.objectives import diffusion
from zoo.objectives.diffusion import Schedule, drop_labels, guided, linear, noised, parts, squared_cosine, target

SCHEDULES = {"linear": linear(1000), "squared cosine": squared_cosine(50)}


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_keep_the_square_and_only_lose_signal(name: str) -> None:
    schedule = SCHEDULES[name]
    np.testing.assert_allclose(np.square(schedule.signal) + np.square(schedule.noise), 1, atol=1e-6)
    assert (np.diff(schedule.signal) < 0).all()
    assert schedule.signal[0] > 0.99
    assert schedule.signal[-1] < 0.01


def test_schedules_are_those_of_their_papers() -> None:
    betas = [1e-4 + (0.02 - 1e-4) * step / 999 for step in range(1000)]
    kept = 1.0
    for beta in betas[:500]:
        kept *= 1 - beta
    np.testing.assert_allclose(SCHEDULES["linear"].signal[499], kept**0.5, rtol=1e-5)

    def f(step: int) -> float:
        return float(np.cos((step / 50 + 0.008) / 1.008 * np.pi / 2) ** 2)

    np.testing.assert_allclose(np.square(SCHEDULES["squared cosine"].signal[29]), f(30) / f(0), rtol=1e-5)
    # The last β is limited: without that nothing would be left of the signal.
    np.testing.assert_allclose(np.square(SCHEDULES["squared cosine"].signal[49]), f(49) / f(0) * 0.001, rtol=1e-4)


@pytest.mark.parametrize("kind", diffusion.KINDS)
def test_what_is_predicted_says_what_a_noisy_signal_is_made_of(kind: str) -> None:
    schedule = SCHEDULES["squared cosine"]
    clean, noise, step = drawn(4, 2, 6), drawn(4, 2, 6, seed=1), np.array([0, 7, 20, 40])
    noisy = noised(schedule, clean, step, noise)
    wanted = target(schedule, kind, clean, step, noise)
    a, s = (np.asarray(each)[step][:, None, None] for each in (schedule.signal, schedule.noise))
    by_hand = {"noise": noise, "v": a * noise - s * clean, "clean": clean}[kind]
    np.testing.assert_allclose(wanted, by_hand, atol=1e-6)
    again = parts(schedule, kind, wanted, noisy, step)
    for ours, theirs in zip(again, (clean, noise), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def gaussian(schedule: Schedule, deviation: float) -> Any:
    """What an ideal model predicts of signals that are normal with mean 0: the expected noise."""

    def predict(noisy: Any, step: Any) -> Any:
        a, s = (jnp.asarray(each)[step][:, None] for each in (schedule.signal, schedule.noise))
        return s * noisy / (jnp.square(a * deviation) + jnp.square(s))

    return predict


def test_an_ideal_model_draws_the_distribution_it_knows() -> None:
    schedule = linear(200, last=0.06)
    noise = drawn(4000, 1)
    ancestral = diffusion.sample_ddpm(gaussian(schedule, 0.5), schedule, noise, "noise", jax.random.key(0))
    straight = diffusion.sample_ddim(gaussian(schedule, 0.5), schedule, noise, "noise", steps=100)
    assert np.std(ancestral) == pytest.approx(0.5, rel=0.05)  # of 4000 numbers: ± .006
    assert np.std(straight) == pytest.approx(0.5, rel=0.05)
    assert abs(np.corrcoef(ancestral[:, 0], noise[:, 0])[0, 1]) < 0.1
    # A deterministic path keeps the order.
    assert np.corrcoef(straight[:, 0], noise[:, 0])[0, 1] > 0.999


def test_a_step_of_ddpm_is_the_posterior() -> None:
    """Algorithm 2 of the paper, written with β and ᾱ, with the smaller of its two spreads."""
    schedule = linear(4, 0.1, 0.4)
    betas = np.linspace(0.1, 0.4, 4)
    kept = np.cumprod(1 - betas)
    noise, key = drawn(3, 5), jax.random.key(3)
    x = noise.astype(np.float64)
    for step, each in zip((3, 2, 1, 0), jax.random.split(key, 4), strict=True):
        before = kept[step - 1] if step else 1.0
        x = (x - betas[step] / np.sqrt(1 - kept[step]) * np.tanh(x)) / np.sqrt(1 - betas[step])
        spread = betas[step] * (1 - before) / (1 - kept[step])
        x = x + np.sqrt(spread) * np.asarray(jax.random.normal(each, x.shape, jnp.float32))
    ours = diffusion.sample_ddpm(lambda noisy, step: jnp.tanh(noisy), schedule, noise, "noise", key)
    np.testing.assert_allclose(ours, x, atol=1e-4)


def test_a_limit_holds_what_is_drawn() -> None:
    schedule = linear(10)
    free, held = (
        diffusion.sample_ddim(lambda noisy, step: -noisy, schedule, drawn(2, 8), "noise", steps=5, limit=limit)
        for limit in (0.0, 0.5)
    )
    assert np.abs(free).max() > 0.6
    assert np.abs(held).max() <= 0.5 + 1e-6


def test_labels_are_dropped_at_the_rate_and_guidance_extrapolates() -> None:
    label = np.arange(2000, dtype=np.int32) % 5
    dropped = np.asarray(drop_labels(jax.random.key(0), label, 0.1, 5))
    assert ((dropped == label) | (dropped == 5)).all()
    assert np.mean(dropped == 5) == pytest.approx(0.1, abs=0.02)
    one, none = drawn(3), drawn(3, seed=1)
    np.testing.assert_allclose(guided(one, none, 0.0), none, atol=1e-6)
    np.testing.assert_allclose(guided(one, none, 1.0), one, atol=1e-6)
    np.testing.assert_allclose(guided(one, none, 3.5), none + 3.5 * (one - none), atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    schedule = linear(5)
    with pytest.raises(ZooError, match="diffusion kind: got 'score', wanted one of noise, v, clean"):
        target(schedule, "score", drawn(1, 2), np.array([0]), drawn(1, 2))
    with pytest.raises(ZooError, match="steps: got 6, wanted 1 to 5"):
        diffusion.sample_ddim(lambda x, step: x, schedule, drawn(1, 2), "v", steps=6)
    with pytest.raises(ZooError, match="wanted a key"):
        diffusion.sample_ddim(lambda x, step: x, schedule, drawn(1, 2), "v", steps=2, eta=1.0)
