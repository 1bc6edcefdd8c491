"""The sequence model: tokens and samples, all at once and one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.encoders.decoding import diverse_beams
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


@pytest.mark.slow
def test_packed_rows_do_not_meet():
    model, own, x = MODELS["samples"], variables("samples"), inputs("samples")
    ids = jnp.broadcast_to(jnp.arange(8) >= 5, (2, 8)).astype(jnp.int32)
    run = jax.jit(lambda x, ids: model.apply(own, x, segment_ids=ids), compiler_options=QUICK)
    packed, other = run(x, ids), run(x.at[:, :5].set(9.0), ids)
    np.testing.assert_allclose(other[:, 5:], packed[:, 5:], atol=1e-6)
    np.testing.assert_allclose(run(x[:, 5:], ids[:, 5:]), packed[:, 5:], atol=1e-5)


@pytest.mark.slow
def test_intermediates_are_of_every_layer():
    model, own, x = MODELS["tokens"], variables("tokens"), inputs("tokens")
    run = jax.jit(partial(model.apply, intermediates=True), compiler_options=QUICK)
    out, layers = run(own, x)
    assert layers.shape == (2, 2, 8, 16)
    np.testing.assert_allclose(out, jax.jit(model.apply, compiler_options=QUICK)(own, x), atol=1e-5)


def test_a_step_past_the_table_of_positions_is_nan():
    model, own = MODELS["tokens"], variables("tokens")
    memory, convolved, _ = model.apply(own, 2, 12, method="initial_state")
    step = jax.jit(partial(model.apply, method="step"), compiler_options=QUICK)
    for time, finite in ((8, True), (9, False)):
        out, _ = step(own, jnp.zeros(2, jnp.int32), (memory, convolved, jnp.full(2, time)))
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


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_leaves_the_state_that_its_tokens_leave_one_by_one(name):
    model, own, x = MODELS[name], variables(name), inputs(name)
    counts = jnp.array([3, 7])

    @partial(jax.jit, compiler_options=QUICK)
    def both(own: Any, x: jax.Array) -> Any:
        out, state = model.apply(own, x[:, :7], counts, 8, method="prefill")
        last = jnp.take_along_axis(x, counts.reshape(2, *(1,) * (x.ndim - 1)), axis=1)[:, 0]
        return out, model.apply(own, last, state, method="step")[0], model.apply(own, x)

    out, following, whole = both(own, x)
    for row, count in enumerate(counts.tolist()):
        np.testing.assert_allclose(out[row, :count], whole[row, :count], atol=1e-5)
        np.testing.assert_allclose(following[row], whole[row, count], atol=1e-5)


@pytest.mark.slow
def test_beams_of_a_scanned_model_take_their_own_states_along():
    model = SequenceModel(16, ("linear",) * 2, 5, mlp_options={"hidden": 8}, convolution=3)
    prompt = jnp.array([[1, 2, 3], [4, 0, 2]])
    own = nn.unbox(jax.jit(model.init, compiler_options=QUICK)(jax.random.key(3), prompt))
    own = jax.tree.map(lambda x: 4 * x, own)  # decided enough that beams change places

    @partial(jax.jit, compiler_options=QUICK)
    def search(own: Any) -> Any:
        _, state = model.apply(own, prompt[:, :-1], method="prefill")
        step = partial(model.apply, own, method="step")
        found = diverse_beams(step, state, prompt[:, -1], 4, beams=4, groups=1, rows=model.rows)
        every = jnp.stack(jnp.meshgrid(*[jnp.arange(5)] * 4, indexing="ij"), -1).reshape(-1, 4)
        rows = jnp.concatenate([jnp.repeat(prompt, len(every), axis=0), jnp.tile(every, (2, 1))], axis=1)
        logs = jax.nn.log_softmax(model.apply(own, rows[:, :-1]))[:, 2:]
        return found, jnp.take_along_axis(logs, rows[:, 3:, None], axis=-1).sum((1, 2)).reshape(2, -1)

    found, scores = search(own)
    number = (found.tokens[:, 0] * 5 ** jnp.arange(3, -1, -1)).sum(-1)
    # Each beam's score is that of its own tokens, which it is not where states stay behind or go to another sequence.
    np.testing.assert_allclose(found.log_probs[:, 0], jnp.take_along_axis(scores, number, axis=1), atol=1e-4)
    assert (found.log_probs[:, 0, 0] > scores.mean(1)).all()
