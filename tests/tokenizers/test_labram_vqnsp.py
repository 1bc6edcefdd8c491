"""VQ-NSP: its scale, what it refuses, and that it learns. Parity with the official code: tests/parity."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes
from quick import compiled
from tokenizer_training import brain_like, train

import zoo
from zoo.errors import ZooError
from zoo.objectives.signal import spectrum
from zoo.tokenizers.labram_vqnsp import _signal, _standardised_spectra

NAMES = ("CZ", "FP1", "O2")
SMALL = {"patch": 40, "conv_features": 8, "dim": 40, "heads": 2, "mlp_ratio": 2, "codes": 32, "code_dim": 8}


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any, Any]:
    """A small one after 200 steps, and the record of them."""
    tokenizer = zoo.create("labram_vqnsp_tiny", **SMALL)
    batches = brain_like((10, 8, len(NAMES), 160))
    return tokenizer, *train(tokenizer, batches, electrodes(NAMES, 8), 200, 1e-3)


def apply(tokenizer: Any, variables: Any, *arguments: Any, method: str = "__call__") -> Any:
    return jax.jit(lambda variables, *given: tokenizer.apply(variables, *given, method=method))(variables, *arguments)


@pytest.mark.slow
def test_it_learns_amplitudes(trained):
    _, _, record = trained
    first, last = (record["amplitude"][part].mean() for part in (slice(10), slice(-10, None)))
    assert last < 0.8 * first
    # A constant prediction leaves 1.
    assert last < 0.8


@pytest.mark.slow
def test_codes_are_directions_and_what_is_decoded_are_codes(trained):
    tokenizer, variables, _ = trained
    codebook = np.asarray(variables["codebooks"]["quantizer"]["embedding"])
    np.testing.assert_allclose(np.linalg.norm(codebook, axis=-1), 1, rtol=1e-5)
    out = apply(tokenizer, variables, brain_like((2, len(NAMES), 80), seed=9), electrodes(NAMES))
    np.testing.assert_allclose(out.quantized, codebook[out.codes[..., 0]], atol=1e-6)
    live = len(np.unique(apply(tokenizer, variables, brain_like((8, 3, 160)), electrodes(NAMES, 8)).codes))
    assert live > 4


def test_true_spectra_and_the_scale_give_the_signal_back():
    patches = jnp.asarray(brain_like((2, 6, 40), seed=3))
    valid = jnp.array([[True] * 6, [True] * 4 + [False] * 2])
    spectra, scale = _standardised_spectra(patches, valid)
    amplitude, phase = (np.asarray(part) for part in spectrum(patches))
    for row in range(2):
        parts = amplitude[row][valid[row]], phase[row][valid[row]]
        expected = [number for part in parts for number in (part.mean(), part.std(ddof=1))]
        np.testing.assert_allclose(scale[row], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(_signal(spectra, valid, scale), np.where(valid[..., None], patches, 0), atol=1e-4)


@pytest.mark.slow
def test_without_the_scale_the_signal_is_standardised(trained):
    tokenizer, variables, _ = trained
    signal, sensors = brain_like((2, len(NAMES), 80), seed=4), electrodes(NAMES)
    scale = tokenizer.scale(signal, sensors)
    codes = apply(tokenizer, variables, signal, sensors, method="encode")
    bare = np.asarray(apply(tokenizer, variables, codes, sensors, method="decode"))
    np.testing.assert_allclose(bare.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(bare.std((1, 2), ddof=1), 1, rtol=1e-4)
    once, twice = (
        np.asarray(apply(tokenizer, variables, codes, sensors, scale * np.array(factor), method="decode"))
        for factor in ([1, 1, 1, 1], [2, 2, 1, 1])
    )
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-4, atol=1e-5)


def test_a_channel_the_table_does_not_know_gives_no_codes():
    tokenizer = zoo.create("labram_vqnsp_tiny", **SMALL)
    signal, sensors = brain_like((2, 3, 80)), electrodes((*NAMES[:2], ""))
    keys = {name: jax.random.key(0) for name in ("params", "codes", "noise")}
    out = compiled(lambda: tokenizer.init_with_output(keys, signal, sensors)[0])()
    assert (np.asarray(out.codes) == -1).all()
    assert np.isnan(out.losses["amplitude"])
    with pytest.raises(ZooError, match="no electrode 'XYZ'"):
        tokenizer.check_recording(200.0, ("eeg", "eeg"), ("CZ", "XYZ"))


def test_bad_options_are_refused():
    tokenizer = zoo.create("labram_vqnsp_tiny", dim=96)
    with pytest.raises(ZooError, match="got dim 96, patch 200, conv_features 4"):
        jax.eval_shape(tokenizer.init, jax.random.key(0), *tokenizer.example())


@pytest.mark.slow
def test_gradients_do_not_burst_in_ten_thousand_steps():
    """Users of the official code report a burst near step 6,000 (its issue 65), without clipping and at rate 5e-5."""
    tokenizer = zoo.create("labram_vqnsp_tiny", **SMALL)
    batches = brain_like((500, 4, len(NAMES), 80))
    _, record = train(tokenizer, batches, electrodes(NAMES, 4), 10_000, 1e-3)
    norm, loss = record["norm"], record["loss"]
    usual = np.median(norm[1000:])
    print(f"norm {usual:.3g}, at most {norm[1000:].max():.3g}; loss {loss[:100].mean():.3g} → {loss[-100:].mean():.3g}")
    assert np.isfinite(norm).all()
    assert norm[1000:].max() < 20 * usual
    assert loss[-1000:].mean() < loss[1000:2000].mean()
