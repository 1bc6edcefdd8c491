"""The sequence model: tokens and samples, all at once and one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.encoders.sequence import SequenceModel
from zoo.errors import ZooError

QUICK = {"xla_backend_optimization_level": 0}
SMALL: dict[str, Any] = {"dim": 16, "mixers": ("linear", "softmax"), "mlp_options": {"hidden": 8}}
MODELS = {
    "tokens": SequenceModel(**SMALL, vocabulary=11, tied=True, max_length=9, convolution=3),
    "samples": SequenceModel(**SMALL, features=3, outputs=2, convolution=4),
}


def inputs(name: str) -> jax.Array:
    draw = np.random.default_rng(0)
    tokens, samples = draw.integers(0, 11, (2, 8)), draw.standard_normal((2, 8, 3))
    return jnp.asarray(tokens, jnp.int32) if name == "tokens" else jnp.asarray(samples, jnp.float32)


def variables(name: str) -> Any:
    return nn.unbox(jax.jit(MODELS[name].init, compiler_options=QUICK)(jax.random.key(0), inputs(name)))


@pytest.mark.parametrize(("name", "width"), [("tokens", 11), ("samples", 2)])
def test_one_by_one_equals_all_at_once(name, width):
    model, own, x = MODELS[name], variables(name), inputs(name)

    @partial(jax.jit, compiler_options=QUICK)
    def both(own: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(state: Any, each: jax.Array) -> Any:
            out, state = model.apply(own, each, state, method="step")
            return state, out

        start = model.apply(own, 2, 8, method="initial_state")
        return model.apply(own, x), jnp.swapaxes(jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1], 0, 1)

    whole, stepped = both(own, x)
    assert whole.shape == (2, 8, width)
    assert whole.dtype == jnp.float32
    np.testing.assert_allclose(stepped, whole, atol=1e-5 * np.abs(whole).max())


def test_packed_rows_do_not_meet():
    model, own, x = MODELS["samples"], variables("samples"), inputs("samples")
    ids = jnp.broadcast_to(jnp.arange(8) >= 5, (2, 8)).astype(jnp.int32)
    run = jax.jit(lambda x, ids: model.apply(own, x, segment_ids=ids), compiler_options=QUICK)
    packed, other = run(x, ids), run(x.at[:, :5].set(9.0), ids)
    np.testing.assert_allclose(other[:, 5:], packed[:, 5:], atol=1e-6)
    np.testing.assert_allclose(run(x[:, 5:], ids[:, 5:]), packed[:, 5:], atol=1e-5)


def test_intermediates_are_of_every_layer():
    out, layers = MODELS["tokens"].apply(variables("tokens"), inputs("tokens"), intermediates=True)
    assert layers.shape == (2, 2, 8, 16)
    np.testing.assert_allclose(out, MODELS["tokens"].apply(variables("tokens"), inputs("tokens")), atol=1e-5)


def test_a_step_past_the_table_of_positions_is_nan():
    model, own = MODELS["tokens"], variables("tokens")
    memory, convolved, _ = model.apply(own, 2, 12, method="initial_state")
    for time, finite in ((8, True), (9, False)):
        out, _ = model.apply(own, jnp.zeros(2, jnp.int32), (memory, convolved, jnp.full(2, time)), method="step")
        assert np.isfinite(out).all() == finite


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, jnp.zeros((1, 4), int), r"wants a vocabulary or features, got vocabulary 0, features 0"),
        ({"vocabulary": 3, "features": 2}, jnp.zeros((1, 4), int), r"got vocabulary 3, features 2"),
        ({"features": 2, "tied": True}, jnp.zeros((1, 4, 2)), r"tied: wanted tokens in and out of one vocabulary"),
        ({"vocabulary": 3}, jnp.zeros((1, 4, 2)), r"inputs: got float32 \[1, 4, 2\], wanted integers of 2 axes"),
        (
            {"features": 2},
            jnp.zeros((1, 4, 3)),
            r"inputs: got float32 \[1, 4, 3\], wanted floats of 3 axes, the last 2",
        ),
        ({"vocabulary": 3, "max_length": 3}, jnp.zeros((1, 4), int), r"got 4 places, wanted at most max_length 3"),
    ],
)
def test_what_it_refuses(options, given, message):
    with pytest.raises(ZooError, match=message):
        SequenceModel(**SMALL, **options).init(jax.random.key(0), given)
