"""Geometric learning: curvature of known graphs, the flow, nodes named by a graph network, and the denoiser."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from electrodes import electrodes
from loop import trained
from quick import compiled, init, run
from scipy import stats

from zoo.encoders.geometric import (
    GraphConvolutions,
    affinity,
    eigenmap,
    log_power,
    neighbour_lengths,
    ollivier_curvature,
    propagation,
    ricci_flow,
    transport_cost,
)
from zoo.errors import ZooError
from zoo.objectives.geometric import Denoise, artefacts, mixture
from zoo.train.config import Optimizer


def graph(count: int, edges: list[tuple[int, int]]) -> np.ndarray:
    lengths = np.zeros((count, count))
    for x, y in edges:
        lengths[x, y] = lengths[y, x] = 1.0
    return lengths


COMPLETE = graph(5, [(x, y) for x in range(5) for y in range(x)])
TREE = graph(6, [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5)])
CLUSTERS = graph(
    8, [(x, y) for x in range(4) for y in range(x)] + [(x, y) for x in range(4, 8) for y in range(4, x)] + [(0, 4)]
)


def test_curvature_of_graphs_where_it_is_known() -> None:
    """1 − |½ − ½/(n − 1)| in a complete graph of n; ½(2/3 + 2/3 − 2) on a tree's edge between nodes of three edges;
    0 in a long ring."""
    np.testing.assert_allclose(ollivier_curvature(COMPLETE)[COMPLETE > 0], 0.625, atol=1e-9)
    np.testing.assert_allclose(ollivier_curvature(TREE)[0, 1], -1 / 3, atol=1e-9)
    ring = graph(7, [(x, (x + 1) % 7) for x in range(7)])
    np.testing.assert_allclose(ollivier_curvature(ring), 0, atol=1e-9)
    assert ollivier_curvature(CLUSTERS)[0, 4] < 0 < ollivier_curvature(CLUSTERS)[1, 2]


def test_the_flow_stretches_a_bridge_and_keeps_the_total() -> None:
    after = ricci_flow(CLUSTERS, iterations=5)
    assert after[0, 4] > 1.5
    assert after[1, 2] < 1
    np.testing.assert_allclose(after.sum(), CLUSTERS.sum())
    np.testing.assert_array_equal(after, after.T)
    np.testing.assert_array_equal(after > 0, CLUSTERS > 0)


def test_transport_is_exact_where_it_is_known() -> None:
    rng = np.random.default_rng(0)
    places, ours, theirs = rng.normal(size=6), rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    cost = transport_cost(ours, theirs, np.abs(places[:, None] - places))
    np.testing.assert_allclose(cost, stats.wasserstein_distance(places, places, ours, theirs), rtol=1e-9)


def test_an_eigenmap_tells_clusters_by_its_first_vector() -> None:
    vectors = eigenmap(affinity(CLUSTERS), 3)
    assert len(set(np.sign(vectors[:4, 0]))) == len(set(np.sign(vectors[4:, 0]))) == 1
    assert np.sign(vectors[0, 0]) != np.sign(vectors[4, 0])
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-9)
    with pytest.raises(ZooError, match="into 16 features wants more nodes than that, got 8"):
        eigenmap(CLUSTERS)


def test_neighbours_are_the_nearest_of_either() -> None:
    lengths = neighbour_lengths(np.array([[0.0], [1.0], [3.0], [10.0]]), 1)
    np.testing.assert_array_equal(lengths > 0, graph(4, [(0, 1), (1, 2), (2, 3)]) > 0)
    np.testing.assert_allclose(lengths[2, 3], 7)
    with pytest.raises(ZooError, match="10 neighbours wants more nodes than that, got 4"):
        neighbour_lengths(np.zeros((4, 1)))


def test_propagation_and_the_network_are_what_they_are_written_as() -> None:
    matrix = propagation(CLUSTERS)
    assert np.linalg.eigvalsh(matrix)[-1] <= 1 + 1e-9
    network, nodes = GraphConvolutions(2, hidden=5), np.eye(8, dtype=np.float32)
    variables = init(network, nodes, matrix.astype(np.float32))
    params = jax.tree.map(np.asarray, variables["params"])
    found = run(network, variables, nodes, matrix.astype(np.float32))
    hidden = np.maximum(matrix @ (nodes @ params["hidden"]["kernel"] + params["hidden"]["bias"]), 0)
    wanted = matrix @ (hidden @ params["logits"]["kernel"] + params["logits"]["bias"])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_mixtures_have_the_ratio_they_are_asked_for() -> None:
    clean = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 128)), jnp.float32)
    noise = compiled(lambda key: artefacts(key, (2, 3, 128), 128.0))(jax.random.key(1))
    mixed = compiled(mixture)
    noisy = mixed(clean, noise, jnp.full((2, 3), 2.0))
    ratio = 10 * np.log10(np.square(clean).sum(-1) / np.square(np.asarray(noisy - clean)).sum(-1))
    np.testing.assert_allclose(ratio, 2.0, atol=1e-3)
    power = np.square(np.abs(np.fft.rfft(np.asarray(noise))))
    slow = power[..., 1:6].sum(-1) / power.sum(-1)
    assert np.all((slow > 0.999) | (slow < 0.001))
    np.testing.assert_array_equal(mixed(clean, jnp.zeros_like(clean), jnp.zeros((2, 3))), clean)


def batch(seed: int = 0, size: int = 32) -> dict[str, Any]:
    """Alpha and beta waves of any phase, amplitude and frequency: between the bands of eyes and of muscles."""
    rng = np.random.default_rng(seed)
    time = np.arange(128) / 128
    one = (size, 2, 1)
    waves = [
        rng.uniform(0.5, 2, one) * np.sin(2 * np.pi * (rng.uniform(*band, one) * time + rng.uniform(size=one)))
        for band in ((7, 12), (13, 18))
    ]
    return {"signal": np.sum(waves, 0).astype(np.float32), "sensors": electrodes(("CZ", "PZ"), size)}


@pytest.mark.slow
def test_the_denoiser_gives_clean_waves_back() -> None:
    task = Denoise("geometric_tiny", {"dim": 32, "hidden": 64})
    variables, _ = trained(task, batch, Optimizer(learning_rate=3e-3, warmup_steps=10), 400)
    _, metrics, _ = compiled(lambda given: task.loss(variables, given, jax.random.key(0), False))(batch(999))
    assert metrics["correlation"] > 0.95 > 0.85 > metrics["correlation_before"]
    given = batch(5)
    shifted = 100 + 50 * given["signal"]
    clean = compiled(lambda signal: task.denoise(variables, signal, given["sensors"]))(shifted)
    assert np.corrcoef(np.ravel(clean), np.ravel(shifted))[0, 1] > 0.9


@pytest.mark.slow
def test_windows_are_named_by_the_graph_of_their_spectra() -> None:
    rng = np.random.default_rng(0)
    label = np.arange(80) % 2
    turns = np.where(label, 20, 10)[:, None, None] * np.arange(128) / 128 + rng.uniform(size=(80, 2, 1))
    windows = np.sin(2 * np.pi * turns) + rng.normal(size=(80, 2, 128))
    lengths = neighbour_lengths(log_power(windows), 6)
    nodes, matrix = eigenmap(affinity(lengths), 8), propagation(affinity(ricci_flow(lengths, iterations=2)))
    nodes, matrix = (jnp.asarray(each, jnp.float32) for each in (nodes * len(nodes) ** 0.5, matrix))
    network, known = GraphConvolutions(2), rng.random(80) < 0.3
    variables, rule = init(network, nodes, matrix), optax.adam(1e-2)

    @compiled
    def step(variables: Any, state: Any, key: Any) -> Any:
        def loss(variables: Any) -> Any:
            logits = network.apply(variables, nodes, matrix, train=True, rngs={"dropout": key})
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label), where=jnp.asarray(known))

        updates, state = rule.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    state = rule.init(variables)
    for turn in range(150):
        variables, state = step(variables, state, jax.random.key(turn))
    named = np.argmax(network.apply(variables, nodes, matrix), -1)
    assert np.mean((named == label)[~known]) > 0.9
