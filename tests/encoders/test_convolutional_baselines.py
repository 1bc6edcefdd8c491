"""EEGNet, ShallowFBCSPNet, Deep4Net and EEG Conformer: sizes, constraints, refusals. What they compute is compared
with braindecode in tests/parity/test_braindecode_baselines.py."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.encoders.encoder import blank
from zoo.errors import ZooError
from zoo.layers.max_norm import MaxNormHead
from zoo.registry import parameter_count

QUICK = {"xla_backend_optimization_level": 0}


@pytest.mark.parametrize(
    ("name", "whole"), [("shallow_base", 46_084), ("deep4_base", 282_879), ("eeg_conformer_base", 789_572)]
)
def test_parameters_with_a_classifier_of_four_are_those_of_braindecode(name, whole):
    """At the 22 electrodes and 1,000 samples of BCI Competition IV 2a."""
    encoder = zoo.create(name)
    head = jax.eval_shape(encoder.head(4).init, jax.random.key(0), np.zeros((1, encoder.features), np.float32))
    assert parameter_count(encoder) + sum(leaf.size for leaf in jax.tree.leaves(head)) == whole


@pytest.mark.parametrize(("padding", "times"), [("same", 1), ("both", 2)])
def test_even_kernels_keep_the_window_only_where_the_paper_pads(padding, times):
    """Windows of 15 samples and an even kernel: one more makes a second mean of eight."""
    encoder = zoo.create("eegnet_tiny", channels=2, samples=15, width=4, late_width=3, pools=(1, 8), padding=padding)
    out = jax.eval_shape(encoder.init_with_output, jax.random.key(0), *encoder.example())[0]
    assert out.tokens.shape[1] == times


def test_a_class_counts_no_more_than_its_limit():
    head = MaxNormHead(3, 0.25)
    kernel = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    kernel[:, 0] *= 0.01
    x = np.eye(8, dtype=np.float32)
    used = head.apply({"params": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(3)}}, x)
    norms = np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(np.linalg.norm(used, axis=0), np.minimum(norms, 0.25), rtol=1e-5)


def test_power_is_read_as_its_logarithm():
    """Ten times the signal adds ln 100 to every token of a net that does not normalise."""
    encoder = zoo.create("shallow_tiny")
    signal = np.random.default_rng(0).normal(size=(1, 8, 64)).astype(np.float32)
    sensors = blank(8, 64)[1]
    variables = jax.jit(encoder.init, compiler_options=QUICK)(jax.random.key(0), signal, sensors)
    run = jax.jit(encoder.apply, compiler_options=QUICK)
    louder = run(variables, 10 * signal, sensors).tokens - run(variables, signal, sensors).tokens
    np.testing.assert_allclose(louder, np.log(100), atol=1e-3)


def test_the_official_scores_are_smaller_by_the_root_of_heads():
    options = {"channels": 2, "samples": 40, "dim": 8, "heads": 4, "depth": 1}
    official, paper = (zoo.create("eeg_conformer_tiny", **options, scores=scores) for scores in ("model", "head"))
    signal = np.random.default_rng(0).normal(size=(2, 2, 40)).astype(np.float32)
    sensors = jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis=0), blank(2, 40)[1])
    variables = jax.jit(paper.init, compiler_options=QUICK)(jax.random.key(0), signal, sensors)
    variables = nn.meta.unbox(variables)
    blocks = variables["params"]["blocks"]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, blocks["query"])
    louder = {**variables, "params": {**variables["params"], "blocks": {**blocks, "query": doubled}}}
    np.testing.assert_allclose(
        jax.jit(official.apply, compiler_options=QUICK)(louder, signal, sensors).tokens,
        jax.jit(paper.apply, compiler_options=QUICK)(variables, signal, sensors).tokens,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("eegnet_base", {"samples": 20}, "leave nothing of 20 samples"),
        ("eegnet_base", {"padding": "none"}, "EEGNet padding must be one of"),
        ("deep4_base", {"samples": 440}, "leave nothing of 440 samples"),
        ("shallow_base", {"samples": 90}, "leave nothing of 90 samples"),
        ("eeg_conformer_base", {"heads": 7}, "dim divisible by heads"),
        ("eeg_conformer_base", {"scores": "dim"}, "scores of"),
    ],
)
def test_bad_options_are_refused(name, options, says):
    encoder = zoo.create(name, **options)
    with pytest.raises(ZooError, match=says):
        jax.eval_shape(encoder.init, jax.random.key(0), *encoder.example())


def test_a_mask_is_refused():
    encoder = zoo.create("eegnet_tiny")
    with pytest.raises(ZooError, match="EEGNet hides no tokens"):
        jax.eval_shape(lambda: encoder.init(jax.random.key(0), *encoder.example(), mask=np.zeros((1, 8), bool)))
