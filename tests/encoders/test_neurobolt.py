"""NeuroBOLT: its published sizes, its two branches, and a haemodynamic response that it learns."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from electrodes import electrodes

import zoo
from zoo.encoders.neurobolt import VANDERBILT
from zoo.errors import ZooError
from zoo.registry import parameter_count

QUICK = {"xla_backend_optimization_level": 0}


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_published_counts():
    encoder = zoo.create("neurobolt_base")
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), *encoder.example())["params"]
    head = jax.eval_shape(encoder.head(1).init, jax.random.key(0), np.zeros((1, 200), np.float32))
    # The published count of the branch has the 26 numbers of its rows in it, which nothing learns.
    assert count(shapes["spectrum"]) + 26 == 2_086_874
    assert count(shapes["waveform"]) == 5_819_936
    assert parameter_count(encoder) + count(head) == 7_906_985


def test_one_value_a_region():
    encoder = zoo.create("neurobolt_tiny")
    signal, sensors = encoder.example()
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), signal, sensors)
    out = jax.eval_shape(encoder.apply, shapes, signal, sensors)
    assert out.tokens.shape == (1, 26 * (16 + 32), 100)
    head = encoder.head(64)
    assert nn.unbox(jax.eval_shape(head.init, jax.random.key(0), out.pooled))["params"]["map"]["linear"][
        "kernel"
    ].shape == (100, 64)


def test_what_it_cannot_take_is_refused():
    encoder = zoo.create("neurobolt_tiny")
    encoder.check_recording(200.0, ("eeg",) * 2, VANDERBILT[3:5])
    with pytest.raises(ZooError, match="NeuroBOLT has no row for channel 'PO3'"):
        encoder.check_recording(200.0, ("eeg",), ("PO3",))
    with pytest.raises(ZooError, match="hides nothing"):
        encoder.init(jax.random.key(0), *encoder.example(), mask=np.zeros((1, 26, 16), bool))
    with pytest.raises(ZooError, match="the longest window divides"):
        zoo.create("neurobolt_tiny", samples=3000).flops(26, 3000)


NAMES, RATE, SECONDS = ("O1", "O2", "CZ"), 40, 16
"""Of the invented recordings, whose second has 40 samples."""


def recording(rng: np.random.Generator, volumes: int) -> tuple[np.ndarray, np.ndarray]:
    """EEG [3, T] whose 10 Hz waxes and wanes over O1, and each second's value: its logarithm, through a response.

    The logarithm walks slowly, by a factor of ten and more in amplitude. The response peaks five seconds later.
    """
    seconds = volumes + SECONDS
    walk = np.convolve(rng.normal(size=seconds + 8), np.hanning(6), "valid")[:seconds]
    level = walk / walk.std()
    time = np.arange(seconds * RATE) / RATE
    loud = np.exp(1.2 * np.interp(time, np.arange(seconds) + 0.5, level))
    noise = rng.normal(size=(3, len(time)))
    noise[0] += loud * np.sin(2 * np.pi * 10 * time + rng.uniform(0, 6))
    lag = np.arange(SECONDS)
    response = lag**5 * np.exp(-lag)
    value = np.convolve(level, response / response.sum())[:seconds]
    return noise.astype(np.float32), value


def windows(signal: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 16 s that end with each second, and its value."""
    ends = np.arange(SECONDS, len(value))
    cut = np.stack([signal[:, (end - SECONDS) * RATE : end * RATE] for end in ends])
    return cut, value[ends - 1]


def ridge(train: Any, test: Any) -> np.ndarray:
    """Predictions from the power of five bands in each second of each channel; the best of ten penalties."""

    def features(cut: np.ndarray) -> np.ndarray:
        power = np.abs(np.fft.rfft(cut.reshape(len(cut), 3, SECONDS, RATE))) ** 2
        bands = [power[..., low:high].mean(-1) for low, high in ((1, 4), (4, 8), (8, 13), (13, 20), (20, 21))]
        return np.stack(bands, -1).reshape(len(cut), -1)

    (x, y), (x_test, y_test) = ((features(cut), value) for cut, value in (train, test))
    mean, spread = x.mean(0), x.std(0)
    x, x_test = (x - mean) / spread, (x_test - mean) / spread
    tried = [
        x_test @ np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (y - y.mean()))
        for penalty in np.logspace(-2, 5, 10)
    ]
    return max(tried, key=lambda guess: np.corrcoef(guess, y_test)[0, 1])


@pytest.mark.slow
def test_it_learns_a_response_better_than_a_ridge_of_lagged_power():
    rng = np.random.default_rng(0)
    # Two recordings, so that no window of the one is part of one of the other.
    train, test = windows(*recording(rng, 600)), windows(*recording(rng, 300))
    encoder = zoo.create(
        "neurobolt_tiny",
        channels=NAMES,
        samples=SECONDS * RATE,
        labram={"patch": RATE, "conv_features": 4, "dim": 20, "heads": 2, "depth": 1},
        window=20,
        heads=2,
        drop_path=0.0,
        dropout=0.0,
    )
    head, sensors = encoder.head(1), electrodes(NAMES, 32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    body = nn.unbox(jax.jit(encoder.init, compiler_options=QUICK)(keys, train[0][:32], sensors))
    top = nn.unbox(head.init(jax.random.key(2), jnp.zeros((1, 20))))
    steps = 400
    optimiser = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 40, steps), weight_decay=0.01)

    def predict(params: Any, cut: Any, train: bool, key: Any) -> Any:
        pooled = encoder.apply(params[0], cut, sensors, train=train, rngs={"dropout": key}).pooled
        return head.apply(params[1], pooled)[:, 0]

    @jax.jit
    def step(params: Any, state: Any, cut: Any, value: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.mean(jnp.square(predict(params, cut, True, key) - value))

        updates, state = optimiser.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = (body, top), optimiser.init((body, top))
    for number in range(steps):
        rows = rng.integers(0, len(train[0]), 32)
        params, state = step(params, state, train[0][rows], train[1][rows], jax.random.key(number))
    apply = jax.jit(lambda params, cut: predict(params, cut, False, jax.random.key(0)))
    last = len(test[0]) // 32 * 32
    ours = np.concatenate([apply(params, test[0][row : row + 32]) for row in range(0, last, 32)])
    scores = [np.corrcoef(guess, test[1][:last])[0, 1] for guess in (ours, ridge(train, test)[:last])]
    print(f"correlation {scores[0]:.3f}, ridge {scores[1]:.3f}")
    assert scores[0] > scores[1] + 0.05
