"""S4D, S5, Mamba and Griffin's recurrent block: the papers' definitions in float64, and what follows from them."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.layers.mixer import create_mixer
from zoo.state_space.mamba import Mamba
from zoo.state_space.rg_lru import RGLRU, bounded_sqrt
from zoo.state_space.s4d import DiagonalStateSpace, hippo_normal, initial_frequencies
from zoo.state_space.s5 import S5

QUICK = {"xla_backend_optimization_level": 0}
BATCH, TIME, DIM = 2, 21, 6


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def drawn(module: nn.Module, *, spread: float = 0.1) -> Any:
    """Variables, moved off their initial values."""
    variables = nn.unbox(jax.jit(module.init, compiler_options=QUICK)(jax.random.key(0), normal(0, BATCH, TIME, DIM)))
    leaves, tree = jax.tree.flatten(variables)
    return jax.tree.unflatten(tree, [leaf + spread * normal(n, *leaf.shape) for n, leaf in enumerate(leaves)])


def run(module: nn.Module, variables: Any, x: jax.Array, method: str = "__call__", **arrays: jax.Array) -> np.ndarray:
    call = partial(module.apply, method=method)
    return np.asarray(jax.jit(call, compiler_options=QUICK)(variables, x, **arrays))


def double(variables: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])


def pair(x: np.ndarray) -> np.ndarray:
    return x[..., 0] + 1j * x[..., 1]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def close(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def discrete(kind: str, A: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Ā, B̄ / B)."""
    if kind == "zoh":
        return np.exp(step * A), (np.exp(step * A) - 1) / A
    return (1 + step * A / 2) / (1 - step * A / 2), step / (1 - step * A / 2)


@pytest.mark.parametrize("kind", ["zoh", "bilinear"])
@pytest.mark.parametrize("causal", [True, False])
def test_s4d_is_its_recurrence(kind: str, causal: bool):
    system = DiagonalStateSpace(DIM, 8, discretization=kind, causal=causal)
    variables, u = drawn(system), normal(9, BATCH, TIME, DIM)
    p = double(variables)
    A, B, C = -np.exp(p["A_re"]) - 1j * p["A_im"], pair(p["B"]), pair(p["C"])
    decay, scale = discrete(kind, A, np.exp(p["log_step"])[:, None])
    wanted = p["D"] * np.asarray(u, np.float64)
    for way in range(1 if causal else 2):
        state = np.zeros((BATCH, *A.shape), complex)
        for t in range(TIME) if way == 0 else reversed(range(TIME)):
            if way == 1:  # read before the token enters: it counts once
                wanted[:, t] += 2 * np.sum(C[1] * state, axis=-1).real
            state = decay * state + scale * B * np.asarray(u[:, t, :, None])
            if way == 0:
                wanted[:, t] += 2 * np.sum(C[0] * state, axis=-1).real
    convolved, scanned = (run(system, variables, u, method) for method in ("convolved", "scanned"))
    close(convolved, wanted)
    close(scanned, wanted)


@pytest.mark.parametrize("length", [1, 2, 16, 17])
def test_s4d_kernel_of_any_length(length: int):
    system = DiagonalStateSpace(DIM, 8)
    variables = drawn(system)
    kernel = system.apply(variables, 64, method="kernel")
    close(system.apply(variables, length, method="kernel"), kernel[..., :length])


def test_a_rate_of_two_is_every_other_sample_of_held_input():
    """Zero-order hold is exact for inputs that are constant between samples."""
    slow, fast = (DiagonalStateSpace(DIM, 8, rate=rate) for rate in (2.0, 1.0))
    variables, u = drawn(slow), normal(9, BATCH, TIME, DIM)
    close(run(fast, variables, jnp.repeat(u, 2, axis=1))[:, 1::2], run(slow, variables, u))


def test_s5_rate_and_times_are_the_same_thing():
    mixer = S5(DIM, states=8, blocks=2)
    variables, x = drawn(mixer), normal(9, BATCH, TIME, DIM)
    doubled = run(S5(DIM, states=8, blocks=2, rate=2.0), variables, x)
    close(run(mixer, variables, x, times=jnp.full((BATCH, TIME), 2.0)), doubled)
    # And a token that lasts twice as long is two tokens.
    close(run(mixer, variables, jnp.repeat(x, 2, axis=1))[:, 1::2], doubled)


def test_initial_frequencies_are_the_papers():
    n = np.arange(8)
    np.testing.assert_allclose(initial_frequencies("lin", 16)[0], np.pi * n)
    np.testing.assert_allclose(initial_frequencies("inv", 16)[0], 16 / np.pi * (16 / (2 * n + 1) - 1))
    # HiPPO-LegS, its normal part being what a rank-one term leaves.
    row, column = np.meshgrid(np.arange(16), np.arange(16), indexing="ij")
    legs = -np.where(row > column, np.sqrt((2 * row + 1) * (2 * column + 1)), (row == column) * (row + 1))
    half = np.sqrt(np.arange(16) + 0.5)
    w, V, b = hippo_normal(16)
    np.testing.assert_allclose(V @ np.diag(-0.5 + 1j * w) @ V.conj().T - np.outer(half, half), legs, atol=1e-12)
    np.testing.assert_allclose(V @ b, np.sqrt(2 * np.arange(16) + 1), atol=1e-12)
    frequencies, weights = initial_frequencies("legs", 16)
    np.testing.assert_allclose(frequencies, np.sort(np.abs(w))[::2][::-1])
    np.testing.assert_allclose(weights, np.minimum(np.abs(b[:8]), 2))


@pytest.mark.parametrize("kind", ["zoh", "bilinear"])
def test_s5_is_its_recurrence(kind: str):
    mixer = S5(DIM, states=8, blocks=2, discretization=kind, causal=False)
    variables, x = drawn(mixer), normal(9, BATCH, TIME, DIM)
    times = np.random.default_rng(1).uniform(0.2, 3, (BATCH, TIME))
    p = double(variables)
    system = np.minimum(p["real"], -1e-4) + 1j * p["imaginary"]
    B, C, u = pair(p["B"]), pair(p["C"]), np.asarray(x, np.float64)
    wanted = p["D"] * u
    for way in range(2):
        state = np.zeros((BATCH, system.size), complex)
        for t in range(TIME) if way == 0 else reversed(range(TIME)):
            decay, scale = discrete(kind, system, times[:, t, None] * np.exp(p["log_step"]))
            state = decay * state + scale * (u[:, t] @ B.T)
            wanted[:, t] += 2 * (state @ C[way].T).real
    close(run(mixer, variables, x, "filtered", times=jnp.asarray(times, jnp.float32)), wanted)
    gated = gelu(wanted) * sigmoid(gelu(wanted) @ p["gate"]["kernel"] + p["gate"]["bias"])
    close(run(mixer, variables, x, times=jnp.asarray(times, jnp.float32)), gated)


def test_half_of_the_conjugate_pairs_is_all_of_them():
    half, whole = (S5(DIM, states=8, blocks=2, conjugate=each) for each in (True, False))
    variables, x = drawn(half), normal(9, BATCH, TIME, DIM)
    p = dict(variables["params"])
    sign = jnp.array([1.0, -1.0])  # conjugates a pair
    p["imaginary"] = jnp.concatenate([p["imaginary"], -p["imaginary"]])
    p |= {name: jnp.tile(p[name], 2) for name in ("real", "log_step")}
    p |= {"B": jnp.concatenate([p["B"], p["B"] * sign]), "C": jnp.concatenate([p["C"], p["C"] * sign], axis=2)}
    close(run(whole, {"params": p}, x), run(half, variables, x))


@pytest.mark.parametrize("name", ["s4d", "s5"])
@pytest.mark.parametrize("causal", [True, False])
def test_no_time_passes_at_tokens_that_are_not_there(name: str, causal: bool):
    mixer = create_mixer(name, DIM, states=8, causal=causal, **({"blocks": 2} if name == "s5" else {}))
    variables, x = drawn(mixer), normal(9, BATCH, TIME, DIM)
    there = np.random.default_rng(2).random(TIME) < 0.6
    got = run(mixer, variables, x, mask=jnp.broadcast_to(jnp.asarray(there), (BATCH, TIME)))
    close(got[:, there], run(mixer, variables, x[:, there]))


def test_mamba_is_its_definition():
    mixer = Mamba(DIM, states=4)
    variables, x = drawn(mixer), normal(9, BATCH, TIME, DIM)
    p = double(variables)
    inner = np.asarray(x, np.float64) @ p["input"]["kernel"]
    padded = np.pad(inner, ((0, 0), (3, 0), (0, 0)))
    u = sum(p["convolution"]["kernel"][j] * padded[:, j : j + TIME] for j in range(4)) + p["convolution"]["bias"]
    u = u * sigmoid(u)
    step, B, C = np.split(u @ p["selection"]["kernel"], [1, 5], axis=-1)
    step = softplus(step @ p["step_map"]["kernel"] + p["step_bias"])
    A, state, ys = -np.exp(p["A_log"]), np.zeros((BATCH, 2 * DIM, 4)), []
    for t in range(TIME):
        state = np.exp(step[:, t, :, None] * A) * state + (step * u)[:, t, :, None] * B[:, t, None]
        ys.append(np.sum(state * C[:, t, None], axis=-1) + p["D"] * u[:, t])
    z = np.asarray(x, np.float64) @ p["gate"]["kernel"]
    close(run(mixer, variables, x), (np.stack(ys, axis=1) * z * sigmoid(z)) @ p["out"]["kernel"])


@pytest.mark.parametrize(
    ("dim", "layers", "parameters"),
    [(768, 24, 129_135_360), (1024, 48, 371_516_416), (2560, 64, 2_768_345_600)],  # mamba-130m, -370m, -2.8b
)
def test_published_mambas_have_these_sizes(dim: int, layers: int, parameters: int):
    """Mixers and a norm for each layer, a last norm, and 50,280 embeddings that the read-out shares."""
    shapes = jax.eval_shape(Mamba(dim).init, jax.random.key(0), jnp.zeros((1, 4, dim)))
    mixer = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert layers * (mixer + dim) + dim + 50_280 * dim == parameters


def test_mamba_starts_with_steps_in_their_range():
    mixer = Mamba(256)
    start = nn.unbox(jax.jit(mixer.init, compiler_options=QUICK)(jax.random.key(0), jnp.zeros((1, 4, 256))))["params"]
    steps = softplus(np.asarray(start["step_bias"], np.float64))
    assert 1e-3 * 0.999 <= steps.min() < 1.1e-3
    assert 0.09 < steps.max() <= 0.1 * 1.001
    assert abs(np.log10(steps).mean() + 2) < 0.1  # log-uniform
    np.testing.assert_allclose(np.exp(start["A_log"]), np.broadcast_to(np.arange(1, 17), (512, 16)), rtol=1e-6)


@pytest.mark.parametrize("real", [True, False])
def test_rg_lru_is_its_definition(real: bool):
    mixer = RGLRU(DIM, heads=2, features=8, real=real)
    variables, x = drawn(mixer), normal(9, BATCH, TIME, DIM)
    p = double(variables)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ p[name]["kernel"] + p[name]["bias"]

    def blocks(x: np.ndarray, name: str) -> np.ndarray:
        parts = zip(np.split(x, 2, axis=-1), p[name]["kernel"], p[name]["bias"], strict=True)
        return np.concatenate([part @ kernel + bias for part, kernel, bias in parts], axis=-1)

    token = np.asarray(x, np.float64)
    padded = np.pad(linear(token, "input"), ((0, 0), (3, 0), (0, 0)))
    u = sum(p["convolution"]["kernel"][j] * padded[:, j : j + TIME] for j in range(4)) + p["convolution"]["bias"]
    r, i = sigmoid(blocks(u, "decay_gate")), sigmoid(blocks(u, "input_gate"))
    log_decay = -8 * r * softplus(p["decay"])
    root = np.sqrt(1 - np.exp(2 * log_decay))
    root[:, 0] = 1
    if not real:
        u = u[..., :4] + 1j * u[..., 4:]
        log_decay = log_decay + 1j * r * p["angle"]
    state, states = np.zeros(u[:, 0].shape, u.dtype), []
    for t in range(TIME):
        state = np.exp(log_decay[:, t]) * state + (root * i * u)[:, t]
        states.append(state)
    hidden = np.stack(states, axis=1)
    hidden = hidden if real else np.concatenate([hidden.real, hidden.imag], axis=-1)
    close(run(mixer, variables, x), linear(gelu(linear(token, "gate")) * hidden, "out"))


def test_rg_lru_starts_with_radii_in_a_ring():
    mixer = RGLRU(768)
    start = nn.unbox(jax.jit(mixer.init, compiler_options=QUICK)(jax.random.key(0), jnp.zeros((1, 4, 768))))["params"]
    assert start["decay"].shape == (1024,)  # 4/3 · D
    radii = np.exp(-softplus(np.asarray(start["decay"], np.float64)))
    assert radii.min() >= 0.9 * 0.9999
    assert radii.max() <= 0.999 * 1.0001
    assert abs(np.mean(radii**2) - (0.9**2 + 0.999**2) / 2) < 0.005  # uniform in area


def test_a_row_padded_on_the_left_is_the_row():
    """The first token that is there enters whole, as that of a row without padding."""
    mixer = RGLRU(DIM, heads=2, features=8)
    variables, x = drawn(mixer), normal(9, BATCH, TIME, DIM)
    there = jnp.broadcast_to(jnp.arange(TIME) >= 5, (BATCH, TIME))
    close(run(mixer, variables, x, mask=there)[:, 5:], run(mixer, variables, x[:, 5:]))


def test_the_gradient_of_the_root_is_bounded():
    x = jnp.array([0.0, 1e-12, 2.5e-7, 1e-2, 0.81])
    np.testing.assert_allclose(bounded_sqrt(x), np.sqrt(x))
    np.testing.assert_allclose(jax.vmap(jax.grad(bounded_sqrt))(x), [1000, 1000, 1000, 5, 0.5 / 0.9], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("s4d", {"states": 7}, "s4d: states: got 7, wanted an even number of them"),
        ("s4d", {"frequencies": "hippo"}, "s4d: frequencies are lin, inv or legs, got 'hippo'"),
        ("s4d", {"discretization": "euler"}, "discretization is zoh or bilinear, got 'euler'"),
        ("s4d", {"steps": (0.1, 0.01)}, r"s4d: steps \(0.1, 0.01\), rate 1.0: wanted 0 < smallest <= largest"),
        ("s5", {"states": 8, "blocks": 8}, "s5: 8 states do not divide into 8 blocks of conjugate pairs"),
        ("s5", {"blocks": 1, "negative": "relu"}, "s5: negative is clip or exp, got 'relu'"),
        ("s5", {"blocks": 1, "rate": 0.0}, "rate 0.0: wanted 0 < smallest <= largest and 0 < rate"),
        ("s5", {"blocks": 1, "discretization": "euler"}, "discretization is zoh or bilinear, got 'euler'"),
        ("mamba", {"steps": (0.0, 0.1)}, r"mamba: steps: got \(0.0, 0.1\), wanted 0 < smallest <= largest"),
        ("rg_lru", {"heads": 3, "features": 8}, "rg_lru: features: got 8, wanted a multiple of 3"),
        ("rg_lru", {"heads": 4, "features": 12, "real": False}, "rg_lru: features: got 12, wanted a multiple of 8"),
        ("rg_lru", {"heads": 0}, "rg_lru: heads: got 0, wanted at least 1"),
        ("rg_lru", {"heads": 2, "radius": 1.0}, "rg_lru: radius: got 1.0, wanted more than 0 and less than 0.999"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(create_mixer(name, DIM, **options).init, jax.random.key(0), normal(0, BATCH, TIME, DIM))
