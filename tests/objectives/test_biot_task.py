"""BIOT's contrast of windows with parts of their words."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from electrodes import electrodes

from zoo.errors import ZooError
from zoo.objectives.biot import PerturbedWords, left_out

QUICK = {"xla_backend_optimization_level": 0}
NAMES = ("FP1-F7", "C3-P3")
SMALL = {"window": 20, "hop": 10, "dim": 16, "heads": 2, "depth": 1, "dropout": 0.0, "embed_dropout": 0.0}


def test_published_count():
    task = PerturbedWords("biot_base_18")
    signal = np.zeros((1, 18, 400), np.float32)
    variables = jax.eval_shape(
        task.init, jax.random.key(0), {"signal": signal, "sensors": electrodes(["FP1-F7"] * 18, 1)}
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 3_318_272


def test_half_to_nearly_all_words_stay():
    stay = 8 - np.asarray(left_out(jax.random.key(0), (50, 4, 8))).sum(-1)
    assert set(stay.ravel()) == {4, 5, 6, 7}
    assert (np.asarray(left_out(jax.random.key(0), (3, 4, 1))) == 0).all()


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any, Any, list[float]]:
    """A hundred steps on windows, each of its own frequencies; the last one has no channel."""
    task = PerturbedWords("biot_tiny", SMALL)
    rng = np.random.default_rng(0)
    time = np.arange(120)
    signal = np.sin(time * rng.uniform(0.3, 2.8, (16, 2, 1))) + 0.1 * rng.normal(size=(16, 2, 120))
    sensors = electrodes(NAMES, 16)
    sensors.valid[-1] = False
    batch = {"signal": signal.astype(np.float32), "sensors": sensors}
    variables = nn.unbox(jax.jit(task.init, compiler_options=QUICK)(jax.random.key(0), batch))
    optimiser = optax.adam(3e-3)

    def step(variables: Any, state: Any, key: Any) -> Any:
        (value, metrics), grads = jax.value_and_grad(lambda v: task.loss(v, batch, key, True)[:2], has_aux=True)(
            variables
        )
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(variables, updates), state, value, metrics

    run = jax.jit(step, compiler_options=QUICK)
    state, values = optimiser.init(variables), []
    for number in range(100):
        variables, state, value, metrics = run(variables, state, jax.random.key(number))
        values.append(float(value))
    return task, batch, metrics, values


def test_it_learns_to_tell_windows_apart(trained):
    *_, metrics, values = trained
    assert np.mean(values[:5]) > 2.0
    assert np.mean(values[-5:]) < 1.2
    assert metrics["top1"] > 0.7


def test_a_window_without_channels_counts_for_nothing(trained):
    _, _, metrics, values = trained
    assert metrics["weight"] == 15
    assert np.isfinite(values).all()


def test_another_encoder_is_refused_and_a_recording_of_another_rate():
    with pytest.raises(ZooError, match="labram_tiny has no words to leave out"):
        PerturbedWords("labram_tiny").encoder()
    with pytest.raises(ZooError, match="wanted 200 Hz"):
        PerturbedWords().check_recording(100.0, ("eeg",), ("FP1-F7",))
    assert PerturbedWords().flops({"signal": np.zeros((2, 3, 400))}) > 0
