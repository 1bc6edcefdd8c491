"""MVCNet: sizes, its four views, and its training of two branches."""

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
from zoo.errors import ZooError
from zoo.objectives.mvcnet import (
    ChannelTransformer,
    MVCNetTask,
    Projector,
    frequency_shift,
    mirror_by_name,
    mirror_by_position,
    mirrored_labels,
    views,
)
from zoo.registry import parameter_count

NAMES = ("FZ", "C3", "C4", "FP1-F7", "FP2-F8")
QUICK = {"xla_backend_optimization_level": 0}
SMALL = {"channels": NAMES, "samples": 40, "maps": 4, "width": 5, "pool": 10}


def size(shapes: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_sizes_are_the_measured_ones():
    """The authors' code at 22 electrodes, 1,000 samples and two classes."""
    encoder = zoo.create("mvcnet_base")
    key = jax.random.key(0)
    head = jax.eval_shape(encoder.head(2).init, key, jnp.zeros((1, 512)))
    assert encoder.features == 512
    assert parameter_count(encoder) + size(head) == 6_722
    channels = jnp.zeros((1, 22, 1000))
    assert size(jax.eval_shape(lambda: ChannelTransformer().init(key, channels, False))) == 8_011_000
    assert size(jax.eval_shape(lambda: Projector(512).init(key, jnp.zeros((1, 22_000))))) == 46_111_232


def test_the_last_of_1001_samples_is_in_no_mean():
    assert zoo.create("mvcnet_base", samples=1001).features == 512


@pytest.mark.parametrize("rate", [250.0, 128.0])
def test_a_tone_is_moved_by_hertz_at_the_true_rate(rate):
    """A tone that fits the window a whole number of times, so that no end cuts it."""
    samples, bin_of_tone = 512, 20
    time = np.arange(samples) / rate
    tone = bin_of_tone * rate / samples
    moved = frequency_shift(np.cos(2 * np.pi * tone * time)[None], 0.1, rate)
    np.testing.assert_allclose(moved[0], np.cos(2 * np.pi * (tone + 0.1) * time), atol=2e-3)


def test_mirroring_twice_changes_nothing():
    order = mirror_by_name(NAMES)
    assert order == (0, 2, 1, 4, 3)
    assert [order[each] for each in order] == list(range(len(NAMES)))
    label = np.array([0, 1, 2, 3, -1])
    once = mirrored_labels(label, (0, 1))
    assert once.tolist() == [1, 0, 2, 3, -1]
    assert mirrored_labels(once, (0, 1)).tolist() == label.tolist()
    assert mirrored_labels(label, None).tolist() == label.tolist()


def test_a_mirror_by_place_is_that_by_name():
    position = np.array([[0, 0.09, 0], [-0.07, 0, 0.05], [0.07, 0.002, 0.05], [-0.05, 0.05, 0], [0.05, 0.05, 0]])
    assert mirror_by_position(position) == mirror_by_name(NAMES)
    with pytest.raises(ZooError, match=r"opposite to channels \[1\]"):
        mirror_by_position(position[:2])
    with pytest.raises(ZooError, match=r"opposite to channels \[0\]"):
        mirror_by_position(np.full((1, 3), np.nan))
    with pytest.raises(ZooError, match=r"C3 \(wants C4\)"):
        mirror_by_name(("FZ", "C3"))


def test_views_are_four():
    signal = np.random.default_rng(0).normal(size=(2, 5, 40)).astype(np.float32)
    shown, labels = views(signal, np.array([0, 1]), rate_hz=250.0, mirror=mirror_by_name(NAMES))
    np.testing.assert_array_equal(shown[0], signal)
    np.testing.assert_array_equal(shown[1], -signal)
    np.testing.assert_array_equal(shown[3][:, [0, 2, 1, 4, 3]], signal)
    assert labels.tolist() == [[0, 1], [0, 1], [0, 1], [1, 0]]


def batch(seed: int, rows: int = 16) -> dict[str, Any]:
    """Left-hand windows have a slow wave over C4 and a fast one over C3, right-hand ones the other way round."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(rows, 5, 40)).astype(np.float32)
    label = rng.integers(0, 2, rows).astype(np.int32)
    phase = rng.uniform(0, 6.28, (rows, 1))
    time = np.arange(40)
    slow, fast = 2 * np.sin(0.5 * time + phase), 2 * np.sin(1.5 * time + phase)
    for channel, left in ((2, slow), (1, fast)):
        right = fast if channel == 2 else slow
        signal[:, channel] += np.where(label[:, None] == 0, left, right)
    return {"signal": signal, "sensors": electrodes(NAMES, rows), "label": label}


def test_the_loss_is_its_terms():
    task = MVCNetTask("mvcnet_tiny", SMALL, rate_hz=100.0)
    given = batch(0, 6)
    given["label"][0] = -1
    variables = nn.meta.unbox(jax.jit(task.init, compiler_options=QUICK)(jax.random.key(0), given))
    loss = jax.jit(lambda *given: task.loss(*given, True), compiler_options=QUICK)
    value, metrics, new = loss(variables, given, jax.random.key(1))
    terms = metrics["cross_entropy"] + 0.1 * metrics["between_views"] + 0.1 * metrics["between_branches"]
    np.testing.assert_allclose(value, terms, rtol=1e-6)
    assert metrics["weight"] == 5
    # Of four views of two classes, by weights of a thousandth: near what knowing nothing gives.
    np.testing.assert_allclose(metrics["cross_entropy"], 4 * np.log(2), atol=2)
    assert metrics["between_views"] > 0
    assert metrics["between_branches"] > 0
    assert not np.array_equal(new["batch_stats"]["encoder"]["norm1"]["mean"], np.zeros(4))
    assert task.flops(given) > 0


@pytest.mark.slow
def test_it_learns_a_side_and_both_branches_move():
    task = MVCNetTask("mvcnet_tiny", {**SMALL, "maps": 16}, rate_hz=100.0)
    variables = nn.meta.unbox(jax.jit(task.init)(jax.random.key(0), batch(0, 64)))
    before = variables["params"]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(variables: Any, state: Any, given: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            value, _, new = task.loss({**variables, "params": params}, given, key, True)
            return value, new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state)
        return {**new, "params": optax.apply_updates(variables["params"], updates)}, state

    state = optimizer.init(variables["params"])
    for index in range(60):
        variables, state = step(variables, state, batch(index + 1, 64), jax.random.key(index))
    _, metrics, _ = jax.jit(lambda *given: task.loss(*given, jax.random.key(0), False))(variables, batch(1000, 128))
    assert metrics["accuracy"] > 0.9
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        moved = np.abs(leaf - dict(jax.tree_util.tree_leaves_with_path(before))[path]).max()
        name = jax.tree_util.keystr(path)
        # A bias of all keys changes no softmax.
        assert moved > 1e-4 or name == "['transformer']['key']['bias']", name
