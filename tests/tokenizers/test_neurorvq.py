"""NeuroRVQ: its residual rule, its scales and levels, its scale, and that it learns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes
from tokenizer_training import brain_like, train

import zoo
from zoo.errors import ZooError
from zoo.layers.quantizers import VectorQuantizer
from zoo.objectives.signal import spectrum
from zoo.tokenizers.neurorvq import UnitStepQuantizer, _targets, _waveform

NAMES = ("CZ", "FP1", "O2")
SMALL = {"patch": 40, "conv_features": 8, "dim": 40, "heads": 2, "codes": 32, "code_dim": 8, "max_patches": 4}


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any, Any]:
    """A small one after 150 steps, and the record of them."""
    tokenizer = zoo.create("neurorvq_tiny", **SMALL)
    batches = brain_like((10, 8, len(NAMES), 80))
    return tokenizer, *train(tokenizer, batches, electrodes(NAMES, 8), 150, 2e-3)


def apply(tokenizer: Any, variables: Any, *arguments: Any, method: str = "__call__") -> Any:
    return jax.jit(lambda variables, *given: tokenizer.apply(variables, *given, method=method))(variables, *arguments)


def rule(x: np.ndarray, books: np.ndarray, unit_residual: bool) -> tuple[list[int], np.ndarray, float, float]:
    """Codes, their sum, mean commitment and mean pull of one vector, step by step."""
    codes, total, commitment, pull = [], np.zeros_like(x), [], []
    residual = x
    for book in books:
        direction = residual / np.linalg.norm(residual)
        residual = direction if unit_residual else residual
        codes.append(int(np.argmax(book @ direction)))
        value = book[codes[-1]]
        residual, total = residual - value, total + value
        commitment.append(np.mean((value - direction) ** 2))
        pull.append(0.4 * np.mean((value - residual) ** 2))
    return codes, total, np.mean(commitment), np.mean(pull)


@pytest.mark.parametrize("unit_residual", [False, True])
def test_the_residual_rule(unit_residual):
    rng = np.random.default_rng(0)
    books = rng.normal(size=(3, 12, 5))
    books /= np.linalg.norm(books, axis=-1, keepdims=True)
    x = rng.normal(size=(20, 5)) * 3
    quantizer = UnitStepQuantizer(
        VectorQuantizer(12, 5, "cosine", commitment=1.0, kmeans=0), 3, unit_residual=unit_residual
    )
    variables = quantizer.init({"params": jax.random.key(0)}, jnp.asarray(x))
    (shelf,) = variables["codebooks"].values()
    variables = {"codebooks": {"book": {**shelf, "embedding": jnp.asarray(books, jnp.float32)}}}
    found = quantizer.apply(variables, jnp.asarray(x, jnp.float32))
    codes, totals, commitments, pulls = zip(*(rule(each, books, unit_residual) for each in x), strict=True)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_allclose(found.quantized, totals, atol=1e-5)
    np.testing.assert_allclose(found.losses["commitment"], np.mean(commitments), rtol=1e-5)
    np.testing.assert_allclose(found.losses["pull"], np.mean(pulls), rtol=1e-5)
    pull = jax.grad(lambda x: quantizer.apply(variables, x).losses["pull"])(jnp.asarray(x, jnp.float32))
    assert np.abs(pull).max() > 1e-4, "it reaches the input"


@pytest.mark.slow
def test_it_learns(trained):
    _, _, record = trained
    for name, bound in (("amplitude", 0.8), ("phase", 0.97), ("waveform", 0.99)):
        first, last = (record[name][part].mean() for part in (slice(10), slice(-10, None)))
        assert last < bound * first, name


@pytest.mark.slow
def test_sine_and_cosine_come_nearer_to_the_circle(trained):
    tokenizer, variables, _ = trained
    signal, sensors = brain_like((2, len(NAMES), 80), seed=5), electrodes(NAMES)
    quantized = apply(tokenizer, variables, signal, sensors).quantized

    def away(variables: Any) -> float:
        run = jax.jit(lambda given: tokenizer.apply(given, quantized, sensors, False, method="_spectra"))
        _, sine, cosine = run(variables)
        return float(np.abs(np.square(sine) + np.square(cosine) - 1).mean())

    untrained = jax.tree.map(lambda leaf: 0.02 * leaf, variables["params"])
    assert away(variables) < away({**variables, "params": untrained})


@pytest.mark.slow
def test_the_four_scales_say_different_things(trained):
    tokenizer, variables, _ = trained
    signal = brain_like((4, len(NAMES), 80), seed=6)
    codes = np.asarray(apply(tokenizer, variables, signal, electrodes(NAMES, 4), method="encode"))
    each = codes.reshape(-1, 4, tokenizer.levels)
    for scale in range(1, 4):
        assert (each[:, scale] != each[:, 0]).mean() > 0.5


@pytest.mark.slow
def test_error_falls_with_levels_at_decode_and_codes_alone_are_standardised(trained):
    tokenizer, variables, _ = trained
    signal, sensors = brain_like((8, len(NAMES), 80), seed=7), electrodes(NAMES, 8)
    codes = apply(tokenizer, variables, signal, sensors, method="encode")
    scale = tokenizer.scale(signal, sensors)

    def error(codes: Any, scale: Any = None) -> float:
        again = apply(tokenizer, variables, codes, sensors, scale, method="decode")
        return float(np.square(np.asarray(again) - signal).mean())

    none, whole = (error(tokenizer.first_levels(codes, levels), scale) for levels in (0, tokenizer.levels))
    assert whole < none
    bare = np.asarray(apply(tokenizer, variables, codes, sensors, method="decode"))
    np.testing.assert_allclose(bare.std((1, 2), ddof=1), 1, rtol=1e-4)
    print(f"square error: {whole:.3f} with all levels, {none:.3f} with none, {error(codes):.3f} by codes alone")


def test_true_spectra_and_the_scale_give_the_signal_back():
    patches = jnp.asarray(brain_like((2, 6, 200), seed=3))
    valid = jnp.array([[True] * 6, [True] * 4 + [False] * 2])
    amplitude, phase, scale = _targets(patches, valid)
    logarithm = np.log1p(spectrum(patches)[0][1, :4])
    np.testing.assert_allclose(scale[1], [logarithm.mean(), logarithm.std(ddof=1)], rtol=1e-5)
    again = _waveform(amplitude, jnp.sin(phase), jnp.cos(phase), scale)
    np.testing.assert_allclose(again[valid], patches[valid], atol=1e-4)


def test_electrodes_the_table_lacks_are_refused():
    tokenizer = zoo.create("neurorvq_base")
    tokenizer.check_recording(200.0, ("eeg", "eeg"), ("CZ", "CCP8"))
    with pytest.raises(ZooError, match="NeuroRVQ has no electrode 'M1'"):
        tokenizer.check_recording(200.0, ("eeg",), ("M1",))
    tokenizer.check_recording(200.0, ("eeg",), ("O9",))
    with pytest.raises(ZooError, match="NeuroRVQ has no electrode 'O9'"):
        zoo.create("neurorvq_base", electrodes=105).check_recording(200.0, ("eeg",), ("O9",))
    few = zoo.create("neurorvq_tiny", electrodes=60)
    with pytest.raises(ZooError, match="electrodes: got 60, wanted at least 104"):
        jax.eval_shape(few.init, jax.random.key(0), *few.example())
