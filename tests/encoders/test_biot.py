"""BIOT: its published sizes, and what its words know of their channels."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from electrodes import electrodes

import zoo
from zoo.encoders.biot import BIPOLAR
from zoo.errors import ZooError
from zoo.registry import parameter_count

SMALL = {"window": 40, "hop": 20, "dim": 16, "heads": 2, "depth": 2}
QUICK = {"xla_backend_optimization_level": 0}
NAMES = ("FP1-F7", "C3-P3", "O2", "CZ")


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, Any]:
    encoder = zoo.create("biot_base", **SMALL, channels=NAMES)
    signal = np.random.default_rng(0).normal(size=(2, 4, 130)).astype(np.float32)
    variables = jax.jit(encoder.init, compiler_options=QUICK)(jax.random.key(0), signal, electrodes(NAMES))
    return jax.jit(encoder.apply, compiler_options=QUICK), variables, signal


@pytest.mark.parametrize(("name", "classes", "total"), [("biot_base", 6, 3_187_718), ("biot_base_18", 6, 3_188_230)])
def test_published_count_with_a_classifier(name: str, classes: int, total: int) -> None:
    encoder = zoo.create(name)
    head = jax.eval_shape(encoder.head(classes).init, jax.random.key(0), np.zeros((1, 256), np.float32))
    assert parameter_count(encoder) + sum(leaf.size for leaf in jax.tree.leaves(head)) == total


def test_a_word_is_half_a_second_of_a_channel(made):
    apply, variables, signal = made
    out = apply(variables, signal, electrodes(NAMES))
    # (130 − 40) // 20 + 1 frames of four channels; and no unit matters.
    assert out.tokens.shape == (2, 4 * 5, 16)
    np.testing.assert_allclose(apply(variables, 1e6 * signal, electrodes(NAMES)).pooled, out.pooled, atol=1e-4)


def test_the_name_chooses_the_row(made):
    apply, variables, signal = made
    out = apply(variables, signal, electrodes(NAMES))
    moved = apply(variables, signal[:, ::-1], electrodes(NAMES[::-1]))
    np.testing.assert_allclose(moved.pooled, out.pooled, atol=1e-5)
    assert np.abs(apply(variables, signal[:, ::-1], electrodes(NAMES)).pooled - out.pooled).max() > 1e-3


def test_a_word_hidden_is_a_word_less(made):
    apply, variables, signal = made
    mask = np.zeros((2, 4, 5), bool)
    mask[:, 1] = True
    hidden = apply(variables, signal, electrodes(NAMES), mask=mask)
    fewer = apply(variables, signal[:, [0, 2, 3]], electrodes([NAMES[each] for each in (0, 2, 3)]))
    np.testing.assert_allclose(hidden.pooled, fewer.pooled, atol=1e-5)
    assert (hidden.valid == ~mask.reshape(2, -1)).all()


def test_a_channel_without_a_row_is_refused_and_cannot_pass_for_another(made):
    encoder = zoo.create("biot_base")
    with pytest.raises(ZooError, match=r"BIOT has no row for channel 'FZ', only for FP1-F7, F7-T7.*option `channels`"):
        encoder.check_recording(200.0, ("eeg",) * 2, ("FP1-F7", "FZ"))
    encoder.check_recording(200.0, ("eeg",) * 16, BIPOLAR)
    apply, variables, signal = made
    assert np.isnan(apply(variables, signal, electrodes((*NAMES[:3], "FZ"))).pooled).all()


def test_without_names_the_place_chooses_the_row(made):
    _, variables, signal = made
    encoder = zoo.create("biot_base", **SMALL, channels=4)
    apply = jax.jit(encoder.apply, compiler_options=QUICK)
    by_name = made[0](variables, signal, electrodes(NAMES))
    np.testing.assert_allclose(apply(variables, signal, electrodes([""] * 4)).pooled, by_name.pooled, atol=1e-6)
    with pytest.raises(ZooError, match="got 2 channels, wanted 4"):
        encoder.check_recording(40.0, ("eeg",) * 2, ("", ""))


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ZooError, match="a hop that divides the window"):
        zoo.create("biot_base", hop=30).init(jax.random.key(0), *zoo.create("biot_base").example())
