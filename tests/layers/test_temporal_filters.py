"""Filters as matrix products against their definitions in float64."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.layers.temporal_filters import FilterBank, TemporalSpatial, average_pool, filtered, max_pool, moments

RNG = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def filtered_by_definition(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """x [B, S, F], kernel [W, F]."""
    times = x.shape[1] - len(kernel) + 1
    return sum(x[:, w : w + times].astype(np.float64) * kernel[w] for w in range(len(kernel)))


@pytest.mark.parametrize(("samples", "width"), [(50, 1), (96, 33), (40, 40)])
def test_every_feature_has_a_filter_of_its_own(samples, width):
    x, kernel = draw(2, samples, 3), draw(width, 3)
    expected = filtered_by_definition(x, kernel)
    np.testing.assert_allclose(
        filtered(jnp.asarray(x), jnp.asarray(kernel)), expected, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize(("samples", "width"), [(50, 4), (100, 37)])
def test_moments_are_those_of_the_filtered_channels(samples, width):
    """Also where the signal is not centred."""
    signal, kernel = draw(3, 4, samples) + 0.5, draw(width, 5)
    each = np.stack([filtered_by_definition(np.repeat(row.T[None, :, :1], 5, -1), kernel) for row in rows(signal)])
    mean, variance = moments(jnp.asarray(signal), jnp.asarray(kernel))
    np.testing.assert_allclose(mean, each.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(variance, each.var((0, 1, 2)), rtol=1e-5)


def rows(signal: np.ndarray) -> np.ndarray:
    """[B, C, S] → [B · C, 1, S]."""
    return signal.reshape(-1, 1, signal.shape[-1])


@pytest.mark.parametrize("train", [False, True])
def test_a_filter_bank_is_filters_then_normalisation_then_sums(train):
    bank = FilterBank(filters=3, width=6, depth=2, paddings=(3, 3), max_norm=0.5, epsilon=1e-3, momentum=0.99)
    signal = draw(2, 4, 20) + 1
    shapes = jax.eval_shape(lambda: bank.init(jax.random.key(0), jnp.asarray(signal), False))
    variables = jax.tree.map(lambda leaf: jnp.asarray(np.abs(draw(*leaf.shape)) + 0.1), nn.meta.unbox(shapes))
    params, stats = jax.tree.map(np.float64, (variables["params"], variables["batch_stats"]))
    out, new = bank.apply(variables, jnp.asarray(signal), train, mutable=["batch_stats"])

    padded = np.pad(signal, ((0, 0), (0, 0), (3, 3)))
    maps = np.stack(
        [filtered_by_definition(np.repeat(padded[:, c, :, None], 3, -1), params["temporal"]) for c in range(4)], 1
    )
    mean, variance = (maps.mean((0, 1, 2)), maps.var((0, 1, 2))) if train else (stats["mean"], stats["var"])
    normal = (maps - mean) / np.sqrt(variance + 1e-3) * params["scale"] + params["bias"]
    spatial = params["spatial"]
    spatial = spatial * np.minimum(1, 0.5 / np.linalg.norm(spatial, axis=0))
    expected = np.einsum("bctf,cfd->btfd", normal, spatial).reshape(2, -1, 6)
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
    kept = 0.99 * stats["var"] + 0.01 * variance if train else stats["var"]
    np.testing.assert_allclose(new["batch_stats"]["var"], kept, rtol=1e-5)


def test_filters_then_sums_over_channels_are_one_convolution():
    module = TemporalSpatial(filters=3, width=5, features=2, spatial_bias=True)
    signal = draw(2, 4, 12)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.asarray(signal)))
    variables = jax.tree.map(lambda leaf: jnp.asarray(draw(*leaf.shape)), nn.meta.unbox(shapes))
    params = jax.tree.map(np.float64, variables["params"])
    maps = np.stack(
        [filtered_by_definition(np.repeat(signal[:, c, :, None], 3, -1), params["temporal"]) for c in range(4)], 1
    )
    expected = np.einsum("bcti,cio->bto", maps + params["temporal_bias"], params["spatial"]) + params["spatial_bias"]
    np.testing.assert_allclose(
        module.apply(variables, jnp.asarray(signal)), expected, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize(("size", "stride"), [(4, 4), (6, 2), (7, 3)])
def test_pools(size, stride):
    x = draw(2, 23, 3)
    cut = np.stack([x[:, start : start + size] for start in range(0, 23 - size + 1, stride)], 1)
    np.testing.assert_allclose(average_pool(jnp.asarray(x), size, stride), cut.mean(2), atol=1e-6)
    if size == stride:
        np.testing.assert_array_equal(max_pool(jnp.asarray(x), size), cut.max(2))
