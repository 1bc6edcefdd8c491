"""CBraMod: its published sizes, what a mask hides, and what the order of channels means."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from electrodes import electrodes

import zoo
from zoo.errors import ZooError
from zoo.registry import parameter_count

QUICK = {"xla_backend_optimization_level": 0}
NAMES = ("FP1", "CZ", "O2")
SMALL = {"channels": NAMES, "depth": 2, "heads": 4, "conv_features": 10, "patch": 40}


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, Any]:
    encoder = zoo.create("cbramod_base", **SMALL)
    signal = np.random.default_rng(0).normal(size=(2, 3, 120)).astype(np.float32)
    init = jax.jit(encoder.init, compiler_options=QUICK)
    return jax.jit(encoder.apply, compiler_options=QUICK), init(jax.random.key(0), signal, electrodes(NAMES)), signal


def test_published_count():
    encoder = zoo.create("cbramod_base")
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), *encoder.example())["params"]
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    # The published count of the embedding has the mask's 200 zeros, which nothing learns, in it.
    assert (count(shapes["embed"]) + 200, count(shapes["layers"])) == (52_600, 4_831_200)
    # With the head of pretraining.
    assert parameter_count(encoder) + 200 * 200 + 200 == 4_923_800


def test_what_is_hidden_is_not_read(made):
    apply, variables, signal = made
    mask = np.zeros((2, 3, 3), bool)
    mask[:, 1, 2] = mask[0, 0, 0] = True
    spoiled = np.where(np.repeat(mask, 40, axis=-1), 1e3, signal).astype(np.float32)
    a, b = (apply(variables, given, electrodes(NAMES), mask=mask) for given in (signal, spoiled))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert np.abs(a.tokens - apply(variables, signal, electrodes(NAMES)).tokens).max() > 1e-3


def test_the_order_of_channels_is_part_of_it(made):
    _, variables, signal = made
    counted = jax.jit(zoo.create("cbramod_base", **{**SMALL, "channels": 3}).apply, compiler_options=QUICK)
    order, unnamed = np.array([2, 0, 1]), electrodes(("", "", ""))
    out, moved = (counted(variables, given, unnamed).tokens for given in (signal, signal[:, order]))
    by_channel = np.asarray(out).reshape(2, 3, -1)
    assert np.abs(np.asarray(moved).reshape(2, 3, -1) - by_channel[:, order]).max() > 1e-3


@pytest.mark.parametrize(("channels", "count"), [(1, 1), (5, 4), (22, 2)])
def test_any_number_of_channels_and_patches(channels: int, count: int):
    encoder = zoo.create("cbramod_base", **{**SMALL, "channels": channels})
    signal, sensors = np.zeros((2, channels, 40 * count), np.float32), electrodes([""] * channels)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), signal, sensors)
    assert jax.eval_shape(encoder.apply, shapes, signal, sensors).tokens.shape == (2, channels * count, 20)


def test_all_patches_side_by_side_for_the_published_classifier(made):
    _, variables, signal = made
    encoder = zoo.create("cbramod_base", **SMALL, patches=3)
    out = jax.eval_shape(encoder.apply, variables, signal, electrodes(NAMES))
    assert out.pooled.shape == (2, encoder.features) == (2, 3 * 3 * 20)
    head = nn.unbox(jax.eval_shape(encoder.head(4).init, jax.random.key(0), out.pooled)["params"])
    assert [head[f"linear_{n}"]["kernel"].shape for n in (1, 2, 3)] == [(180, 60), (60, 20), (20, 4)]
    with pytest.raises(ZooError, match="wants 3 patches of 40 samples, got 80 samples"):
        jax.eval_shape(encoder.apply, variables, signal[..., :80], electrodes(NAMES))


def test_options_that_do_not_fit_are_refused():
    for options in ({"conv_features": 12}, {"heads": 3}, {"remat": "some"}):
        encoder = zoo.create("cbramod_base", **options)
        with pytest.raises(ZooError, match=next(iter(options))):
            jax.eval_shape(encoder.init, jax.random.key(0), *encoder.example())
