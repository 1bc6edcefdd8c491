"""SimpleConv's own properties; the contract is in tests/test_encoders.py, parity in tests/parity."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from electrodes import electrodes

from zoo.encoders.simple_conv import SimpleConv
from zoo.errors import ZooError
from zoo.layers.dilated import DilatedConvolutions

SMALL: dict[str, Any] = {"virtual": 5, "frequencies": 2, "mixed": 4, "width": 6, "depth": 3, "outputs": 7}
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SENSORS = electrodes(("FZ", "C4", "OZ", "C3"))


def signal(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 4, samples)).astype(np.float32)


@pytest.mark.parametrize("samples", [1, 7, 30])
def test_a_token_a_sample(samples):
    encoder = SimpleConv(**SMALL)
    out, _ = jax.eval_shape(encoder.init_with_output, jax.random.key(0), signal(samples), SENSORS)
    assert out.tokens.shape == (2, samples, 7)


def test_subjects_that_are_nobody_in_particular_change_nothing():
    given = signal(9), SENSORS
    without, them = SimpleConv(**SMALL), SimpleConv(**SMALL, subjects=3)
    variables = nn.meta.unbox(quick(without.init)(jax.random.key(0), *given))
    alone = quick(without.apply)(variables, *given).tokens
    layers = jnp.broadcast_to(jnp.eye(4), (3, 4, 4))
    whole = {**variables, "params": {**variables["params"], "subject": {"kernel": layers}}}
    tokens = quick(lambda variables: them.apply(variables, *given, subject=np.array([0, 2])).tokens)
    np.testing.assert_allclose(tokens(whole), alone, atol=1e-5)
    whole["params"]["subject"] = {"kernel": layers.at[2].multiply(-1)}
    changed = tokens(whole)
    np.testing.assert_allclose(changed[0], alone[0], atol=1e-5)
    assert np.abs(changed[1] - alone[1]).max() > 1e-3


def test_a_sample_reaches_as_far_as_dilations_and_gates_say():
    """Depth 5, period 3: dilations 1 2 4 1 2 and two gates of one sample of context each side, 12 in all."""
    trunk = DilatedConvolutions(3, 5, period=3)
    x = jnp.zeros((1, 41, 3))
    variables = quick(trunk.init)(jax.random.key(0), x)
    reach = quick(jax.grad(lambda x: jnp.sum(trunk.apply(variables, x)[0, 20])))(x)
    assert np.flatnonzero(np.abs(reach).max((0, 2))).tolist() == list(range(8, 33))


@pytest.mark.parametrize(
    ("options", "more", "says"),
    [
        ({}, {"mask": np.zeros((2, 9), bool)}, "hides nothing"),
        ({"subjects": 2}, {}, "wanted the subject of each example, 0 to 1, got none"),
        ({}, {"subject": np.zeros(2, int)}, "wanted no subject, got some"),
    ],
)
def test_what_it_does_not_take_is_refused(options, more, says):
    with pytest.raises(ZooError, match=says):
        jax.eval_shape(lambda: SimpleConv(**SMALL, **options).init(jax.random.key(0), signal(9), SENSORS, **more))


@pytest.mark.parametrize(("options", "says"), [({"kernel": 2}, "kernel: got 2"), ({"depth": 0}, "depth 0")])
def test_bad_convolutions_are_refused(options, says):
    with pytest.raises(ZooError, match=says):
        jax.eval_shape(DilatedConvolutions(3, **options).init, jax.random.key(0), jnp.zeros((1, 4, 3)))
