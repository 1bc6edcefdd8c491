"""What is particular to Du-IN: stretches of 100 ms, subjects, fewer than 16 channels, patches convolved alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from zoo.errors import ZooError
from zoo.registry import parameter_count
from zoo.types import Sensors

SMALL = {"conv_width": 8, "filters": 4, "heads": 2, "head_width": 8, "codes": 16, "code_dim": 8, "channels": 4}
KEYS = {"params": jax.random.key(0), "codes": jax.random.key(1)}
QUICK = {"xla_backend_optimization_level": 0}


def sensors(batch: int, channels: int, valid: Any = True) -> Sensors:
    blank, kind = np.zeros((batch, channels, 3), np.float32), np.full((batch, channels), 5, np.int32)
    return Sensors(blank, blank, kind, kind * 0 - 1, np.broadcast_to(np.asarray(valid), (batch, channels)))


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    """Three people, codes drawn, and what every channel of every person's is shifted by."""
    tokenizer = zoo.create("du_in_tiny", **SMALL, subjects=3, kmeans=0)
    variables = jax.jit(tokenizer.init, compiler_options=QUICK)(KEYS, jnp.zeros((2, 3, 20)), sensors(2, 3))
    rng = np.random.default_rng(0)
    # Larger than at the start, so that a person's matrices show in the codes.
    bigger = {
        name: jax.tree.map(
            lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), variables["params"][name]
        )
        for name in ("subject_in", "subject_out")
    }
    return tokenizer, {**variables, "params": {**variables["params"], **bigger}}


def call(tokenizer: Any, variables: Any, *given: Any, **options: Any) -> Any:
    return jax.jit(lambda *given: tokenizer.apply(*given, **options), compiler_options=QUICK)(variables, *given)


@pytest.mark.parametrize(("subjects", "parameters"), [(10, 5_806_480), (12, 5_807_568)])
def test_the_published_count_is_that_of_ten_people(subjects, parameters):
    assert parameter_count(zoo.create("du_in_base", subjects=subjects)) == parameters


def test_four_seconds_are_forty_tokens():
    assert zoo.create("du_in_base").grid(16, 4000) == (1, 40)
    with pytest.raises(ZooError, match="got 17 channels, wanted 16 or fewer"):
        zoo.create("du_in_base").grid(17, 4000)


@pytest.mark.slow
def test_everyone_has_matrices_of_their_own(made):
    tokenizer, variables = made
    signal = np.random.default_rng(1).standard_normal((1, 3, 40)).astype(np.float32).repeat(3, axis=0)
    given = sensors(3, 3)
    mixed = call(tokenizer, variables, signal, given, subject=np.array([0, 1, 2]))
    second = call(tokenizer, variables, signal, given, subject=np.array([1, 1, 1]))
    nobody = call(tokenizer, variables, signal, given)
    np.testing.assert_allclose(mixed.reconstruction[1], second.reconstruction[1], atol=1e-5)
    np.testing.assert_allclose(mixed.reconstruction[0], nobody.reconstruction[0], atol=1e-5)
    assert np.abs(mixed.reconstruction[1] - mixed.reconstruction[0]).max() > 0.1
    decoded = call(tokenizer, variables, mixed.codes, given, subject=np.array([0, 1, 2]), method="decode")
    np.testing.assert_allclose(decoded, mixed.reconstruction, atol=1e-4)
    stranger = call(tokenizer, variables, signal, given, subject=np.array([0, 3, 0]))
    assert np.isnan(stranger.losses["waveform"])


def test_fewer_channels_are_the_first_of_all(made):
    tokenizer, variables = made
    signal = np.random.default_rng(2).standard_normal((2, 4, 40)).astype(np.float32)
    few = call(tokenizer, variables, signal[:, :3], sensors(2, 3))
    all_ = call(tokenizer, variables, signal, sensors(2, 4, [True, True, True, False]))
    np.testing.assert_array_equal(few.codes, all_.codes)
    np.testing.assert_allclose(few.reconstruction, all_.reconstruction[:, :3], atol=1e-5)
    assert few.losses["waveform"] == pytest.approx(float(all_.losses["waveform"]), rel=1e-5)


@pytest.mark.slow
def test_a_patch_is_embedded_alone(made):
    tokenizer, variables = made
    signal = np.random.default_rng(3).standard_normal((1, 3, 40)).astype(np.float32)
    other = signal.copy()
    other[..., 10:20] = 0

    def embed(model: Any, x: Any) -> Any:
        patches = jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, 13))).reshape(1, 4, 10, 16)
        return model.embed(patches, jnp.array([True]), False)

    a, b = (np.asarray(call(tokenizer, variables, given, method=embed))[0] for given in (signal, other))
    np.testing.assert_array_equal(a[[0, 2, 3]], b[[0, 2, 3]])
    assert np.abs(a[1] - b[1]).max() > 0.1


@pytest.mark.slow
def test_it_learns_waves():
    """Three channels of one wave at any phase, four frequencies: told much better than by silence, by many codes."""
    tokenizer = zoo.create("du_in_tiny", **SMALL | {"codes": 64, "filters": 8})
    rng = np.random.default_rng(3)

    def batch() -> np.ndarray:
        turns = rng.integers(2, 6, (32, 1, 1)) * np.arange(40) / 40 + rng.uniform(size=(32, 1, 1))
        return np.sin(2 * np.pi * (turns + np.array([0, 0.25, 0.5])[:, None])).astype(np.float32)

    given = sensors(32, 3)
    variables = jax.jit(tokenizer.init)(KEYS, batch(), given)
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(variables: Any, state: Any, signal: Any, key: Any) -> Any:
        rest = {name: leaf for name, leaf in variables.items() if name != "params"}

        def loss(params: Any) -> Any:
            rngs = dict(zip(("codes", "dropout"), jax.random.split(key), strict=True))
            out, new = tokenizer.apply(
                {"params": params, **rest}, signal, given, train=True, mutable=list(rest), rngs=rngs
            )
            return sum(weight * out.losses[name] for name, weight in tokenizer.loss_weights.items()), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, state

    state = optimizer.init(variables["params"])
    for number in range(1500):
        variables, state = step(variables, state, batch(), jax.random.key(number))
    signal = batch()
    out = jax.jit(tokenizer.apply)(variables, signal, given)
    assert out.losses["waveform"] < 0.3 * np.square(signal).mean()
    assert len(np.unique(out.codes)) > 32


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stride": 7}, "stride that divides the patch"),
        ({"filters": 3, "stride": 100}, "filters 3"),
        ({"learning": "slowly"}, "learning: got 'slowly'"),
    ],
)
def test_bad_options_are_refused(options, says):
    tokenizer = zoo.create("du_in_base", **options)
    with pytest.raises(ZooError, match=says):
        jax.eval_shape(tokenizer.init, KEYS, jnp.zeros((1, 1, 100)), sensors(1, 1))
