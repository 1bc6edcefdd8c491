"""REVE: electrodes by place, in any order and number."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from electrodes import electrodes

import zoo
from zoo.errors import ZooError

QUICK = {"xla_backend_optimization_level": 0}
SMALL = {"dim": 16, "heads": 1, "depth": 1, "patch": 40, "hop": 30}
NAMES = ("CZ", "FP1", "O2", "")


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, Any]:
    encoder = zoo.create("reve_mini", **SMALL)
    signal = np.random.default_rng(0).normal(size=(2, 4, 100)).astype(np.float32)
    init = jax.jit(encoder.init, compiler_options=QUICK)
    variables = nn.unbox(init(jax.random.key(0), signal, electrodes(NAMES)))
    # Its first spread is so small that nothing would depend on much.
    variables = jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, variables)
    return jax.jit(encoder.apply, compiler_options=QUICK), variables, signal


def test_the_place_tells_an_electrode_not_its_name_or_order(made):
    apply, variables, signal = made
    sensors = electrodes(NAMES)
    out = apply(variables, signal, sensors)
    assert out.tokens.shape == (2, 4 * 3, 16)
    renamed = sensors.replace(name=np.full((2, 4), -1, np.int32))
    np.testing.assert_array_equal(apply(variables, signal, renamed).tokens, out.tokens)
    moved = apply(variables, signal[:, ::-1], jax.tree.map(lambda leaf: leaf[:, ::-1], sensors))
    np.testing.assert_allclose(moved.pooled, out.pooled, rtol=1e-4, atol=1e-3)
    assert np.abs(apply(variables, signal[:, ::-1], sensors).pooled - out.pooled).max() > 1e-3


def test_places_near_each_other_are_told_alike(made):
    apply, variables, signal = made
    sensors = electrodes(NAMES)

    def change(metres: float) -> float:
        there = sensors.replace(position=sensors.position + np.float32(metres))
        return float(np.abs(apply(variables, signal, there).tokens - apply(variables, signal, sensors).tokens).max())

    assert 0 < change(1e-4) < 0.05 * change(3e-2)


def test_what_is_hidden_is_as_if_never_recorded(made):
    apply, variables, signal = made
    sensors = electrodes(NAMES)
    mask = np.zeros((2, 4, 3), bool)
    mask[:, 1] = True
    fewer = apply(variables, signal[:, [0, 2, 3]], jax.tree.map(lambda leaf: leaf[:, [0, 2, 3]], sensors))
    np.testing.assert_allclose(apply(variables, signal, sensors, mask=mask).pooled, fewer.pooled, rtol=1e-4, atol=1e-3)


def test_what_it_cannot_take_is_refused(made):
    encoder, sensors = zoo.create("reve_mini"), electrodes(NAMES)
    encoder.check_positions(sensors)
    sensors.position[:, 2] = np.nan
    with pytest.raises(ZooError, match="REVE wants positions: got 1 channels of unknown place"):
        encoder.check_positions(sensors)
    apply, variables, signal = made
    assert np.isnan(apply(variables, signal, sensors).pooled).all()
    with pytest.raises(ZooError, match="at most 2 · frequencies⁴"):
        zoo.create("reve_base", dim=1024).flops(1, 200)
