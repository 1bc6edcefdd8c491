"""What is particular to TFM-Tokenizer: frames, masks, motifs, and that its quantiser's loss is without gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from zoo.errors import ZooError
from zoo.types import Sensors

SMALL = {"dim": 16, "heads": 2, "window": 20, "hop": 10, "bins": 8, "band": 2, "codes": 16, "iterations": 4}
KEYS = {"params": jax.random.key(0), "codes": jax.random.key(1)}
QUICK = {"xla_backend_optimization_level": 0}


def sensors(batch: int, channels: int = 1) -> Sensors:
    blank, zero = np.zeros((batch, channels, 3), np.float32), np.zeros((batch, channels), np.int32)
    return Sensors(blank, blank, zero, zero, np.ones((batch, channels), bool))


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    tokenizer = zoo.create("tfm_tiny", **SMALL, kmeans=0)
    signal = jnp.zeros((2, 1, 60))
    return tokenizer, jax.jit(tokenizer.init, compiler_options=QUICK)(KEYS, signal, sensors(2))


@pytest.mark.parametrize(("samples", "count"), [(200, 1), (1000, 9), (2000, 19)])
def test_five_seconds_are_nine_frames(samples, count):
    assert zoo.create("tfm_base").grid(3, samples) == (3, count)


@pytest.mark.slow
def test_a_motif_has_its_codes_wherever_it_begins(made):
    tokenizer, variables = made
    motif = np.random.default_rng(0).standard_normal(30).astype(np.float32)
    signal = np.zeros((2, 1, 200), np.float32)
    signal[0, 0, 40:70], signal[1, 0, 90:120] = motif, motif
    encode = jax.jit(lambda *given: tokenizer.apply(*given, method="encode"), compiler_options=QUICK)
    here, there = np.asarray(encode(variables, signal, sensors(2))).reshape(2, 19)
    np.testing.assert_array_equal(here[:14], there[5:])
    assert len(set(here[3:7])) > 1


def test_the_two_passes_share_out_the_spectrum():
    tokenizer = zoo.create("tfm_base")
    seen, rest = tokenizer.apply({}, 9, method=lambda model, count: model._masks(count), rngs={"noise": KEYS["codes"]})
    np.testing.assert_array_equal(seen, ~rest)
    # Half of 20 bands of 5 bins and 4 of the 9 frames are out.
    bands = seen.any(0).reshape(20, 5)
    assert bands.all(1).sum() == 10
    assert not bands[~bands.all(1)].any()
    np.testing.assert_array_equal(seen, np.outer(seen.any(1), seen.any(0)))
    assert seen.any(1).sum() == 5


@pytest.mark.parametrize("commitment", [0.0, 0.25])
def test_inputs_are_drawn_to_their_codes_only_where_asked(made, commitment):
    tokenizer = made[0].copy(commitment=commitment)
    signal = np.random.default_rng(1).standard_normal((2, 1, 60)).astype(np.float32)

    def loss(params: Any) -> Any:
        return tokenizer.apply({**made[1], "params": params}, signal, sensors(2)).losses["commitment"]

    pull = jax.jit(jax.grad(loss), compiler_options=QUICK)(made[1]["params"])
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(pull))
    assert (largest > 0) == (commitment > 0)


def test_the_scale_is_the_95th_percentile_and_gives_units_back(made):
    tokenizer, variables = made
    signal = np.random.default_rng(2).standard_normal((2, 3, 60)).astype(np.float32)
    scale = tokenizer.scale(signal, sensors(2, 3))
    np.testing.assert_allclose(scale, np.quantile(np.abs(signal), 0.95, axis=-1), rtol=1e-5)
    call = jax.jit(tokenizer.apply, compiler_options=QUICK)
    a, b = (call(variables, given, sensors(2, 3)) for given in (signal, 64 * signal))
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_allclose(64 * a.reconstruction, b.reconstruction, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_it_learns_waves():
    """Four frequencies at any phase: the spectrum is told better than by its mean, with more than one code each."""
    tokenizer = zoo.create("tfm_tiny", **SMALL | {"codes": 32})
    rng = np.random.default_rng(3)

    def batch() -> np.ndarray:
        wave = rng.integers(1, 5, (32, 1, 1)) * np.arange(60) / 20
        return np.sin(2 * np.pi * (wave + rng.uniform(size=(32, 1, 1)))).astype(np.float32)

    given = sensors(32)
    variables = jax.jit(tokenizer.init)(KEYS, batch(), given)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(variables: Any, state: Any, signal: Any, key: Any) -> Any:
        rest = {name: leaf for name, leaf in variables.items() if name != "params"}

        def loss(params: Any) -> Any:
            rngs = dict(zip(("codes", "dropout", "noise"), jax.random.split(key, 3), strict=True))
            out, new = tokenizer.apply(
                {"params": params, **rest}, signal, given, train=True, mutable=list(rest), rngs=rngs
            )
            return sum(weight * out.losses[name] for name, weight in tokenizer.loss_weights.items()), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, state

    state = optimizer.init(variables["params"])
    for number in range(300):
        variables, state = step(variables, state, batch(), jax.random.key(number))
    signal = batch()
    out = jax.jit(tokenizer.apply)(variables, signal, given)
    frames = np.lib.stride_tricks.sliding_window_view(signal / tokenizer.scale(signal, given)[..., None], 20, -1)
    spectrum = np.abs(np.fft.rfft(frames[..., ::10, :] * np.sin(np.pi * np.arange(20) / 20) ** 2))[..., :8]
    by_mean = float(np.square(spectrum - spectrum.mean((0, 1, 2))).mean())
    assert out.losses["spectrum"] < 0.4 * by_mean
    assert len(np.unique(out.codes)) > 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bins": 90}, "bins a multiple of band²"),
        ({"dim": 60}, "dim 60, heads 8"),
        ({"hop": 90}, "hop that divides the window"),
        ({"masked": 1.0}, "masked: got 1.0"),
        ({"codes": 16, "learning": "slowly"}, "learning: got 'slowly'"),
    ],
)
def test_bad_options_are_refused(options, says):
    tokenizer = zoo.create("tfm_base", **options)
    with pytest.raises(ZooError, match=says):
        jax.eval_shape(tokenizer.init, KEYS, jnp.zeros((1, 1, 200)), sensors(1))
