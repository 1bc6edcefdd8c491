"""MTAM: its numbers, and what draws EEG and text together."""

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

import zoo
from zoo.encoders.mtam import NEUROSKY, ZUCO, amplitudes
from zoo.errors import ZooError
from zoo.objectives.alignment import cca_loss
from zoo.objectives.mtam import AlignText, distance
from zoo.train.config import Optimizer

NAMES = ("C3", "C4")
SMALL = {"channels": NAMES, "rate": 128.0, "bands": ((4.0, 13.0), (13.0, 40.0)), "dim": 8, "width": 4}


def batch(seed: int = 0, size: int = 32) -> dict[str, Any]:
    """The label is the side with the stronger alpha waves, and where the text's numbers are large."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, size).astype(np.int32)
    signal = rng.normal(size=(size, 2, 128))
    signal[np.arange(size), label] += 2 * np.sin(2 * np.pi * (np.arange(128) / 128 * 10 + rng.uniform(size=(size, 1))))
    text = rng.normal(size=(size, 6)) + 1.5 * np.where(label[:, None], 1, -1)
    given = {"signal": signal.astype(np.float32), "sensors": electrodes(NAMES, size)}
    return {**given, "label": label, "text": text.astype(np.float32)}


def test_amplitudes_go_by_channel_then_part_then_band() -> None:
    time = np.arange(256) / 128
    signal = np.stack([3 * np.sin(2 * np.pi * 10 * time), 2 * np.sin(2 * np.pi * 20 * time)])
    signal[1, 128:] = 0
    found, there = amplitudes(jnp.asarray(signal[None], jnp.float32), jnp.ones((1, 2), bool), 128.0, SMALL["bands"], 2)
    np.testing.assert_allclose(found[0], [3, 0, 3, 0, 0, 2, 0, 0], atol=1e-3)
    np.testing.assert_array_equal(there[0], [True] * 6 + [False] * 2)


def test_published_inputs_have_the_published_lengths() -> None:
    for name, numbers in (("mtam_zuco", 832), ("mtam_kemocon", 48)):
        encoder = zoo.create(name)
        given = encoder.example()
        variables = jax.eval_shape(encoder.init, jax.random.key(0), *given)
        assert jax.eval_shape(encoder.apply, variables, *given).tokens.shape == (1, numbers, 16)
    assert len(ZUCO) == len(NEUROSKY) == 8


def test_correlations_of_what_is_the_same_but_for_a_map_are_their_number() -> None:
    """Minus the trace norm: −D for an invertible map of the same vectors, near 0 for others'."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 4000, 3)).astype(np.float32)
    mapped = one @ rng.normal(size=(3, 3)).astype(np.float32)
    same, apart = (float(cca_loss(one, each, regulariser=1e-6)) for each in (mapped, other))
    np.testing.assert_allclose(same, -3, atol=1e-3)
    assert apart > -0.2


def test_the_distance_is_that_of_the_rows_with_a_label_and_moves_both_sides() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 10, 3)).astype(np.float32)
    valid = np.arange(10) < 7
    given = jnp.asarray(one), jnp.asarray(other), jnp.asarray(valid)
    value, slopes = jax.value_and_grad(distance, (0, 1))(*given)
    np.testing.assert_allclose(value, stats.wasserstein_distance(one[:7].ravel(), other[:7].ravel()), rtol=1e-5)
    for slope in slopes:
        assert np.abs(slope[:7]).min() > 0
        assert not np.any(slope[7:])


def test_each_term_reaches_both_towers() -> None:
    given = batch(size=8)

    @compiled
    def slopes(params: Any) -> Any:
        def of(**weights: float) -> Any:
            task = AlignText("mtam_tiny", SMALL, classes=2, **weights)
            value = lambda params: task.loss({"params": params}, given, jax.random.key(0), False)[0]  # noqa: E731
            return jax.grad(value)(params)

        plain = of(correlation=0.0, transport=0.0)
        return [
            jax.tree.map(jnp.subtract, of(**weights), plain)
            for weights in ({"correlation": 1.0, "transport": 0.0}, {"correlation": 0.0, "transport": 1.0})
        ]

    task = AlignText("mtam_tiny", SMALL, classes=2)
    params = compiled(lambda: nn.meta.unbox(task.init(jax.random.key(0), given)))()["params"]
    for slope in slopes(params):
        assert np.abs(slope["encoder"]["tower"]["embed"]["kernel"]).max() > 1e-4
        assert np.abs(slope["text"]["embed"]["kernel"]).max() > 1e-4
    with pytest.raises(ZooError, match="needs batches with vectors of text"):
        task.init(jax.random.key(0), {"signal": given["signal"], "sensors": given["sensors"]})


@pytest.mark.slow
def test_it_learns_labels_while_the_two_sides_come_together() -> None:
    task = AlignText("mtam_tiny", SMALL, classes=2, components=1)
    _, figures = trained(task, batch, Optimizer(learning_rate=3e-3, warmup_steps=5), 150)
    last = {name: np.mean([each[name] for each in figures[-20:]]) for name in figures[0]}
    assert last["accuracy"] > 0.9
    assert last["correlation"] < -0.7
    assert last["transport"] < figures[0]["transport"]
