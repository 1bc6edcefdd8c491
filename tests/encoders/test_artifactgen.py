"""ArtifactGen: lengths, both trainings, and how what is made is judged."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes
from loop import trained
from quick import compiled, run

import zoo
from zoo.errors import ZooError
from zoo.evaluate.generated import class_spectra, median_distance, mmd
from zoo.objectives.artifactgen import (
    ArtifactDiffusion,
    ArtifactGAN,
    Generator,
)
from zoo.train.config import Optimizer

NAMES = ("FP1", "FP2")
CRITIC = {"channels": NAMES, "width": 8}
UNET = {"channels": NAMES, "width": 8, "blocks": 1, "groups": 2, "condition": 16, "classes": 2, "dropout": 0.0}


def batch(size: int = 8, samples: int = 34, seed: int = 0) -> dict[str, Any]:
    """Class 0 is slow waves, class 1 fast ones, in a little noise; the phase is anyone's."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, size).astype(np.int32)
    turns = np.where(label, 0.2, 0.06)[:, None, None] * np.arange(samples) + rng.uniform(size=(size, len(NAMES), 1))
    signal = 20 * np.sin(2 * np.pi * turns) + rng.normal(size=turns.shape)
    return {
        "signal": signal.astype(np.float32),
        "sensors": electrodes(NAMES, size),
        "label": label,
        "record": np.arange(size, dtype=np.int32),
    }


def test_the_generator_doubles_its_steps() -> None:
    shapes = {}

    def note(call: Any, given: Any, options: Any, context: Any) -> Any:
        out = call(*given, **options)
        if context.method_name == "__call__":
            shapes[context.module.name] = out.shape[1:]
        return out

    with nn.intercept_methods(note):
        made = jax.eval_shape(
            lambda: Generator(8, 250, 5).init_with_output(
                jax.random.key(0), jnp.zeros((1, 128)), jnp.zeros(1, jnp.int32)
            )[0]
        )
    assert [shapes[name] for name in ("first", "up0", "up1", "up2")] == [(31, 256), (62, 128), (124, 64), (250, 8)]
    assert made.shape == (1, 8, 250)
    with pytest.raises(ZooError, match="got 256, wanted a multiple of 8 and 2 more"):
        jax.eval_shape(Generator(8, 256, 5).init, jax.random.key(0), jnp.zeros((1, 128)), jnp.zeros(1, jnp.int32))


def test_each_network_has_the_gradient_of_its_own_loss() -> None:
    """The generator's is zero in the critic's steps, and the critic's is the same in all."""
    task = ArtifactGAN("artifactgen_tiny", CRITIC, classes=2, noise=4, critic_steps=2)
    given = batch()
    variables = zoo_init(task, given)

    def gradient(variables: Any) -> Any:
        def loss(params: Any) -> Any:
            value, metrics, new = task.loss({**variables, "params": params}, given, jax.random.key(0), True)
            return value, (metrics, new)

        return jax.grad(loss, has_aux=True)(variables["params"])

    step = compiled(gradient)
    first, (metrics, new) = step(variables)
    second, (later, newer) = step({**variables, **new})
    size = lambda tree: max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(first["generator"]) == 0
    assert min(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(second["generator"])) > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        *({k: v for k, v in each.items() if k != "generator"} for each in (first, second)),
    )
    assert (metrics["generator"], int(new["turn"]["steps"]), int(newer["turn"]["steps"])) == (0, 1, 2)
    assert later["generator"] != 0


def test_guidance_of_one_is_the_model_and_labels_are_dropped_in_a_tenth() -> None:
    task = ArtifactDiffusion("artifactgen_unet_tiny", UNET, steps=10, skips=False)
    variables = zoo_init(task, batch(4, 8))
    label = np.array([0, 1])

    def drawn(guidance: float) -> Any:
        return compiled(lambda label: task.generate(variables, jax.random.key(3), label, 8, guidance=guidance, steps=2))

    model = drawn(1.0)
    told, untold, none = model(label), drawn(0.0)(label), model(-np.ones(2, int))
    np.testing.assert_allclose(untold, none, atol=1e-4)
    assert np.abs(told - none).max() > 1e-3
    with pytest.raises(ZooError, match="got 'sine', wanted 'cosine' or 'linear'"):
        replace(task, schedule="sine").plan()
    assert ArtifactDiffusion().drop == 0.1


def test_windows_are_scaled_over_valid_channels() -> None:
    critic = zoo.create("artifactgen_tiny", **CRITIC)
    sensors = electrodes(NAMES, 1)
    signal = np.array([[[1.0, 2, 3], [-5, 0, 5]]], np.float32)
    np.testing.assert_allclose(critic.scaled(signal, sensors)[0], [[0.2, 0.4, 0.6], [-1, 0, 1]], atol=1e-6)
    sensors.valid[0, 1] = False
    np.testing.assert_allclose(critic.scaled(signal, sensors)[0], [[-1, 0, 1], [0, 0, 0]], atol=1e-6)
    with pytest.raises(ZooError, match="takes no mask"):
        run(critic, {}, signal, sensors, mask=np.zeros((1, 2), bool))


def test_discrepancy_tells_sets_apart_by_the_bandwidth_of_what_is_real() -> None:
    rng = np.random.default_rng(0)
    real, again, other = rng.normal(size=(2, 60, 1, 5)), rng.normal(size=(60, 1, 5)), rng.normal(2, 1, (60, 1, 5))
    bandwidth = compiled(median_distance)(real[0])
    distances = [np.linalg.norm(a - b) for i, a in enumerate(real[0, :, 0]) for b in real[0, :i, 0]]
    np.testing.assert_allclose(bandwidth, np.median(distances), rtol=1e-5)
    same, apart = (compiled(mmd)(real[0], each, bandwidth) for each in (again, other))
    assert abs(same) < 0.02 < 0.3 < apart


def test_spectra_are_those_of_the_classes() -> None:
    given = batch(40, 50)
    spectra = class_spectra(given["signal"], given["label"], 3)
    assert spectra.shape == (3, 2, 26)
    assert [int(each) for each in spectra.mean(1).argmax(-1)] == [3, 10, 0]
    power = np.square(given["signal"][given["label"] == 1]).sum(-1).mean(0)
    whole = 2 * spectra[1].sum(-1) - spectra[1, :, 0] - spectra[1, :, -1]
    np.testing.assert_allclose(whole, power, rtol=1e-4)


def zoo_init(task: Any, given: Any) -> Any:
    return compiled(lambda: nn.meta.unbox(task.init(jax.random.key(0), given)))()


@pytest.mark.slow
def test_diffusion_in_the_loop_draws_the_spectra_of_its_classes() -> None:
    task = ArtifactDiffusion("artifactgen_unet_tiny", {**UNET, "width": 16}, steps=100)
    variables, figures = trained(
        task, partial(batch, 32, 32), Optimizer(learning_rate=3e-3, weight_decay=0.0), 300, ema=0.98
    )
    assert np.mean([each["loss"] for each in figures[-20:]]) < 0.5 * figures[0]["loss"]
    label = np.arange(64) % 2
    made = compiled(lambda: task.generate(variables, jax.random.key(0), label, 32, guidance=1.5, steps=20))()
    peaks = class_spectra(made, label, 2).mean(1).argmax(-1)
    assert abs(int(peaks[0]) - 2) <= 1
    assert abs(int(peaks[1]) - 6) <= 1


@pytest.mark.slow
def test_adversaries_in_the_loop_come_nearer_to_what_is_real() -> None:
    """The penalty keeps the critic's slope near one; made windows take on the spectra of their classes."""
    task = ArtifactGAN("artifactgen_tiny", {**CRITIC, "width": 16}, classes=2, noise=8, critic_steps=3)
    optimizer = Optimizer(learning_rate=1e-3, b1=0.0, b2=0.9, weight_decay=0.0, clip_norm=0.0, warmup_steps=1)
    variables, figures = trained(task, partial(batch, 32, 34), optimizer, 1000)
    assert np.mean([each["penalty"] for each in figures[-50:]]) < 0.1
    label, given = np.arange(64) % 2, batch(64, 34)
    draw = compiled(lambda variables: task.generate(variables, jax.random.key(0), label, 34))
    real = task.encoder().scaled(given["signal"], given["sensors"])
    wanted = class_spectra(real, given["label"], 2)[..., 1:]
    found, first = (class_spectra(draw(each), label, 2)[..., 1:] for each in (variables, zoo_init(task, given)))
    assert np.abs(found - wanted).sum() < 0.8 * np.abs(first - wanted).sum()
    peaks = found.mean(1).argmax(-1) + 1
    assert abs(int(peaks[0]) - 2) <= 1
    assert abs(int(peaks[1]) - 7) <= 1
