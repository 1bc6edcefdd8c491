"""Titans: the paper's equations, the delta rule as a special case, what chunks and granularities mean, and errors."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from kernels.delta_rule import delta_rule
from zoo.errors import ZooError
from zoo.layers.mixer import Mixer, create_mixer
from zoo.state_space.titans_memory import Memory, layer_shapes, neural_memory, token_paths

QUICK = {"xla_backend_optimization_level": 0}
BATCH, TIME, HEADS, WIDTH = 2, 12, 2, 4


def drawn(seed: int, *, chunk_gates: int | None = None) -> dict[str, np.ndarray]:
    """q, k, v, theta and the two gates, float64; `chunk_gates` is the number of chunks that have one each."""
    rng = np.random.default_rng(seed)
    gates = (BATCH, TIME if chunk_gates is None else chunk_gates, HEADS)
    return {
        **{name: rng.standard_normal((BATCH, TIME, HEADS, WIDTH)) / 2 for name in "qkv"},
        "theta": rng.uniform(0.05, 0.2, (BATCH, TIME, HEADS)),
        "alpha": rng.uniform(0.0, 0.4, gates),
        "eta": rng.uniform(0.2, 0.9, gates),
    }


def network(seed: int, depth: int, residual: bool = False) -> list[np.ndarray]:
    """Weights of every layer [B, H, …] and the momentum after them."""
    rng = np.random.default_rng(seed)
    shapes = layer_shapes(WIDTH, depth, 2, residual)
    return [0.5 * rng.standard_normal((BATCH, HEADS, *shape)) for shape in shapes * 2]


def memory_of(arrays: list[np.ndarray]) -> Memory:
    half = len(arrays) // 2
    return Memory(tuple(map(jnp.asarray, arrays[:half])), tuple(map(jnp.asarray, arrays[half:])))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def slope(x: np.ndarray) -> np.ndarray:
    return (1 + erf(x / np.sqrt(2))) / 2 + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def answer(weights: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """A network of one or two matrices, of one head."""
    return x @ weights[0] if len(weights) == 1 else gelu(x @ weights[0]) @ weights[1]


def gradient(weights: list[np.ndarray], k: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
    """Of ‖M(k) − v‖² with respect to the matrices, by the chain rule on paper."""
    error = 2 * (answer(weights, k) - v)
    if len(weights) == 1:
        return [np.outer(k, error)]
    inner = k @ weights[0]
    return [np.outer(k, (weights[1] @ error) * slope(inner)), np.outer(gelu(inner), error)]


def sequential(given: dict[str, np.ndarray], start: list[np.ndarray], chunk: int = 1) -> np.ndarray:
    """Eq. 13–15 token by token; gradients at the weights of the last multiple of `chunk`, as in eq. 16."""
    out = np.zeros_like(given["v"])
    half = len(start) // 2
    for b, h in np.ndindex(BATCH, HEADS):
        weights, momentum = ([w[b, h] for w in part] for part in (start[:half], start[half:]))
        for t in range(TIME):
            frozen = weights if t % chunk == 0 else frozen
            q, k, v, theta, alpha, eta = (given[name][b, t, h] for name in ("q", "k", "v", "theta", "alpha", "eta"))
            steps = gradient(frozen, k, v)
            momentum = [eta * s - theta * u for s, u in zip(momentum, steps, strict=True)]
            weights = [(1 - alpha) * w + s for w, s in zip(weights, momentum, strict=True)]
            out[b, t, h] = answer(weights, q)
    return out


def remembered(given: dict[str, np.ndarray], start: list[np.ndarray], **options: object) -> tuple[np.ndarray, Memory]:
    """`neural_memory` in float64."""
    run = jax.jit(partial(neural_memory, **options), compiler_options=QUICK)
    with jax.enable_x64(True):
        logs = np.log1p(-given["alpha"]), np.log(given["eta"])
        arrays = map(jnp.asarray, (given["q"], given["k"], given["v"], given["theta"], *logs))
        out, memory = run(*arrays, initial=memory_of(start))
        return np.asarray(out), memory


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_equals_the_papers_recurrence(depth, chunk):
    given, start = drawn(0), network(1, depth)
    out, _ = remembered(given, start, chunk=chunk)
    np.testing.assert_allclose(out, sequential(given, start, chunk), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("residual", [False, True])
def test_both_granularities_are_one_recurrence_at_chunks_of_one_token(residual):
    given, start = drawn(0), network(1, 3, residual)
    out, memory = remembered(given, start, chunk=1, activation="silu")
    other, after = remembered(given, start, chunk=1, activation="silu", granularity="chunk")
    np.testing.assert_allclose(other, out, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(memory), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_steps_at_the_end_of_chunks_where_gates_are_one_a_chunk():
    chunk, start = 4, network(1, 2)
    given = drawn(0, chunk_gates=TIME // chunk)
    out, _ = remembered(given, start, chunk=chunk, granularity="chunk")
    b, h = 1, 0
    weights, momentum = ([w[b, h] for w in part] for part in (start[:2], start[2:]))
    wanted = []
    for t in range(TIME):
        c, last = t // chunk, t % chunk == chunk - 1
        if last:
            own = range(c * chunk, t + 1)
            steps = [
                [given["theta"][b, j, h] * u for u in gradient(weights, *(given[n][b, j, h] for n in "kv"))]
                for j in own
            ]
            eta, alpha = (given[name][b, c, h] for name in ("eta", "alpha"))
            momentum = [eta * s - sum(us) for s, us in zip(momentum, zip(*steps, strict=True), strict=True)]
            weights = [(1 - alpha) * w + s for w, s in zip(weights, momentum, strict=True)]
        wanted.append(answer(weights, given["q"][b, t, h]))
    np.testing.assert_allclose(out[b, :, h], wanted, rtol=1e-10, atol=1e-12)


def test_paths_of_a_gradient_are_two_stacked_recurrences():
    """b, f and G of the module's docstring: eq. 13 and 14 on unit vectors, one for each part of M_t."""
    given = drawn(3)
    theta, alpha, eta = (np.moveaxis(given[name], 1, 2) for name in ("theta", "alpha", "eta"))
    with jax.enable_x64(True):
        paths = token_paths(*map(jnp.asarray, (theta, np.log1p(-alpha), np.log(eta))), None)
    for b, h in np.ndindex(BATCH, HEADS):
        # Columns: M_0, S_0 and the gradient of every token, of which token t puts in −theta_t.
        weights, momentum = np.eye(2, 2 + TIME)
        for t in range(TIME):
            momentum = eta[b, h, t] * momentum - theta[b, h, t] * np.eye(2 + TIME)[2 + t]
            weights = (1 - alpha[b, h, t]) * weights + momentum
            ours = [paths.weights[b, h, t], paths.momentum[b, h, t], -paths.steps[b, h, t]]
            np.testing.assert_allclose(np.concatenate(ours), weights, rtol=1e-12, atol=1e-14)
        ours = [[0.0], paths.last_momentum[b, h], -paths.last_steps[b, h]]
        np.testing.assert_allclose(np.concatenate(ours), momentum, rtol=1e-12, atol=1e-14)


def test_a_matrix_without_momentum_and_forgetting_is_the_delta_rule():
    """M ← M − theta · 2 k (kᵀM − v) is the delta rule with beta = 2 theta."""
    given, start = drawn(4), network(5, 1)
    q, k, v, theta, state, cotangent = (
        jnp.asarray(x, jnp.float32)
        for x in (given["q"], given["k"], given["v"], given["theta"], start[0], drawn(6)["v"])
    )

    def titans(q, k, v, theta, state):
        initial = Memory((state,), (jnp.zeros_like(state),))
        never, always = jnp.full_like(theta, -jnp.inf), jnp.zeros_like(theta)
        out, memory = neural_memory(q, k, v, theta, always, never, initial=initial, chunk=1)
        return out, memory.weights[0]

    def delta(q, k, v, theta, state):
        return delta_rule(q, k, v, 2 * theta, scale=1.0, initial_state=state)

    @partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def pulled(op, *arrays):
        results, vjp = jax.vjp(op, *arrays)
        return results, vjp((cotangent, state))

    ours, theirs = (jax.tree.leaves(pulled(op, q, k, v, theta, state)) for op in (titans, delta))
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("granularity", ["token", "chunk"])
def test_memory_is_handed_over_between_chunks(granularity):
    given, start = drawn(7, chunk_gates=None if granularity == "token" else 3), network(8, 2, True)
    whole, after = remembered(given, start, chunk=4, granularity=granularity)

    def part(begin: int, end: int) -> dict[str, np.ndarray]:
        grid = 1 if granularity == "token" else 4
        return {
            n: x[:, begin // grid : end // grid] if n in ("alpha", "eta") else x[:, begin:end] for n, x in given.items()
        }

    first, between = remembered(part(0, 8), start, chunk=4, granularity=granularity)
    second, end = remembered(part(8, 12), jax.tree.leaves(between), chunk=4, granularity=granularity)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(jax.tree.leaves(end), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("granularity", ["token", "chunk"])
def test_segments_that_begin_inside_a_chunk_begin_anew(granularity):
    """Two borders within one chunk: what comes after them is as if nothing had come before, momentum too."""
    given, start = drawn(9, chunk_gates=None if granularity == "token" else 2), network(10, 2)
    fresh = jnp.broadcast_to(jnp.isin(jnp.arange(TIME), jnp.asarray([2, 5])), (BATCH, TIME))
    options = {"chunk": 8, "granularity": granularity, "fresh": fresh}
    out, memory = remembered(given, start, **options)
    other = {
        name: np.where(np.arange(x.shape[1])[:, None, None] < 5, 3.0, x) if name in "qkv" else x
        for name, x in given.items()
    }
    changed, after = remembered(other, start, **options)
    np.testing.assert_allclose(changed[:, 5:], out[:, 5:], rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(memory), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    # The segment's first chunk is cut at time 8, where the grid of chunks goes on.
    if granularity == "token":
        alone = {name: x[:, 5:8] for name, x in given.items()}
        np.testing.assert_allclose(remembered(alone, start, chunk=3)[0], out[:, 5:8], rtol=1e-10, atol=1e-12)


def test_step_size_keeps_a_matrix_bounded():
    """The worst keys are all the same: a chunk of them steps by 2 · sum(theta) of the error, beyond 2 it grows."""
    time, chunk = 512, 16
    k = jnp.ones((1, time, 1, 1))
    initial = Memory((jnp.ones((1, 1, 1, 1)),), (jnp.zeros((1, 1, 1, 1)),))

    @partial(jax.jit, compiler_options=QUICK)
    def last(step_size, eta):
        gate = jnp.full((1, time, 1), step_size * (1 - eta))
        _, memory = neural_memory(
            k, k, 0 * k, gate, 0 * gate, jnp.full_like(gate, jnp.log(eta)), initial=initial, chunk=chunk
        )
        return jnp.abs(memory.weights[0]).max()

    for eta in (0.0, 0.3, 0.6, 0.9, 0.99):
        assert last(1 / chunk, eta) <= 1 + 1e-5
    assert last(1.1 / chunk, 0.0) > 10
    assert last(0.5, 0.9) > 10


def test_remembers_beyond_the_window():
    """A needle: a key seen once, long before the window, is answered with its value; the keys since are orthogonal."""
    time, width = 32, 32
    k = jnp.eye(time, width)[None, :, None]
    v = jnp.asarray(np.random.default_rng(0).standard_normal((1, time, 1, width)), jnp.float32)
    q = k.at[:, -1].set(k[:, 0])
    initial = Memory((jnp.zeros((1, 1, width, width)),), (jnp.zeros((1, 1, width, width)),))
    half, never = jnp.full((1, time, 1), 0.5), jnp.full((1, time, 1), -jnp.inf)
    out, _ = jax.jit(partial(neural_memory, chunk=8), compiler_options=QUICK)(
        q, k, v, half, 0 * half, never, initial=initial
    )
    np.testing.assert_allclose(out[:, -1], v[:, 0], rtol=1e-5, atol=1e-5)


def drawn_parameters(mixer: Mixer, x: jax.Array) -> Any:
    """In place of initial ones, which would be another program to compile."""
    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x))
    return jax.tree.map(lambda s: jnp.asarray(0.4 * rng.standard_normal(s.shape), jnp.float32), shapes)


def test_memory_alone_carries_segments_on():
    """Memory as context: an earlier segment changes what comes, unless the memory neither steps nor forgets."""
    mixer = create_mixer("titans", 16, wiring="mac", heads=1, chunk=4, segment=8, persistent=3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 19, 16)), jnp.float32)
    run = jax.jit(mixer.apply, compiler_options=QUICK)
    variables = drawn_parameters(mixer, x)

    def effect(variables):
        """On the tokens from 11 on: until then the memory's convolutions see the segment before."""
        return np.abs(run(variables, x) - run(variables, x.at[:, 2].add(1.0)))[:, 11:].max()

    gates = variables["params"]["memory"]
    gates["alpha"]["bias"] -= 5.0
    assert effect(variables) > 1e-5
    for name in ("theta", "alpha"):
        gates[name]["bias"] -= 1e3
    assert effect(variables) == 0


@pytest.mark.parametrize("granularity", ["token", "chunk"])
def test_packed_segments_off_the_grid_are_kept_apart(granularity):
    """A border inside a segment and a chunk of memory as context: nothing passes it, by whatever way."""
    options = {"wiring": "mac", "heads": 1, "depth": 1, "chunk": 4, "segment": 8, "granularity": granularity}
    mixer = create_mixer("titans", 16, **options)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 19, 16)), jnp.float32)
    ids = (jnp.arange(19) >= 10).astype(jnp.int32)[None]
    variables = drawn_parameters(mixer, x)
    run = jax.jit(mixer.apply, compiler_options=QUICK)
    before, after = (run(variables, each, segment_ids=ids) for each in (x, x.at[:, :10].add(1.0)))
    np.testing.assert_allclose(after[:, 10:], before[:, 10:], rtol=1e-6, atol=1e-6)
    assert np.abs(after[:, :10] - before[:, :10]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wiring": "mic"}, "titans: wiring is one of lmm, mac, mag, mal, got 'mic'"),
        ({"granularity": "row"}, "titans: granularity is one of token, chunk, got 'row'"),
        ({"activation": "relu"}, "titans: activation is one of gelu, silu, got 'relu'"),
        ({"depth": 0}, "titans: depth: got 0, wanted at least 1"),
        ({"step_size": 1.5}, "titans: step_size: got 1.5, wanted more than 0 and at most 1"),
        ({"segment": 20}, r"titans: segment: got 20, wanted a multiple of chunk \(16\)"),
        ({"heads": 3}, "titans: dim 16 does not divide into 3 heads"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(create_mixer("titans", 16, **options).init, jax.random.key(0), jnp.zeros((1, 4, 16)))
