"""HiSTN against its definition in float64, and how guesses of a scale are judged."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.encoders.encoder import blank
from zoo.encoders.histn import REGIONS, adjacency, chebyshev
from zoo.errors import ZooError
from zoo.evaluate.votes import neighbours

QUICK = {"xla_backend_optimization_level": 0}
SIZES = (4, 3, 3, 4)


def elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def same(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """x [B, T, C], kernel [W, C]; the odd sample of silence after."""
    width = len(kernel)
    return late(np.pad(x, ((0, 0), ((width - 1) // 2, width // 2), (0, 0))), kernel)


def late(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    times = x.shape[1] - len(kernel) + 1
    return sum(x[:, w : w + times] * kernel[w] for w in range(len(kernel)))


def normal(x: np.ndarray, params: Any, stats: Any) -> np.ndarray:
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-3) * params["scale"] + params["bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def by_definition(signal: np.ndarray, params: Any, stats: Any) -> np.ndarray:
    """Signals of channels, regions and the head [B, T', 19]: the published layers one by one."""
    maps = np.stack([same(signal.swapaxes(1, 2), params["temporal"][:, [f] * 14]) for f in range(8)], -1)
    x = np.einsum("btcf,fc->btc", maps, np.clip(params["mix"], -1, 1))
    x = elu(normal(x, params["norm1"], stats["norm1"]))
    kernel = params["late"] / np.maximum(np.linalg.norm(params["late"], axis=0), 1)
    x = elu(normal(late(x, kernel), params["norm2"], stats["norm2"]))
    x = (x[:, 0:-1:2] + x[:, 1::2]) / 2

    starts = np.cumsum((0, *SIZES))
    parts = [slice(starts[region], starts[region + 1]) for region in range(4)]

    def gathered(x: np.ndarray, name: str, parts: list[slice]) -> np.ndarray:
        out = []
        for group, part in enumerate(parts):
            layer = params[f"{name}{group}"]
            weights = softmax(x[..., part].mean(1) @ layer["kernel"] + layer["bias"])
            out.append((x[..., part] * weights[:, None]).sum(-1))
        return np.stack(out, -1)

    nodes = []
    for region, part in enumerate(parts):
        hops = np.tensordot(params["node_hops"][region], chebyshev(adjacency(REGIONS[region], SIZES[region])), 1)
        depthwise = same(x[..., part] @ hops, params["node_filters"][:, part])
        nodes.append(depthwise @ np.clip(params[f"node_mix{region}"], -1, 1))
    after = elu(normal(np.concatenate(nodes, -1), params["node_norm"], stats["node_norm"]))
    first, second = gathered(x, "before", parts), gathered(after, "after", parts)
    ring = adjacency(((0, 1), (1, 2), (2, 3), (0, 3)), 4)
    regions = first @ np.tensordot(params["region_hops"][0], chebyshev(ring), 1) + second
    whole = [slice(0, 4)]
    head = gathered(first, "head_before", whole) + gathered(second, "head_after", whole)
    return np.concatenate([x + after, regions, head], -1)


def test_it_is_its_definition():
    encoder = zoo.create("histn_base")
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(2, 14, 128)).astype(np.float32)
    sensors = jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis=0), blank(encoder.channels, 128)[1])
    shapes = nn.meta.unbox(jax.eval_shape(encoder.init, jax.random.key(0), signal, sensors))
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.6, leaf.shape), jnp.float32), shapes)
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    out = jax.jit(encoder.apply, compiler_options=QUICK)(variables, signal, sensors)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    expected = by_definition(signal.astype(np.float64), exact["params"], exact["batch_stats"])
    np.testing.assert_allclose(out.tokens, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(out.pooled, expected.mean(1), atol=1e-5 * np.abs(expected).max())


def test_polynomials_of_a_chain_of_three():
    """Its Laplacian's eigenvalues are 0, 1 and 3, so those of the scaled one −1, −1/3 and 1."""
    polynomials = chebyshev(adjacency(((0, 1), (1, 2)), 3))
    np.testing.assert_allclose(np.linalg.eigvalsh(polynomials[1]), [-1, -1 / 3, 1], atol=1e-6)
    np.testing.assert_allclose(polynomials[2], 2 * polynomials[1] @ polynomials[1] - np.eye(3), atol=1e-6)


def test_regions_must_hold_the_channels():
    encoder = zoo.create("histn_base", channels=13)
    with pytest.raises(ZooError, match=r"regions of \(4, 3, 3, 4\) channels hold 14, wanted 13"):
        jax.eval_shape(encoder.init, jax.random.key(0), *encoder.example())


def test_guesses_of_a_scale_keep_its_order():
    """Right and next to it; wrong but next to it; right, the second far away; the right one second."""
    probability = np.array([[0.1, 0.6, 0.3, 0], [0.3, 0.6, 0.1, 0], [0.6, 0.1, 0, 0.3], [0, 0.1, 0.5, 0.4]])
    shares = neighbours(probability, np.array([1, 3, 0, 3]))
    assert shares == (0.75, 0.25, 0.5)
    with pytest.raises(ZooError, match="at least two classes"):
        neighbours(probability[:, :1], np.zeros(4, int))
