"""LightNet's additive recurrence, its grids and its positions against their definitions."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.state_space.lightnet import MDTPE, LightNet, logsumexp, running_logsumexp, turned

QUICK = {"xla_backend_optimization_level": 0}
DIM, BATCH, LENGTH, HEADS = 16, 2, 12, 2


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def parameters(module: Any, length: int = LENGTH) -> Any:
    """Drawn as they are, then moved, so that ones do not hide a slip."""
    x = jnp.zeros((BATCH, length, DIM))
    drawn = nn.unbox(jax.jit(module.init, compiler_options=QUICK)(jax.random.key(0), x))["params"]
    leaves, tree = jax.tree.flatten(drawn)
    return jax.tree.unflatten(tree, [leaf + 0.1 * jnp.float32(normal(n, *leaf.shape)) for n, leaf in enumerate(leaves)])


def run(module: Any, weights: Any, x: np.ndarray, **options: Any) -> np.ndarray:
    apply = jax.jit(lambda weights, x: module.apply({"params": weights}, x, **options), compiler_options=QUICK)
    return np.asarray(apply(weights, jnp.float32(x)))


def close(got: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def defined(mixer: LightNet, weights: Any, x: np.ndarray) -> np.ndarray:
    """Every token's keys through a softmax over time, channel by channel, in float64, and what follows in the layer."""
    w = jax.tree.map(np.float64, weights)
    q, k, v = (np.einsum("btd,dhk->bthk", x, w["project"][name]["kernel"]) for name in ("query", "key", "value"))
    read = np.zeros_like(v)
    for t in range(x.shape[1]):
        seen = t + 1 if mixer.causal else x.shape[1]
        weight = np.exp(k[:, :seen])
        total = weight.sum(1, keepdims=True) + mixer.start_at_one
        read[:, t] = np.einsum("bhk,bshk,bshv->bhv", silu(q[:, t]), weight / total, v[:, :seen])
    read = read.reshape(*x.shape)
    normed = read / np.sqrt(np.mean(read**2, -1, keepdims=True) + 1e-5) * w["read_out"]["norm"]["scale"]
    gating = w["read_out"]["gating"]
    gate = silu(np.einsum("btr,rhk->bthk", x @ gating["down"]["kernel"], gating["up"]["kernel"]).reshape(x.shape))
    return (normed * gate) @ w["read_out"]["out"]["kernel"].reshape(DIM, DIM)


@pytest.mark.parametrize(("causal", "start_at_one"), [(True, False), (True, True), (False, False)])
def test_is_a_softmax_of_keys_over_time(causal: bool, start_at_one: bool):
    mixer = LightNet(DIM, heads=HEADS, rank=4, causal=causal, start_at_one=start_at_one)
    weights, x = parameters(mixer), normal(1, BATCH, LENGTH, DIM)
    close(run(mixer, weights, x), defined(mixer, weights, x))


def test_large_keys_neither_overflow_nor_vanish():
    """exp of keys of ±200 is no float32, nor a difference of such a sum from the one before."""
    mixer = LightNet(DIM, heads=HEADS, rank=4)
    weights, x = parameters(mixer), normal(1, BATCH, LENGTH, DIM)
    key = weights["project"]["key"]["kernel"]
    weights = weights | {"project": weights["project"] | {"key": {"kernel": key * 100}}}
    wanted = defined(mixer, weights, x)
    assert np.isfinite(wanted).all()
    close(run(mixer, weights, x), wanted, 1e-4)


@pytest.mark.slow
def test_log_sums_start_again_with_a_segment():
    x, ids = normal(0, 1, 6, 1, 2), np.array([[4, 4, 4, 1, 1, 4]])
    running, total = np.zeros_like(x), np.zeros_like(x)
    for first, last in ((0, 3), (3, 5), (5, 6)):
        part = np.exp(x[:, first:last])
        running[:, first:last], total[:, first:last] = np.log(np.cumsum(part, 1)), np.log(part.sum(1, keepdims=True))
    close(running_logsumexp(jnp.float32(x), jnp.asarray(ids)), running, 1e-6)
    close(logsumexp(jnp.float32(x), jnp.asarray(ids)), total, 1e-6)


@pytest.mark.slow
def test_tokens_that_are_not_there_leave_no_trace():
    """Also the first ones, before which there is nothing whose logarithm could be taken."""
    mixer = LightNet(DIM, heads=HEADS, rank=4)
    weights, x = parameters(mixer), normal(1, 1, 6, DIM)
    mask = jnp.asarray([[False, False, True, True, False, True]])
    kept = np.asarray(mask)[0]

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(mixer.apply({"params": weights}, x, mask=mask) ** 2, where=mask[..., None])

    close(run(mixer, weights, x, mask=mask)[:, kept], run(mixer, weights, x[:, kept]))
    gradient = np.asarray(jax.jit(jax.grad(total), compiler_options=QUICK)(jnp.float32(x)))
    assert np.isfinite(gradient).all()
    assert not gradient[:, ~kept].any()


def test_turned_products_depend_on_differences_of_places():
    q, k = (np.broadcast_to(normal(n, 1, 1, 2, 5), (1, 3, 2, 5)) for n in range(2))
    rates = normal(2, 2, 3)
    near, far = (
        turned(jnp.float32(each), jnp.asarray([places]), jnp.float32(rates))
        for each, places in ((q, [(3, 1), (7, 6), (0, 2)]), (k, [(1, 4), (5, 9), (0, 2)]))
    )
    products = np.einsum("bthk,bthk->th", near, far)
    close(products[1], products[0])
    # 2405.21022 and xopes: the first five of the six angles of a head.
    angle = np.concatenate([2 * rates, -3 * rates], -1)[:, :5]
    close(products[0], np.sum(q[0, 0] * k[0, 0] * np.cos(angle), -1))
    close(products[2], np.sum(q[0, 0] * k[0, 0], -1))


def test_positions_of_a_grid_are_those_of_its_axes_summed():
    module = MDTPE(DIM, HEADS, grid=(3, 4), prefix=2, causal=False)
    weights, x = parameters(module, 14), normal(1, BATCH, 14, DIM)
    w = jax.tree.map(np.float64, weights)
    grid = x[:, 2:].reshape(BATCH, 3, 4, HEADS, -1)
    wanted = 0.0
    for axis in range(2):
        own = w[f"axes_{axis}"]
        size = grid.shape[1 + axis]
        distance = np.abs(np.arange(size)[:, None] - np.arange(size))
        weight = (1 / (1 + np.exp(-own["decay"])))[:, None, None] ** distance
        weight = weight * np.sum(own["query"] * own["key"], -1)[:, None, None]
        y = np.einsum(("hij,bjwhv->biwhv", "hij,bwjhv->bwihv")[axis], weight, grid).reshape(BATCH, 12, DIM)
        normed = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-5) * own["read_out"]["norm"]["scale"]
        wanted = wanted + normed @ own["read_out"]["out"]["kernel"].reshape(DIM, DIM)
    got = run(module, weights, x)
    close(got[:, 2:], wanted)
    assert not got[:, :2].any()


def test_a_grid_without_positions_has_no_order():
    """One pass over all tokens, whatever the grid: to move them moves what comes out, and no more."""
    mixer = LightNet(DIM, heads=HEADS, rank=4, causal=False, grid=(3, 4))
    weights, x, order = parameters(mixer), normal(1, BATCH, LENGTH, DIM), np.random.default_rng(2).permutation(LENGTH)
    close(run(mixer, weights, x[:, order]), run(mixer, weights, x)[:, order])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(LightNet, DIM, grid=(3, 4)), r"lightnet: grid \(3, 4\) has no order in time, wanted causal=False"),
        (partial(LightNet, DIM, causal=False, prefix=2), "lightnet: got a prefix of 2 tokens and no grid after it"),
        (
            partial(LightNet, DIM, causal=False, grid=(3, 4), prefix=1),
            r"lightnet: grid \(3, 4\) after 1 tokens has not the 12 places of the input",
        ),
        (partial(LightNet, DIM, heads=3), "lightnet: dim 16 does not divide into 3 heads"),
    ],
)
def test_wrong_options_are_named(make: Any, message: str):
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(make().init, jax.random.key(0), jnp.zeros((1, LENGTH, DIM)))
