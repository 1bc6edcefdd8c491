"""The ELM neuron: its definition in float64, its published sizes, which inputs branches hear, and errors."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.state_space.elm import ELM, windows

QUICK = {"xla_backend_optimization_level": 0}
BATCH, TIME, INPUTS = 2, 20, 9
NEURON = {"memory": 5, "branches": 3, "synapses": 4, "routing": "windows", "memory_times": (1.0, 150.0), "outputs": 2}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def drawn(neuron: ELM) -> Any:
    """Variables, moved off their initial values."""
    variables = nn.unbox(jax.jit(neuron.init, compiler_options=QUICK)(jax.random.key(0), normal(0, 1, 2, INPUTS)))
    leaves, tree = jax.tree.flatten(variables)
    return jax.tree.unflatten(tree, [leaf + 0.3 * normal(n, *leaf.shape) for n, leaf in enumerate(leaves)])


def run(neuron: ELM, variables: Any, x: jax.Array, **arrays: jax.Array) -> np.ndarray:
    return np.asarray(jax.jit(neuron.apply, compiler_options=QUICK)(variables, x, **arrays))


@pytest.mark.parametrize(("memory", "parameters"), [(20, 8_002), (100, 54_002)])
@pytest.mark.parametrize("version", [1, 2])
def test_published_neurons_have_these_sizes(memory: int, parameters: int, version: int):
    """NeuronIO: 45 branches of 100 synapses hear 1278 inputs; a spike and a voltage come out."""
    neuron = ELM(1278, memory=memory, branches=45, synapses=100, routing="windows", version=version, outputs=2)
    shapes = jax.eval_shape(neuron.init, jax.random.key(0), jnp.zeros((1, 3, 1278)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_neuron_is_its_definition(version: int, activation: str):
    """With a trace for every synapse in version 1, as in the paper, and for every branch in version 2."""
    neuron = ELM(INPUTS, version=version, activation=activation, **NEURON)
    variables, x = drawn(neuron), normal(9, BATCH, TIME, INPUTS)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    source, hears = windows(INPUTS, 3, 4)
    inputs = np.maximum(p["weight"], 0) * (np.asarray(x, np.float64)[..., source.ravel()] * hears.ravel())
    times = np.geomspace(1, 150, 5)
    kept = np.exp(-1 / times)
    trace, memory, outs = np.zeros((BATCH, 12 if version == 1 else 3)), np.zeros((BATCH, 5)), []
    for t in range(TIME):
        if version == 1:
            trace = np.exp(-1 / 5) * trace + inputs[:, t]
            branch = trace.reshape(BATCH, 3, 4).sum(-1)
        else:
            trace = np.exp(-1 / 5) * trace + inputs[:, t].reshape(BATCH, 3, 4).sum(-1)
            branch = trace
        hidden = np.concatenate([branch, kept * memory], axis=-1) @ p["inner_kernel"] + p["inner_bias"]
        hidden = np.maximum(hidden, 0) if activation == "relu" else hidden / (1 + np.exp(-hidden))
        change = 1.7159 * np.tanh(2 / 3 * (hidden @ p["change_kernel"] + p["change_bias"]))
        memory = kept * memory + (5 * (1 - kept) if version == 1 else 1 - np.exp(-5 / times)) * change
        outs.append(memory @ p["out"]["kernel"] + p["out"]["bias"])
    wanted = np.stack(outs, axis=1)
    np.testing.assert_allclose(run(neuron, variables, x), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_windows_take_excitatory_and_inhibitory_inputs_in_turn():
    source, hears = windows(6, 2, 4)
    np.testing.assert_array_equal(source[hears], [0, 3, 1, 4, 4, 2, 5])
    np.testing.assert_array_equal(hears, [[True] * 4, [True] * 3 + [False]])
    source, hears = windows(1278, 45, 100)
    assert set(source[hears]) == set(range(1278))
    np.testing.assert_array_equal(source[1, :2], [29 // 2 + 639, 15])  # the second branch begins at place 29


def test_no_time_passes_at_tokens_that_are_not_there():
    neuron = ELM(INPUTS, **NEURON)
    variables, x = drawn(neuron), normal(9, BATCH, TIME, INPUTS)
    there = np.random.default_rng(2).random(TIME) < 0.6
    got = run(neuron, variables, x, mask=jnp.broadcast_to(jnp.asarray(there), (BATCH, TIME)))
    wanted = run(neuron, variables, x[:, there])
    np.testing.assert_allclose(got[:, there], wanted, rtol=1e-5, atol=1e-6)


def test_learned_times_start_where_fixed_ones_stand():
    learned, fixed = (ELM(INPUTS, learn_times=each, **NEURON) for each in (True, False))
    x = normal(9, BATCH, TIME, INPUTS)
    variables = nn.unbox(jax.jit(learned.init, compiler_options=QUICK)(jax.random.key(0), x))
    others = {name: leaf for name, leaf in variables["params"].items() if name != "time_logit"}
    np.testing.assert_allclose(run(learned, variables, x), run(fixed, {"params": others}, x), rtol=1e-3, atol=1e-4)


def test_synapses_never_weigh_less_than_nothing():
    neuron = ELM(INPUTS, **NEURON)
    variables, x = drawn(neuron), normal(9, BATCH, TIME, INPUTS)
    negative = {"params": {**variables["params"], "weight": -jnp.ones(12)}}
    np.testing.assert_array_equal(run(neuron, negative, x), run(neuron, negative, jnp.zeros_like(x)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": 4}, "elm: 4 branches of 1 synapses are not the 9 inputs"),
        (
            {"branches": 4, "synapses": 2, "routing": "windows"},
            "elm: 4 windows of 2 synapses do not cover the 9",
        ),
        ({"routing": "random"}, "elm: routing is none or windows, got 'random'"),
        ({"version": 3}, "elm: version is 1 or 2, got 3"),
        ({"activation": "tanh"}, "elm: activation is relu or silu, got 'tanh'"),
        ({"memory_times": (5.0, 5.0)}, r"elm: memory_times: got \(5.0, 5.0\), wanted 0 < shortest < longest"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(ELM(INPUTS, **options).init, jax.random.key(0), normal(0, 1, 2, INPUTS))
