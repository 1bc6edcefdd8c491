"""Prediction of what a slow average of the encoder makes of hidden patches."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes
from quick import compiled

from zoo.errors import ZooError
from zoo.objectives.jepa import Jepa, ema, first_target, latent_mse, momentum, next_target

NAMES = ("F3", "FZ", "F4")
TASK = Jepa("cbramod_tiny", {"depth": 1, "channels": 3}, steps=10, momentum=(0.9, 1.0))


def make_batch(seed: int = 0, batch: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    sensors = electrodes(NAMES, batch)
    sensors.valid[1, 2] = False
    return {
        "signal": rng.normal(size=(batch, 3, 400)).astype(np.float32),
        "sensors": sensors,
        "mask": rng.uniform(size=(batch, 3, 2)) < 0.5,
    }


@pytest.fixture(scope="module")
def variables() -> Any:
    return nn.unbox(compiled(TASK.init)(jax.random.key(0), make_batch()))


def test_momentum_rises_to_its_end_and_stays_there() -> None:
    found = [float(momentum(step, 4, 0.996)) for step in range(6)]
    np.testing.assert_allclose(found, [0.996, 0.997, 0.998, 0.999, 1, 1], atol=1e-6)


def test_the_average_follows_and_has_no_gradient() -> None:
    old, new = {"a": jnp.ones(3)}, {"a": jnp.full(3, 5.0)}
    np.testing.assert_allclose(ema(old, new, 0.75)["a"], 2.0)
    target = next_target(first_target(old), new, 10, 0.5, 1.0)
    np.testing.assert_allclose(target["params"]["a"], 3.0)
    np.testing.assert_allclose(next_target(target, new, 10, 0.5, 1.0)["params"]["a"], 0.55 * 3 + 0.45 * 5)
    gradient = jax.grad(lambda new: ema(old, new, 0.75)["a"].sum())(new)
    assert not np.asarray(gradient["a"]).any()


def test_latents_are_compared_with_normalised_ones() -> None:
    rng = np.random.default_rng(0)
    prediction, target = (
        rng.normal(size=(2, 4, 8)).astype(np.float32),
        3 + rng.normal(size=(2, 4, 8)).astype(np.float32),
    )
    valid = np.array([[1, 0, 1, 1], [0, 0, 1, 0]], bool)
    normal = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, keepdims=True) + 1e-5)
    wanted = np.square(prediction - normal)[valid].mean()
    np.testing.assert_allclose(latent_mse(prediction, target, valid), wanted, rtol=1e-5)
    plain = np.square(prediction - target).mean()
    np.testing.assert_allclose(latent_mse(prediction, target, normalised=False), plain, rtol=1e-5)
    assert not np.asarray(jax.grad(lambda t: latent_mse(prediction, t))(target)).any()


@pytest.mark.slow
def test_the_loss_is_of_hidden_tokens_and_what_the_average_makes_of_the_whole(variables: Any) -> None:
    batch, key = make_batch(), jax.random.key(0)
    away = jax.tree.map(lambda leaf: 1.1 * leaf, variables["target"]["params"])
    moved = {**variables, "target": {"params": away, "step": jnp.int32(5)}}

    def both(variables: Any) -> Any:
        prediction, encoded = TASK.module().apply(
            {"params": variables["params"]}, batch["signal"], batch["sensors"], batch["mask"]
        )
        whole = TASK.encoder().apply({"params": variables["target"]["params"]}, batch["signal"], batch["sensors"])
        return TASK.loss(variables, batch, key, False), prediction, encoded.valid, whole.tokens

    (value, metrics, new), prediction, valid, wanted = compiled(both)(moved)
    hidden = np.asarray(valid) & batch["mask"].reshape(3, 6)
    assert not hidden[1, 4:].any()
    np.testing.assert_allclose(value, latent_mse(prediction, wanted, hidden), rtol=1e-5)
    assert metrics["weight"] == hidden.sum()
    assert metrics["target_deviation"] > 0
    assert not new


def test_training_moves_the_average_by_its_momentum_and_no_gradient_reaches_it(variables: Any) -> None:
    batch = make_batch()
    trained = {**variables, "params": jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])}

    def gradient(variables: Any) -> Any:
        def value(variables: Any) -> Any:
            value, _, new = TASK.loss(variables, batch, jax.random.key(0), True)
            return value, new

        return jax.grad(value, has_aux=True, allow_int=True)(variables)

    found, new = compiled(gradient)(trained)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found["target"]["params"]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found["params"]))
    assert new["target"]["step"] == 1
    jax.tree.map(
        lambda before, after: np.testing.assert_allclose(after, before + 0.01, atol=1e-6),
        variables["target"]["params"],
        new["target"]["params"],
    )


def test_what_does_not_fit_is_refused() -> None:
    batch = make_batch()
    del batch["mask"]
    with pytest.raises(ZooError, match=r"data\.mask_patch"):
        TASK.init(jax.random.key(0), batch)
    with pytest.raises(ZooError, match="is not an encoder of signals"):
        dataclasses.replace(TASK, model="labram_vqnsp_tiny", options={}).encoder()
