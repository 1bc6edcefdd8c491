"""Neurons, their surrogate gradients, and both forms of lateral inhibition are what their papers write."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from zoo.attention.spiking import Neuron, Spiking, spike
from zoo.errors import ZooError

QUICK = {"xla_backend_optimization_level": 0}
DIM, HEADS, LENGTH, STEPS = 8, 2, 9, 3
WIDTH = DIM // HEADS


def lif(x: np.ndarray, threshold: float, tau: float = 2.0) -> np.ndarray:
    """Spikes [S, ...] of currents [S, ...]."""
    v, spikes = np.zeros(x.shape[1:]), []
    for current in x:
        v = v + (current - v) / tau
        spikes.append((v >= threshold).astype(float))
        v = np.where(spikes[-1] == 1, 0, v)
    return np.stack(spikes)


def test_neurons_leak_fire_and_reset():
    # By hand, τ = 2: 0.6, 1.1 → spike and 0, 0.4, 1.15 → spike.
    currents = jnp.asarray([1.2, 1.6, 0.8, 1.9])
    np.testing.assert_array_equal(Neuron()(currents), [0, 1, 0, 1])
    x = np.random.default_rng(1).standard_normal((20, 5)).astype(np.float32)
    spikes = Neuron(tau=3.0, threshold=0.2)(jnp.asarray(x))
    np.testing.assert_array_equal(spikes, lif(x, 0.2, 3.0))
    assert 0 < spikes.mean() < 1


@pytest.mark.parametrize("surrogate", ["sigmoid", "atan"])
def test_gradient_is_the_surrogates_and_not_the_resets(surrogate: str):
    def slope(v: np.ndarray) -> np.ndarray:
        if surrogate == "sigmoid":
            return 4 * expit(4 * v) * (1 - expit(4 * v))
        return 1 / (1 + (np.pi * v) ** 2)

    at = jnp.asarray([-0.7, 0.0, 0.3])
    np.testing.assert_allclose(jax.vmap(jax.grad(partial(spike, surrogate=surrogate)))(at), slope(at), rtol=1e-5)

    x, cotangent = np.array([1.2, 1.6, 0.8, 1.9]), np.array([0.3, -1.0, 0.5, 2.0])
    got = jax.grad(lambda x: jnp.sum(Neuron(surrogate=surrogate)(x) * cotangent))(jnp.asarray(x, jnp.float32))
    # Backwards by hand: v_t = h_{t−1} / 2 + x_t / 2, s_t = spike(v_t − 1), h_t = v_t (1 − s_t) with s_t held fixed.
    potentials, h = [], 0.0
    for current in x:
        potentials.append(h + (current - h) / 2)
        h = potentials[-1] if potentials[-1] < 1 else 0.0
    wanted, d_h = np.zeros(4), 0.0
    for t in reversed(range(4)):
        d_v = cotangent[t] * slope(potentials[t] - 1) + d_h * (potentials[t] < 1)
        wanted[t], d_h = d_v / 2, d_v / 2
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def drawn(mixer: nn.Module) -> Any:
    """Variables that let neurons fire; variances are positive."""
    variables = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, LENGTH, DIM))))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), variables["params"])
    stats = jax.tree.map(lambda leaf: rng.uniform(0.3, 1, leaf.shape).astype(np.float32), variables["batch_stats"])
    return jax.tree.map(jnp.asarray, {"params": params, "batch_stats": stats})


def normed(variables: Any, name: str, x: np.ndarray) -> np.ndarray:
    own = {key: np.asarray(part[name][key], np.float64) for key, part in keyed(variables)}
    return (x - own["mean"]) / np.sqrt(own["var"] + 1e-5) * own["scale"] + own["bias"]


def keyed(variables: Any) -> list[tuple[str, Any]]:
    params, stats = variables["params"], variables["batch_stats"]
    return [("scale", params), ("bias", params), ("mean", stats), ("var", stats)]


def currents(variables: Any, x: np.ndarray, name: str) -> np.ndarray:
    """BN(W x), of a row [T, D]."""
    return normed(variables, f"{name}_norm", x @ np.asarray(variables["params"][name]["kernel"], np.float64))


def convolved(variables: Any, x: np.ndarray, ids: np.ndarray, there: np.ndarray) -> np.ndarray:
    kernel = np.asarray(variables["params"]["convolution"]["kernel"], np.float64)
    out = np.zeros(x.shape)
    for t in range(len(x)):
        for lag in range(min(len(kernel), t + 1)):
            if ids[t - lag] == ids[t] and there[t - lag]:
                out[t] += kernel[-1 - lag] * x[t - lag]
    return out


def output(variables: Any, y: np.ndarray) -> np.ndarray:
    own = {name: np.asarray(leaf, np.float64) for name, leaf in variables["params"]["out"].items()}
    return normed(variables, "out_norm", y @ own["kernel"] + own["bias"])


def example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = 2 * np.random.default_rng(3).standard_normal((LENGTH, DIM)).astype(np.float32)
    return x, (np.arange(LENGTH) >= 4).astype(np.int32), np.arange(LENGTH) % 4 != 2


def run(mixer: nn.Module, variables: Any, x: np.ndarray, ids: np.ndarray, there: np.ndarray) -> np.ndarray:
    given = {"segment_ids": jnp.asarray(ids[None]), "mask": jnp.asarray(there[None])}
    return np.asarray(jax.jit(partial(mixer.apply, **given), compiler_options=QUICK)(variables, jnp.asarray(x[None])))[
        0
    ]


def repeated(current: np.ndarray) -> np.ndarray:
    return np.broadcast_to(current, (STEPS, *current.shape))


def compared(got: np.ndarray, wanted: np.ndarray, there: np.ndarray) -> None:
    assert np.ptp(wanted[there], axis=0).min() > 0, "some channel says nothing"
    np.testing.assert_allclose(got[there], wanted[there], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("readout", ["current", "spikes"])
def test_feed_forward_inhibition_is_its_definition(readout: str):
    mixer = Spiking(DIM, heads=HEADS, steps=STEPS, threshold=0.3, readout=readout)
    variables, (x, ids, there) = drawn(mixer), example()
    q = lif(repeated(currents(variables, x, "query")), 0.3).reshape(STEPS, LENGTH, HEADS, 2, WIDTH // 2)
    k = lif(repeated(currents(variables, convolved(variables, x, ids, there), "key")), 0.3)
    awake = lif(q[..., 0, :].sum(-1) - q[..., 1, :].sum(-1), 0.5)
    assert 0.1 < awake.mean() < 0.9
    y = awake[..., None] * k.reshape(STEPS, LENGTH, HEADS, WIDTH)
    out = output(variables, y.reshape(STEPS, LENGTH, DIM))
    if readout == "spikes":
        out = lif(out, 0.3)
        np.testing.assert_allclose(run(mixer, variables, x, ids, there)[there], out.mean(0)[there], atol=1e-6)
    else:
        compared(run(mixer, variables, x, ids, there), out.mean(0), there)


@pytest.mark.parametrize("causal", [True, False])
def test_feedback_inhibition_is_its_definition(causal: bool):
    mixer = Spiking(
        DIM, heads=HEADS, steps=STEPS, threshold=0.3, attention_threshold=0.1, feedback=True, causal=causal, width=1
    )
    variables, (x, ids, there) = drawn(mixer), example()
    variables["params"]["offset"] = jnp.asarray(0.1)  # as drawn, no query fires
    own = {name: np.asarray(leaf, np.float64) for name, leaf in variables["params"]["convolution"].items()}
    near = np.where(there[:, None], x, 0) * own["kernel"].reshape(-1) + own.get("bias", 0)
    balance = {name: float(variables["params"][name]) for name in ("excitation", "inhibition", "offset")}
    gain, loss = (np.log1p(np.exp(balance[name])) for name in ("excitation", "inhibition"))
    q, k, v = (
        lif(repeated(currents(variables, given, name)), 0.3)
        for given, name in ((x, "query"), (near, "key"), (x, "value"))
    )
    visible = (ids[:, None] == ids) & there
    if causal:
        visible &= np.tri(LENGTH, dtype=bool)
    # Every neuron's past is run through again at each step: currents so far, the last spikes taken.
    inhibiting, choosing, attending, giving = [], [], [], []
    spikes = np.zeros((LENGTH, DIM))
    for step in range(STEPS):
        inhibiting.append(currents(variables, spikes, "inhibit"))
        difference = gain * q[step] - loss * lif(np.stack(inhibiting), 0.3)[-1] + balance["offset"]
        choosing.append(difference)
        rows = [part.reshape(LENGTH, HEADS, WIDTH) for part in (lif(np.stack(choosing), 0.1)[-1], k[step], v[step])]
        attending.append(0.125 * np.einsum("ihk,jhk,ij,jhv->ihv", *rows[:2], visible, rows[2]).reshape(LENGTH, DIM))
        giving.append(output(variables, lif(np.stack(attending), 0.1)[-1]))
        spikes = lif(np.stack(giving), 0.3)[-1]
    assert 0.1 < np.mean(spikes) < 0.9
    compared(run(mixer, variables, x, ids, there), np.stack(giving).mean(0), there)


def test_statistics_are_over_time_steps_and_tokens_that_are_there():
    mixer = Spiking(DIM, heads=HEADS, steps=STEPS, threshold=0.3)
    variables, (x, _, there) = drawn(mixer), example()

    def statistics(x: np.ndarray) -> Any:
        given = {"mask": jnp.asarray(there[None]), "train": True, "mutable": ["batch_stats"]}
        return mixer.apply(variables, jnp.asarray(x[None]), **given)[1]["batch_stats"]

    moved, again = statistics(x), statistics(np.where(there[:, None], x, 50))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), moved, again)
    raw = x[there].astype(np.float64) @ np.asarray(variables["params"]["query"]["kernel"])
    before = variables["batch_stats"]["query_norm"]
    np.testing.assert_allclose(
        moved["query_norm"]["mean"], 0.9 * before["mean"] + 0.1 * raw.mean(0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(moved["query_norm"]["var"], 0.9 * before["var"] + 0.1 * raw.var(0), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 8}, "heads of 1 features do not halve into excitation and inhibition"),
        ({"surrogate": "relu"}, "surrogate is sigmoid or atan, got 'relu'"),
        ({"readout": "membrane"}, "readout is current or spikes, got 'membrane'"),
        ({"steps": 0}, "steps: got 0, wanted at least 1"),
        ({"grid": (3, 3)}, r"grid \(3, 3\): a causal mixer knows time alone"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    mixer = Spiking(DIM, **options)
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, LENGTH, DIM)))
