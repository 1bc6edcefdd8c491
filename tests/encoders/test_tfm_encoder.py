"""The encoder of TFM's codes: its counts, what it hides, and what it is without a trained tokenizer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes

import zoo
from zoo.errors import ZooError
from zoo.objectives.masked_codes import MaskedCodes

OPTIONS = {"channels": 3}
QUICK = {"xla_backend_optimization_level": 0}
"""Compilation takes longer than these small programs run."""


def test_counts_are_the_published():
    """Classifiers of 6 classes and of 1, and the model that predicts hidden codes by a linear map."""
    encoder = zoo.create("tfm_encoder")
    codes = jnp.zeros((1, 16, 9), jnp.int32)
    params = jax.eval_shape(lambda: encoder.init(jax.random.key(0), codes, method="read"))["params"]
    own = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert [own + 65 * outputs for outputs in (6, 1, 8192)] == [724_998, 724_673, 1_257_088]


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any, Any]:
    encoder = zoo.create("tfm_encoder_tiny", **OPTIONS)
    codes = np.random.default_rng(0).integers(0, 256, (2, 3, 5))
    init = jax.jit(lambda key: encoder.init(key, codes, method="read"), compiler_options=QUICK)
    return encoder, init(jax.random.key(0)), codes


def test_hidden_codes_are_not_read(small):
    encoder, variables, codes = small
    mask = np.zeros((2, 3, 5), bool)
    mask[:, 1, 2:4] = True
    other = np.where(mask, 7, codes)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def read(codes: Any, mask: Any) -> Any:
        return encoder.apply(variables, codes, mask=mask, method="read")

    a, b = (read(given, mask) for given in (codes, other))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    flat = read(codes, mask.reshape(2, -1))
    np.testing.assert_array_equal(a.tokens, flat.tokens)
    assert np.abs(read(codes, np.zeros_like(mask)).tokens - a.tokens).max() > 1e-3
    with pytest.raises(ZooError, match="mask of 15 tokens, or of 3 rows of 5"):
        encoder.apply(variables, codes, mask=mask[:, :2], method="read")


def test_without_a_tokenizer_it_reads_codes_but_no_signal(small):
    encoder, variables, _ = small
    signal, sensors = encoder.example()
    with pytest.raises(ZooError, match="got no variables of its tokenizer"):
        jax.eval_shape(encoder.apply, variables, signal, sensors)


def test_options_that_do_not_fit_are_refused():
    codes = jnp.zeros((1, 17, 2), jnp.int32)
    for options, says in (({"channels": 17}, "1 to 16"), ({"codes": 9}, "for a tokenizer of 256")):
        encoder = zoo.create("tfm_encoder_tiny", **options)
        with pytest.raises(ZooError, match=says):
            jax.eval_shape(lambda encoder=encoder: encoder.init(jax.random.key(0), codes, method="read"))


def test_windows_that_its_tokenizer_cannot_cut_are_refused(small):
    encoder = small[0]
    sensors = electrodes(["FP1", "FP2", "C3"])
    signal = np.zeros((2, 3, 450), np.float32)
    with pytest.raises(ZooError, match="got a window of 450 samples"):
        jax.eval_shape(lambda: encoder.init(jax.random.key(0), signal, sensors))
    with pytest.raises(ZooError, match="at 256 Hz, wanted 200 Hz"):
        encoder.check_recording(256.0, ("eeg",) * 3, ("FP1", "FP2", "C3"))


@pytest.mark.slow
def test_it_pretrains_on_hidden_codes_of_the_tokenizer_in_it():
    """The task's trained tokenizer takes the untrained one's place, and every hidden code costs about ln K at first."""
    tokenizer = zoo.create("mu_law_54")
    signal = np.random.default_rng(0).standard_normal((4, 3, 12)).astype(np.float32)
    batch = {"signal": signal, "sensors": electrodes(["FP1", "FP2", "C3"], batch=4)}
    options = {"channels": 3, "tokenizer": "mu_law_54", "codes": 54, "depth": 1}
    task = MaskedCodes(model="tfm_encoder_tiny", options=options).using(tokenizer, tokenizer.fit(signal))
    variables = jax.jit(lambda key: task.init(key, batch), compiler_options=QUICK)(jax.random.key(0))
    kept = variables["tokenizer"]["encoder"]["levels"]
    np.testing.assert_array_equal(kept["edges"], tokenizer.fit(signal)["levels"]["edges"])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def learn(params: Any) -> Any:
        def loss(params: Any) -> Any:
            return task.loss({**variables, "params": params}, batch, jax.random.key(1), False)[0]

        return jax.value_and_grad(loss)(params)

    value, grads = learn(variables["params"])
    np.testing.assert_allclose(value, 2 * np.log(54), rtol=0.05)
    hiding = np.asarray(grads["encoder"]["embed_code"].unbox())[54]
    assert np.abs(hiding).max() > 0
