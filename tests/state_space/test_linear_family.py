"""What is particular to the mixers that add to a matrix of associations or correct it."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.delta_rule import delta_rule
from kernels.linear_attention import linear_attention
from zoo.errors import ZooError
from zoo.layers.mixer import create_mixer
from zoo.state_space.deltanet import DeltaNet
from zoo.state_space.gated_deltanet import GatedDeltaNet
from zoo.state_space.gla import GLA
from zoo.state_space.kda import KDA
from zoo.state_space.mamba2 import Mamba2
from zoo.state_space.retention import Retention

QUICK = {"xla_backend_optimization_level": 0}
DIM, BATCH, LENGTH, HEADS = 16, 2, 12, 2


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def parameters(mixer: Any) -> Any:
    """Drawn as they are, then moved, so that zeros and ones do not hide a slip."""
    x = jnp.zeros((BATCH, LENGTH, DIM))
    drawn = nn.unbox(jax.jit(mixer.init, compiler_options=QUICK)(jax.random.key(0), x))["params"]
    leaves, tree = jax.tree.flatten(drawn)
    return jax.tree.unflatten(tree, [leaf + 0.1 * jnp.float32(normal(n, *leaf.shape)) for n, leaf in enumerate(leaves)])


def run(mixer: Any, weights: Any, x: np.ndarray) -> np.ndarray:
    apply = jax.jit(lambda weights, x: mixer.apply({"params": weights}, x), compiler_options=QUICK)
    return np.asarray(apply(weights, jnp.float32(x)))


def close(got: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def heads_of(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return np.einsum("btd,dhk->bthk", x, kernel)


def read_out(read: np.ndarray, x: np.ndarray, weights: Any) -> np.ndarray:
    """Norm, swish gate and projection."""
    normed = read / np.sqrt(np.mean(read**2, -1, keepdims=True) + 1e-5) * weights["norm"]["scale"]
    return np.einsum("bthv,hvd->btd", normed * silu(heads_of(x, weights["gating"]["kernel"])), weights["out"]["kernel"])


def memory(q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, beta: np.ndarray | None) -> np.ndarray:
    """The recurrence token by token, as the papers write it; decay [B, T, H, 1 or K], additive without beta."""
    state, out = np.zeros((*q[:, 0].shape, v.shape[-1])), []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state
        error = (
            v[:, t] if beta is None else beta[:, t, :, None] * (v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t]))
        )
        state = state + k[:, t, :, :, None] * error[:, :, None]
        out.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]) / np.sqrt(q.shape[-1]))
    return np.stack(out, 1)


def test_gated_linear_attention_is_its_recurrence():
    mixer = GLA(DIM, heads=HEADS, rank=4)
    weights, x = parameters(mixer), normal(1, BATCH, LENGTH, DIM)
    w = jax.tree.map(np.float64, weights)
    q, k, v = (heads_of(x, w["project"][name]["kernel"]) for name in ("query", "key", "value"))
    up = w["decay"]["up"]
    logit = np.einsum("btr,rhk->bthk", x @ w["decay"]["down"]["kernel"], up["kernel"]) + up["bias"]
    close(run(mixer, weights, x), read_out(memory(q, k, v, sigmoid(logit) ** (1 / 16), None), x, w["read_out"]))


def test_gated_deltanet_is_its_recurrence():
    mixer = GatedDeltaNet(DIM, heads=HEADS, negative_eigenvalues=True)
    weights, x = parameters(mixer), normal(1, BATCH, LENGTH, DIM)
    w = jax.tree.map(np.float64, weights)
    parts = []
    for n, name in enumerate(("query", "key", "value")):
        part = heads_of(x, w["project"][name]["kernel"])
        kernel = w["project"][f"convolutions_{n}"]["kernel"].reshape(4, *part.shape[2:])
        padded = np.pad(part, ((0, 0), (3, 0), (0, 0), (0, 0)))
        parts.append(silu(sum(padded[:, lag : lag + LENGTH] * kernel[lag] for lag in range(4))))
    q, k, v = parts
    q, k = (part / np.sqrt(np.sum(part**2, -1, keepdims=True) + 1e-6) for part in (q, k))
    beta = 2 * sigmoid(x @ w["strength"]["kernel"])
    step = np.log1p(np.exp(x @ w["fading"]["kernel"] + w["step_bias"]))
    decay = np.exp(-np.exp(w["A_log"]) * step)[..., None]
    close(run(mixer, weights, x), read_out(memory(q, k, v, decay, beta), x, w["read_out"]))


@pytest.mark.parametrize("causal", [True, False])
def test_retention_is_products_weighted_by_distance(causal: bool):
    mixer = Retention(DIM, heads=HEADS, rotary=False, causal=causal)
    weights, x = parameters(mixer), normal(1, BATCH, LENGTH, DIM)
    w = jax.tree.map(np.float64, weights)
    q, k, v = (heads_of(x, w["project"][name]["kernel"]) for name in ("query", "key", "value"))
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    weight = (1 - 2.0 ** (-5 - np.arange(HEADS)))[:, None, None] ** np.abs(distance)
    if causal:
        weight = np.where(distance >= 0, weight, 0)
    read = np.einsum("bthk,bshk,hts,bshv->bthv", q, k, weight, v) / np.sqrt(DIM / HEADS)
    close(run(mixer, weights, x), read_out(read, x, w["read_out"]))


def test_decays_of_retention():
    retnet = Retention(DIM, heads=4).log_decay()
    np.testing.assert_allclose(np.exp(retnet), [31 / 32, 63 / 64, 127 / 128, 255 / 256], rtol=1e-6)
    lightning = [Retention(DIM, heads=4, decay="lightning", layer=layer, layers=4).log_decay() for layer in (0, 3)]
    np.testing.assert_allclose(lightning[0], [0, -2, -4, -6])
    np.testing.assert_allclose(lightning[1], [0, -0.5, -1, -1.5])


@pytest.mark.slow
def test_ssd_is_its_masked_attention():
    """M = tril(C Bᵀ ⊙ exp(segsum(Δ A))), y = M (Δ x): 2405.21060, §6."""
    x, B, C = normal(0, BATCH, LENGTH, 4, 3), normal(1, BATCH, LENGTH, 2, 5), normal(2, BATCH, LENGTH, 2, 5)
    delta, A = np.abs(normal(3, BATCH, LENGTH, 4)), -np.abs(normal(4, 4))
    got, _ = linear_attention(
        *map(jnp.float32, (C, B, delta[..., None] * x)), log_decay=jnp.float32(delta * A), scale=1.0
    )
    sums = np.cumsum(delta * A, axis=1)
    segsum = sums[:, :, None] - sums[:, None]  # of the steps after j up to i
    decay = np.where(np.tri(LENGTH, dtype=bool)[..., None], np.exp(np.minimum(segsum, 0)), 0)
    M = np.einsum("bign,bjgn->bijg", C, B).repeat(2, axis=-1) * decay
    close(got, np.einsum("bijh,bjh,bjhp->bihp", M, delta, x))


def test_mamba2_keeps_steps_within_limits():
    mixer = Mamba2(DIM, heads=HEADS, states=4, step_limits=(0.01, 0.02))
    weights = parameters(mixer)
    delta = mixer.apply({"params": weights}, jnp.float32(3 * normal(1, 50, DIM)), method="_delta")
    np.testing.assert_allclose([delta.min(), delta.max()], [0.01, 0.02], rtol=1e-6)


@pytest.mark.slow
def test_gated_deltanet_that_forgets_nothing_is_deltanet():
    gated = GatedDeltaNet(DIM, heads=HEADS, expand_key=1.0, expand_value=1.0, gate="none")
    weights, x = parameters(gated), normal(1, BATCH, LENGTH, DIM)
    plain = {name: weights[name] for name in ("project", "strength", "read_out")}
    still = weights | {"A_log": jnp.full(HEADS, -1e3)}
    close(run(gated, still, x), run(DeltaNet(DIM, heads=HEADS), plain, x), 1e-6)


@pytest.mark.slow
def test_kda_whose_channels_fade_alike_is_gated_deltanet():
    gated = GatedDeltaNet(DIM, heads=HEADS, expand_key=1.0, expand_value=1.0, gate="none")
    kda = KDA(DIM, heads=HEADS, gate="none")
    weights, x = parameters(gated), normal(1, BATCH, LENGTH, DIM)
    width = DIM // HEADS
    # The first of the rank's numbers are the heads' decays, which all of a head's channels share.
    down = jnp.pad(weights["fading"]["kernel"], ((0, 0), (0, width - HEADS)))
    up = jnp.broadcast_to(jnp.eye(width, HEADS)[..., None], (width, HEADS, width))
    shared = weights | {
        "fading": {"down": {"kernel": down}, "up": {"kernel": up}},
        "step_bias": jnp.broadcast_to(weights["step_bias"][:, None], (HEADS, width)),
    }
    close(run(kda, shared, x), run(gated, weights, x))


@pytest.mark.slow
def test_bounded_decays_of_kda():
    mixer = KDA(DIM, heads=HEADS, lowest_decay=-5.0)
    assert not nn.unbox(mixer.init(jax.random.key(0), jnp.zeros((1, 1, DIM))))["params"]["A_log"].any()
    weights, x = parameters(mixer), 30 * normal(1, 50, DIM)
    decay = np.asarray(mixer.apply({"params": weights}, jnp.float32(x), method="log_decay"))
    w = jax.tree.map(np.float64, weights)
    step = np.einsum("tr,rhk->thk", x @ w["fading"]["down"]["kernel"], w["fading"]["up"]["kernel"]) + w["step_bias"]
    close(decay, -5 * sigmoid(np.exp(w["A_log"])[:, None] * step), 1e-4)
    assert decay.min() < -4.9


@pytest.mark.parametrize("mixer", [GatedDeltaNet(128, heads=32), KDA(128, heads=32), Mamba2(128, heads=32, states=4)])
def test_initial_rates_and_steps(mixer: Any):
    drawn = nn.unbox(jax.jit(mixer.init, compiler_options=QUICK)(jax.random.key(0), jnp.zeros((1, 4, 128))))["params"]
    rate, step = np.exp(drawn["A_log"]), np.log1p(np.exp(drawn["step_bias"]))
    lowest = 1e-3 if isinstance(mixer, GatedDeltaNet) else 1.0
    assert lowest <= rate.min() < 4 < 12 < rate.max() <= 16.001
    assert 9.9e-4 < step.min() < 4e-3 < 0.03 < step.max() < 0.1001


def recall_errors(keys: np.ndarray, values: np.ndarray, corrected: bool) -> np.ndarray:
    """Relative error of each value that its key brings back after all were stored."""
    k, v = (jnp.float32(each)[None, :, None] for each in (keys, values))
    if corrected:
        _, state = delta_rule(k, k, v, jnp.ones(k.shape[:3]), scale=1.0)
    else:
        _, state = linear_attention(k, k, v, scale=1.0)
    back = keys @ np.float64(state[0, 0])
    return np.linalg.norm(back - values, axis=-1) / np.linalg.norm(values, axis=-1)


@pytest.mark.slow
def test_capacity_of_what_is_added_and_of_what_is_corrected():
    """Card 1.1: n associations of width K. Adding them lets them interfere as √(n / K); correcting stores K exactly."""
    width = 16
    directions, _ = np.linalg.qr(normal(0, width, width))
    values = normal(1, 8 * width, width)
    for corrected in (False, True):
        assert recall_errors(directions, values[:width], corrected).max() < 1e-4
    # A key that comes back with another value: corrected, the new one replaces the old; added, both come back.
    keys, both = np.concatenate([directions, directions]), values[: 2 * width]
    assert recall_errors(keys, both, True)[width:].max() < 1e-4
    assert recall_errors(keys, both, False)[width:].min() > 0.3

    def random_keys(count: int) -> float:
        keys = normal(2, count, width)
        return float(np.mean(recall_errors(keys / np.linalg.norm(keys, axis=-1, keepdims=True), values[:count], False)))

    # Two random unit keys have a product of about K^-½, so n − 1 others come back with √((n − 1) / K) of a value.
    few, full, many = random_keys(2), random_keys(width), random_keys(8 * width)
    assert few < 0.7
    assert 0.8 < full < 1.2
    assert 2.4 < many < 3.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(GLA, 32, heads=5),
            "gla: dim 32, 5 heads, expand_key 0.5 and expand_value 2.0 give heads of 3.2 and 6.4",
        ),
        (partial(GLA, 32, gate="tanh"), "gate is silu, sigmoid or none, got 'tanh'"),
        (partial(Retention, 32, decay="slow"), "retention: decay is retnet or lightning, got 'slow'"),
        (partial(Retention, 32, layer=4, layers=4), "retention: got layer 4 of 4, wanted one of 0 to 3"),
        (
            partial(DeltaNet, 32, heads=4, value_heads=6),
            "DeltaNet: got 6 value_heads, wanted a multiple of the 4 heads",
        ),
        (partial(KDA, 32, lowest_decay=-6.0), "KDA: lowest_decay: got -6.0, wanted at least -5 and below 0"),
        (partial(Mamba2, 32, heads=4, groups=3), "mamba2: 4 heads do not divide into 3 groups"),
        (partial(Mamba2, 32, heads=3), "mamba2: dim 64 does not divide into 3 heads"),
        (partial(Mamba2, 32, steps=(0.1, 0.01)), r"mamba2: steps: got \(0.1, 0.01\), wanted 0 < smallest <= largest"),
    ],
)
def test_wrong_options_are_named(make: Any, message: str):
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(make().init, jax.random.key(0), jnp.zeros((1, 4, 32)))


def test_sizes_at_the_papers_width():
    """Heads and parameters by default at D = 2048: fla's GatedDeltaNet has 6 of K = 256, its KDA 16 of 128."""
    sizes = {name: create_mixer(name, 2048) for name in ("gated_deltanet", "kda", "deltanet", "mamba2", "retention")}
    assert sizes["gated_deltanet"].sizes() == (6, 6, 256, 512)
    assert sizes["kda"].sizes() == (16, 16, 128, 128)
    assert sizes["deltanet"].sizes() == (4, 4, 512, 512)
    assert sizes["mamba2"].head_total() == 64
    assert sizes["retention"].sizes() == (8, 256, 512)
    shapes = jax.eval_shape(sizes["gated_deltanet"].init, jax.random.key(0), jnp.zeros((1, 1, 2048)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert abs(count / 2048**2 - 6) < 0.02
