"""EEGPT: its published sizes, what a patch of time knows, and what a mask leaves."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from electrodes import electrodes

import zoo
from zoo.encoders.eegpt import CHANNELS, PRETRAINED
from zoo.errors import ZooError

QUICK = {"xla_backend_optimization_level": 0}
NAMES = ("CZ", "FP1", "O2", "PO5", "AF8")
SMALL = {"dim": 16, "heads": 2, "depth": 2, "patch": 16, "stride": 16}


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, Any]:
    encoder = zoo.create("eegpt_tiny", **SMALL)
    signal = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
    init = jax.jit(encoder.init, compiler_options=QUICK)
    variables = nn.unbox(init(jax.random.key(0), signal, electrodes(NAMES)))
    # Their first spread is so small that nothing would depend on much.
    variables = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim > 1 else leaf, variables)
    return jax.jit(encoder.apply, compiler_options=QUICK), variables, signal


def test_the_table_is_the_published_one():
    assert (len(CHANNELS), len(PRETRAINED)) == (62, 58)
    assert (CHANNELS[0], CHANNELS[29], CHANNELS[-1]) == ("FP1", "CZ", "O2")


def test_a_patch_of_time_knows_no_other(made):
    apply, variables, signal = made
    changed = signal.copy()
    changed[:, 2, 16:32] += 3
    a, b = (np.asarray(apply(variables, given, electrodes(NAMES)).tokens) for given in (signal, changed))
    moved = np.abs(a - b).reshape(2, 4, 4, 16).max((0, 2, 3))
    assert moved[1] > 1e-2
    assert moved[[0, 2, 3]].max() == 0


def test_what_is_hidden_is_as_if_never_recorded(made):
    apply, variables, signal = made
    mask = np.zeros((2, 5, 4), bool)
    mask[:, [1, 3]] = True
    hidden = apply(variables, signal, electrodes(NAMES), mask=mask)
    fewer = apply(variables, signal[:, [0, 2, 4]], electrodes(("CZ", "O2", "AF8")))
    np.testing.assert_allclose(hidden.tokens, fewer.tokens, atol=1e-5)
    mask[0, :, 2] = True
    valid = apply(variables, signal, electrodes(NAMES), mask=mask).valid.reshape(2, 4, 4)
    assert not valid[0, 2].any()
    assert valid[1].all()


def test_reading_only_what_is_visible_changes_nothing(made):
    apply, variables, signal = made
    mask = np.argsort(np.random.default_rng(1).random((2, 5, 4)), axis=1) >= 2
    whole = apply(variables, signal, electrodes(NAMES), mask=mask)
    short = zoo.create("eegpt_tiny", **SMALL, visible=2)
    some = jax.jit(short.apply, compiler_options=QUICK)(variables, signal, electrodes(NAMES), mask=mask)
    np.testing.assert_allclose(some.tokens, whole.tokens, atol=1e-5)


def test_an_electrode_without_a_row_is_refused_and_cannot_pass_for_another(made):
    apply, variables, signal = made
    with pytest.raises(ZooError, match="EEGPT has no electrode 'T3'"):
        zoo.create("eegpt_large").check_recording(256.0, ("eeg",) * 2, ("CZ", "T3"))
    assert np.isnan(apply(variables, signal, electrodes((*NAMES[:4], "T3"))).pooled).all()


def test_the_published_probe():
    encoder = zoo.create("eegpt_large")
    assert encoder.features == 16 * 2048
    head = encoder.head(4)
    shapes = jax.eval_shape(head.init, jax.random.key(0), np.zeros((1, encoder.features), np.float32))
    sizes = {name: leaf["kernel"].shape for name, leaf in nn.unbox(shapes)["params"].items()}
    assert sizes == {"patch": (2048, 16), "window": (256, 4)}
    with pytest.raises(ZooError, match="wants 16 patches of 64 samples, got 512 samples"):
        jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, 1, 512), np.float32), encoder.example()[1])
    with pytest.raises(ZooError, match="a stride that divides"):
        zoo.create("eegpt_large", stride=48).flops(1, 1024)
