"""ADHDeepNet against its definition in float64, its augmentation, and the vote over a person's windows."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.encoders.adhdeepnet import with_noise
from zoo.encoders.encoder import blank
from zoo.errors import ZooError
from zoo.evaluate.votes import vote

QUICK = {"xla_backend_optimization_level": 0}


def elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def same(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """x [B, T, F], kernel [W, F]; the odd sample of silence after."""
    width = len(kernel)
    padded = np.pad(x, ((0, 0), ((width - 1) // 2, width // 2), (0, 0)))
    return sum(padded[:, w : w + x.shape[1]] * kernel[w] for w in range(width))


def halved(x: np.ndarray) -> np.ndarray:
    return (x[:, ::2] + x[:, 1::2]) / 2


def by_definition(signal: np.ndarray, params: Any, stats: Any) -> np.ndarray:
    """The published layers one by one [B, C, T] → [B, T / 4, D]."""

    def normal(x: np.ndarray, name: str) -> np.ndarray:
        offset, own = stats[name], params[name]
        return (x - offset["mean"]) / np.sqrt(offset["var"] + 1e-3) * own["scale"] + own["bias"]

    def weighed(x: np.ndarray, layers: Any) -> np.ndarray:
        hidden = np.maximum(x.mean(1) @ layers["squeeze"]["kernel"] + layers["squeeze"]["bias"], 0)
        return x / (1 + np.exp(-hidden @ layers["excite"]["kernel"] - layers["excite"]["bias"]))[:, None]

    bank = params["bank"]
    filters = bank["temporal"].shape[1]
    spatial = bank["spatial"] * np.minimum(1, 0.25 / np.linalg.norm(bank["spatial"], axis=0))
    maps = np.stack(
        [same(np.repeat(channel[..., None], filters, -1), bank["temporal"]) for channel in signal.swapaxes(0, 1)], 1
    )
    maps = (maps - stats["bank"]["mean"]) / np.sqrt(stats["bank"]["var"] + 1e-3) * bank["scale"] + bank["bias"]
    x = np.einsum("bctf,cfd->btfd", maps, spatial).reshape(len(signal), signal.shape[-1], -1)
    x = halved(elu(normal(x, "norm1")))
    towers = [
        halved(same(x @ params[f"{name}_narrow"]["kernel"], params[name]["filters"]) @ params[name]["mix"]["kernel"])
        for name in ("long", "longer")
    ]
    towers += [halved(x) @ params["mean"]["kernel"], x[:, ::2] @ params["second"]["kernel"]]
    x = weighed(elu(normal(np.concatenate(towers, -1), "norm2")), params["weigh1"])
    x = same(x, params["last"]["filters"]) @ params["last"]["mix"]["kernel"]
    return weighed(elu(normal(x, "norm3")), params["weigh2"])


def test_it_is_its_definition():
    encoder = zoo.create("adhdeepnet_tiny", channels=3, samples=64, tower_widths=(9, 16, 8))
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(2, 3, 64)).astype(np.float32)
    sensors = jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis=0), blank(3, 64)[1])
    shapes = nn.meta.unbox(jax.eval_shape(encoder.init, jax.random.key(0), signal, sensors))
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.6, leaf.shape), jnp.float32), shapes)
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    out = jax.jit(encoder.apply, compiler_options=QUICK)(variables, signal, sensors)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    expected = by_definition(signal.astype(np.float64), exact["params"], exact["batch_stats"])
    np.testing.assert_allclose(out.tokens, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(out.pooled, expected.mean(1), atol=1e-5 * np.abs(expected).max())


def test_noise_is_added_to_copies():
    signal = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    more, label = with_noise(signal, np.array([0, 1]), (0.1, 0.01), (1.0, 3.0), np.random.default_rng(0))
    assert label.tolist() == [0, 1] * 5
    assert more.dtype == np.float32
    np.testing.assert_array_equal(more[:2], signal)
    spread = [(more[2 * copy : 2 * copy + 2] - signal).std() for copy in range(1, 5)]
    np.testing.assert_allclose(spread, (0.1, 0.3, 0.01, 0.03), rtol=0.4)


def test_a_person_is_voted_for_by_all_windows_wherever_they_are():
    """Anna's last window decides, and her windows are not next to each other."""
    probability = np.array([[0.1, 0.9], [0.8, 0.2], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6], [0.45, 0.55]])
    person = ["anna", "bert", "anna", "bert", "anna", "bert"]
    people, majority = vote(probability, person)
    assert people == ("anna", "bert")
    assert majority.tolist() == [1, 0]
    assert vote(probability, person, by="mean")[1].tolist() == [1, 0]
    assert vote(probability[:-2], person[:-2])[1].tolist() == [0, 0]
    with pytest.raises(ZooError, match="wanted 'majority' or 'mean'"):
        vote(probability, person, by="max")
    with pytest.raises(ZooError, match="6 rows of 5 people"):
        vote(probability, person[:-1])


def test_windows_must_halve_twice():
    encoder = zoo.create("adhdeepnet_base", samples=510)
    with pytest.raises(ZooError, match="wanted a multiple of 4"):
        jax.eval_shape(encoder.init, jax.random.key(0), *encoder.example())
