"""RBTransformer: its sizes, the entropies it reads, and electrodes as tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import compiled, init, run

import zoo
from zoo.encoders.encoder import blank
from zoo.encoders.rbtransformer import BANDS, SILENCE, differential_entropy
from zoo.errors import ZooError
from zoo.layers.spectra import band_variance
from zoo.registry import parameter_count

SMALL = {"channels": 5, "dim": 16, "depth": 2, "heads": 2, "width": 8, "hidden": 16}


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("rbtransformer_seed", 3, 668_803),
        ("rbtransformer_deap", 2, 664_834),
        ("rbtransformer_deap", 9, 665_737),
        ("rbtransformer_dreamer", 2, 662_530),
        ("rbtransformer_dreamer", 5, 662_917),
    ],
)
def test_counts_of_the_published_classifiers(name: str, classes: int, count: int) -> None:
    encoder = zoo.create(name)
    head = jax.eval_shape(encoder.head(classes).init, jax.random.key(0), jnp.zeros((1, encoder.features)))
    assert parameter_count(encoder) + sum(leaf.size for leaf in jax.tree.leaves(head)) == count


def test_variance_of_a_band_is_that_of_the_waves_in_it() -> None:
    time = np.arange(400) / 200
    waves = [amplitude * np.sin(2 * np.pi * hertz * time + 1) for amplitude, hertz in ((3, 6), (2, 10), (1, 40))]
    found = band_variance(jnp.asarray(np.sum(waves, 0), jnp.float32), 200.0, BANDS)
    np.testing.assert_allclose(found, [4.5, 2.0, 0.0, 0.5], atol=1e-4)
    noise = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    every = band_variance(jnp.asarray(noise), 50.0, ((0.0, 12.0), (12.0, 26.0)))
    np.testing.assert_allclose(every.sum(-1), noise.var(-1), rtol=1e-5)


def test_entropies_are_those_of_standardised_channels() -> None:
    time = np.arange(400) / 200
    signal = np.stack([7 * np.sin(2 * np.pi * 10 * time) + 100, np.zeros(400)])[None].astype(np.float32)
    found = differential_entropy(jnp.asarray(signal), 200.0)
    alpha = 0.5 * np.log(2 * np.pi * np.e * 399 / 400)
    silent = 0.5 * np.log(2 * np.pi * np.e * SILENCE)
    np.testing.assert_allclose(found[0], [[silent, alpha, silent, silent], [silent] * 4], rtol=1e-4)


def test_moving_electrodes_with_their_rows_moves_tokens_alone() -> None:
    encoder = zoo.create("rbtransformer_tiny", **SMALL)
    signal = np.random.default_rng(0).normal(size=(2, 5, 200)).astype(np.float32)
    sensors = jax.tree.map(lambda leaf: np.repeat(leaf, 2, 0), blank(5, 1)[1])
    variables = init(encoder, signal, sensors)
    order = np.array([3, 0, 4, 1, 2])
    table = variables["params"]["embed_electrode"]
    moved = {"params": {**variables["params"], "embed_electrode": table[order]}}
    a, b = run(encoder, variables, signal, sensors), run(encoder, moved, signal[:, order], sensors)
    np.testing.assert_allclose(b.tokens, a.tokens[:, order], atol=1e-5)
    np.testing.assert_allclose(b.pooled, a.pooled, atol=1e-5)
    other = run(encoder, variables, signal[:, order], sensors)
    assert np.abs(other.pooled - a.pooled).max() > 1e-3


def test_a_baseline_is_subtracted() -> None:
    """A baseline that has the trial's own spectrum leaves nothing of any window; without it windows differ."""
    rng = np.random.default_rng(0)
    trial = rng.normal(size=(2, 5, 200)).astype(np.float32)
    twice = np.concatenate([3 * trial, trial], -1)
    sensors = jax.tree.map(lambda leaf: np.repeat(leaf, 2, 0), blank(5, 1)[1])
    with_baseline = zoo.create("rbtransformer_tiny", **SMALL, baseline=200)
    variables = init(with_baseline, twice, sensors)
    pooled = run(with_baseline, variables, twice, sensors).pooled
    np.testing.assert_allclose(pooled[0], pooled[1], atol=1e-5)
    plain = run(zoo.create("rbtransformer_tiny", **SMALL), variables, trial, sensors).pooled
    assert np.abs(plain[0] - plain[1]).max() > 1e-3


def test_masks_and_baselines_as_long_as_the_window_are_refused() -> None:
    signal, sensors = blank(5, 200)
    encoder = zoo.create("rbtransformer_tiny", **SMALL)
    with pytest.raises(ZooError, match="takes no mask"):
        jax.eval_shape(lambda: encoder.init(jax.random.key(0), signal, sensors, mask=np.zeros((1, 5), bool)))
    with pytest.raises(ZooError, match="got a window of 0 samples"):
        jax.eval_shape(zoo.create("rbtransformer_tiny", **SMALL, baseline=200).init, jax.random.key(0), signal, sensors)


@pytest.mark.slow
def test_it_learns_which_electrode_has_alpha() -> None:
    rng = np.random.default_rng(0)
    time = np.arange(200) / 200
    label = rng.integers(0, 5, 96)
    signal = rng.normal(size=(96, 5, 200))
    signal[np.arange(96), label] += np.sin(2 * np.pi * (10 * time + rng.uniform(size=(96, 1))))
    sensors = jax.tree.map(lambda leaf: np.repeat(leaf, 96, 0), blank(5, 1)[1])
    encoder = zoo.create("rbtransformer_tiny", **SMALL, dropout=0.0)
    head = encoder.head(5)
    params = {
        "encoder": init(encoder, signal, sensors),
        "head": init(head, jnp.zeros((1, 16))),
    }
    signal = jnp.asarray(signal, jnp.float32)

    def logits(params: Any, rows: Any) -> Any:
        there = jax.tree.map(lambda leaf: leaf[rows], sensors)
        return head.apply(params["head"], encoder.apply(params["encoder"], signal[rows], there).pooled)

    rule = optax.adam(3e-3)

    @compiled
    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            found = logits(params, np.arange(64))
            return optax.softmax_cross_entropy_with_integer_labels(found, label[:64]).mean()

        updates, state = rule.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = rule.init(params)
    for _ in range(60):
        params, state = step(params, state)
    assert np.mean(np.argmax(compiled(logits)(params, np.arange(64, 96)), -1) == label[64:]) > 0.8
