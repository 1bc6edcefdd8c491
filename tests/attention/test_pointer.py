"""Pointing is what its paper writes, to as many inputs as there are."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax

from zoo.attention.pointer import Pointer, PointerNetwork, masked_log_softmax
from zoo.errors import ZooError

QUICK = {"xla_backend_optimization_level": 0}
FEATURES, INPUTS, COUNT, STEPS = 6, 3, 7, 4


def close(got: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted[np.isfinite(wanted)]).max())


def network() -> tuple[PointerNetwork, Any, jax.Array, jax.Array, np.ndarray]:
    """Model, variables, inputs [2, N, F], targets [2, M] and which inputs there are."""
    rng = np.random.default_rng(1)
    model = PointerNetwork(INPUTS, FEATURES)
    inputs = jnp.asarray(rng.standard_normal((2, COUNT, INPUTS)), jnp.float32)
    targets = jnp.asarray([[3, 0, 0, 2], [1, 4, 2, 3]], jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), inputs, targets))
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes)
    there = np.ones((2, COUNT), bool)
    there[1, 5:] = False
    return model, variables, inputs, targets, there


def decoding(model: PointerNetwork) -> Any:
    decode = partial(model.apply, method="decode")
    return jax.jit(decode, static_argnames=("steps", "revisit"), compiler_options=QUICK)


def lstm(own: Any, state: tuple[np.ndarray, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gates = np.concatenate([x, state[1]]) @ own["kernel"] + own["bias"]
    take, keep, fresh, give = np.split(gates, 4)
    cell = expit(keep) * state[0] + expit(take) * np.tanh(fresh)
    return cell, expit(give) * np.tanh(cell)


def naive(variables: Any, inputs: np.ndarray, read: list[int]) -> np.ndarray:
    """log p [steps, N] of one row of inputs, each step having read the place before."""
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    state, outputs = (np.zeros(FEATURES), np.zeros(FEATURES)), []
    for x in inputs:
        state = lstm(own["encoder"], state, x)
        outputs.append(state[1])
    logs, x = [], own["start"]
    for place in read:
        state = lstm(own["decoder"], state, x)
        hidden = np.tanh(np.stack(outputs) @ own["key"]["kernel"] + state[1] @ own["query"]["kernel"])
        logs.append(log_softmax(hidden @ own["v"]))
        x = inputs[place]
    return np.stack(logs)


def test_network_is_its_definition_whatever_the_number_of_inputs():
    model, variables, inputs, targets, there = network()
    logs = jax.jit(model.apply, compiler_options=QUICK)(variables, inputs, targets, mask=jnp.asarray(there))
    assert logs.shape == (2, STEPS, COUNT)
    for row in range(2):
        count = there[row].sum()
        wanted = naive(variables, np.asarray(inputs[row, :count], np.float64), list(np.asarray(targets[row])))
        close(logs[row, :, :count], wanted)
        assert np.isneginf(logs[row, :, count:]).all()


def test_every_parameter_learns_from_targets():
    model, variables, inputs, targets, there = network()

    @partial(jax.jit, compiler_options=QUICK)
    def gradient(variables: Any) -> Any:
        def loss(variables: Any) -> jax.Array:
            logs = model.apply(variables, inputs, targets, mask=jnp.asarray(there))
            return -jnp.mean(jnp.take_along_axis(logs, targets[..., None], axis=-1))

        return jax.grad(loss)(variables)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables)):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_greedy_decoding_is_the_likeliest_at_each_step():
    model, variables, inputs, _, there = network()
    decode = jax.jit(
        partial(model.apply, method="decode"), static_argnames=("steps", "revisit"), compiler_options=QUICK
    )
    places, total = decode(variables, inputs, steps=STEPS, mask=jnp.asarray(there))
    for row in range(2):
        alone = np.asarray(inputs[row, : there[row].sum()], np.float64)
        logs = naive(variables, alone, list(np.asarray(places[row])))
        np.testing.assert_array_equal(logs.argmax(-1), places[row])
        close(total[row], logs.max(-1).sum())


def test_tours_visit_every_input_once():
    model, variables, inputs, _, there = network()
    decode = jax.jit(
        partial(model.apply, method="decode"), static_argnames=("steps", "revisit"), compiler_options=QUICK
    )
    places, _ = decode(variables, inputs, steps=COUNT, revisit=False)
    np.testing.assert_array_equal(np.sort(places, axis=1), np.tile(np.arange(COUNT), (2, 1)))
    few, total = decode(variables, inputs, steps=5, mask=jnp.asarray(there), revisit=False)
    np.testing.assert_array_equal(np.sort(few[1]), np.arange(5))
    assert np.isfinite(total).all()
    with pytest.raises(ZooError, match="8 steps to 7 inputs, none twice"):
        decode(variables, inputs, steps=COUNT + 1, revisit=False)


def test_nothing_to_point_to_is_no_nan():
    visible = jnp.asarray([[True, False], [False, False]])

    def value(u: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(masked_log_softmax(u, visible)) * jnp.asarray([1.0, 2.0]))

    out, gradient = jax.value_and_grad(value)(jnp.ones((2, 2)))
    assert out == 1
    np.testing.assert_array_equal(gradient, np.zeros((2, 2)))


@pytest.mark.parametrize("causal", [True, False])
def test_glimpse_is_its_definition(causal: bool):
    # More tokens than are worked on at once.
    mixer, length = Pointer(4, hidden=3, causal=causal), 70
    rng = np.random.default_rng(2)
    x = rng.standard_normal((1, length, 4))
    own = {"w1": rng.standard_normal((4, 3)), "w2": rng.standard_normal((4, 3)), "v": rng.standard_normal(3)}
    given = {"key": {"kernel": own["w1"]}, "query": {"kernel": own["w2"]}, "v": own["v"]}
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {"params": given})
    out = jax.jit(mixer.apply, compiler_options=QUICK)(rounded, jnp.asarray(x, jnp.float32))
    wanted = np.zeros((length, 4))
    for t in range(length):
        seen = x[0, : t + 1] if causal else x[0]
        wanted[t] = softmax(np.tanh(seen @ own["w1"] + x[0, t] @ own["w2"]) @ own["v"]) @ seen
    close(out[0], wanted)


def test_full_cache_gives_nan_and_writes_nothing():
    mixer, x = Pointer(4), jnp.ones((1, 4))
    variables = nn.unbox(mixer.init(jax.random.key(0), x[None]))
    state = mixer.apply(variables, 1, 1, method="initial_state")
    step = jax.jit(partial(mixer.apply, method="step"), compiler_options=QUICK)
    first, state = step(variables, x, state)
    np.testing.assert_allclose(first, x, rtol=1e-6)
    second, after = step(variables, 2 * x, state)
    assert np.isnan(second).all()
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
