"""EEGDM: its counts, that it begins by predicting zero, what it learns from, and what its gates are reduced to."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes

import zoo
from zoo.encoders.eegdm import staged_mu_law
from zoo.errors import ZooError
from zoo.objectives.diffusion import noised, squared_cosine, target
from zoo.objectives.eegdm import Denoise

QUICK = {"xla_backend_optimization_level": 0}
"""Compilation takes longer than these small programs run."""
SMALL: dict[str, Any] = {
    "channels": 2, "depth": 2, "dim": 8, "states": 4, "condition": 8, "fusing": 1, "hidden": 8, "second": 20,
}  # fmt: skip


def test_counts_are_the_published():
    """The denoiser as measured; the rest, with a linear map to 6 classes, 6.9 M as stated."""
    encoder = zoo.create("eegdm_base")
    params = jax.eval_shape(encoder.init, jax.random.key(0), *encoder.example())["params"]
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}
    assert counts.pop("denoiser") == 5_931_649
    assert round((sum(counts.values()) + 6 * 129) / 1e6, 1) == 6.9


def test_staged_mu_law():
    """As it is up to 1, where it jumps by nothing but in slope; 255 |x| below a logarithm beyond."""
    x = np.array([-300.0, -1.0, -0.3, 0.0, 1.0, 1.0001, 4.0], np.float32)
    wanted = [-np.log1p(255 * 300) / np.log(256), -1, -0.3, 0, 1, 1.0, np.log1p(1020) / np.log(256)]
    np.testing.assert_allclose(staged_mu_law(x), wanted, atol=1e-4)


@pytest.fixture(scope="module")
def task() -> tuple[Any, ...]:
    task = Denoise(options=SMALL)
    signal = np.random.default_rng(0).standard_normal((3, 2, 40)).astype(np.float32)
    sensors = electrodes(["FP1", "FP2"], batch=3)
    sensors = sensors.replace(valid=np.array([[True, True], [True, False], [True, True]]))
    batch = {"signal": signal, "sensors": sensors}
    variables = jax.jit(lambda key: task.init(key, batch), compiler_options=QUICK)(jax.random.key(0))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def learn(params: Any, batch: Any, key: Any) -> Any:
        return jax.value_and_grad(lambda params: task.loss({"params": params}, batch, key, True)[:2], has_aux=True)(
            params
        )

    return task, batch, variables["params"], learn


@pytest.mark.slow
def test_it_begins_by_predicting_zero(task):
    """So the loss is the mean square of v = a · noise - s · signal, whose parts give both back."""
    task, batch, params, learn = task
    key = jax.random.key(3)
    (value, metrics), grads = learn(params, batch, key)
    clean = np.asarray(staged_mu_law(np.where(batch["sensors"].valid[..., None], batch["signal"], 0)))
    of_step, of_noise = jax.random.split(key)
    step = np.asarray(jax.random.randint(of_step, (3, 2), 0, 50))
    noise = np.asarray(jax.random.normal(of_noise, clean.shape))
    schedule = squared_cosine(50)
    a, s = (np.asarray(each)[step][..., None] for each in (schedule.signal, schedule.noise))
    v = a * noise - s * clean
    np.testing.assert_allclose(value, np.square(v)[batch["sensors"].valid].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["error"], 1, rtol=1e-5)
    assert metrics["weight"] == 5
    flat = clean.reshape(6, -1), step.ravel(), noise.reshape(6, -1)
    np.testing.assert_allclose(target(schedule, "v", *flat), v.reshape(6, -1), atol=1e-6)
    np.testing.assert_allclose(noised(schedule, *flat), (a * clean + s * noise).reshape(6, -1), atol=1e-6)
    # What only fuses does not learn from noise; what ends in zeros learns first.
    assert not np.abs(grads["encoder"]["fusion_tokens"].unbox()).any()
    assert np.abs(grads["encoder"]["denoiser"]["out"]["kernel"].unbox()).max() > 0


@pytest.mark.slow
def test_what_is_missing_costs_nothing(task):
    _, batch, params, learn = task
    spoiled = np.where(batch["sensors"].valid[..., None], batch["signal"], 1e3).astype(np.float32)
    a, b = (learn(params, {**batch, "signal": each}, jax.random.key(3))[0][0] for each in (batch["signal"], spoiled))
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_channels_are_denoised_alone_and_told_apart():
    encoder = zoo.create("eegdm_tiny", **SMALL)
    signal, sensors = (
        np.random.default_rng(0).standard_normal((1, 2, 40)).astype(np.float32),
        electrodes(["FP1", "FP2"], 1),
    )
    init = jax.jit(lambda key: encoder.init(key, signal, sensors), compiler_options=QUICK)
    step = jnp.full((1, 2), 7)
    denoiser = functools.partial(encoder.apply, method="denoise")
    run = jax.jit(lambda variables, x: denoiser(variables, x, step)[1], compiler_options=QUICK)
    draw = np.random.default_rng(1)
    # Conditions begin at zero: random ones tell channels apart.
    variables = jax.tree.map(
        lambda leaf: leaf + 0.1 * draw.standard_normal(leaf.shape).astype(np.float32), init(jax.random.key(0))
    )
    seen = run(variables, signal)
    other = signal.copy()
    other[:, 1] = signal[:, 0]
    moved = run(variables, other)
    np.testing.assert_array_equal(moved[:, :, 0], seen[:, :, 0])
    assert np.abs(moved[:, :, 0] - moved[:, :, 1]).max() > 1e-3


def test_what_does_not_fit_is_refused():
    sensors = electrodes(["FP1", "FP2"], 1)
    signal = np.zeros((1, 2, 40), np.float32)
    for options, more, says in (
        ({}, {"mask": np.zeros((1, 2), bool)}, "hides nothing"),
        ({"second": 30}, {}, "a multiple of 30 samples, got 40"),
        ({"depth": 1}, {}, "2 or more blocks"),
    ):
        with pytest.raises(ZooError, match=says):
            zoo.create("eegdm_tiny", **{**SMALL, **options}).init(jax.random.key(0), signal, sensors, **more)
    for task, says in ((Denoise("labram_tiny"), "has no denoiser"), (Denoise(schedule="none"), "got 'none'")):
        with pytest.raises(ZooError, match=says):
            task.encoder()
