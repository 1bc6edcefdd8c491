"""L2ViT's two attentions are what its paper writes, its sizes those it prints, and its global attention linear."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from zoo.attention.local_global_linear import VARIANTS, GlobalLinear, GridConvolution, L2ViT, LocalWindow
from zoo.errors import ZooError
from zoo.layers.backbone import Backbone
from zoo.layers.mixer import create_mixer

QUICK = {"xla_backend_optimization_level": 0}
DIM, HEADS, GRID = 8, 2, (5, 4)
LENGTH = GRID[0] * GRID[1]


def drawn(mixer: nn.Module, *args: Any) -> Any:
    """Variables of float64 values that are neither zeros nor ones."""
    variables = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), *map(jnp.asarray, args)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: 0.5 + 0.3 * rng.standard_normal(leaf.shape), variables)


def applied(mixer: nn.Module, variables: Any, *args: Any, **options: Any) -> np.ndarray:
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)
    first, *others = args
    options = {name: jnp.asarray(array) for name, array in options.items()}

    @partial(jax.jit, compiler_options=QUICK)
    def apply(variables: Any, x: jax.Array) -> jax.Array:
        return mixer.apply(variables, x, *others, **options)

    return np.asarray(apply(rounded, jnp.asarray(first, jnp.float32)))


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


def tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[1, T, D], ids of two segments and which are there."""
    x = np.random.default_rng(2).standard_normal((1, LENGTH, DIM)).astype(np.float32)
    return x, (np.arange(LENGTH) >= 9)[None].astype(np.int32), np.arange(LENGTH)[None] % 7 != 3


def neighbours(x: np.ndarray, parameters: Any, ids: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The depthwise convolution [T, D], place by place."""
    kernel = parameters["kernel"]
    half = kernel.shape[0] // 2
    out = np.zeros(x.shape)
    for p in range(LENGTH):
        for n in range(LENGTH):
            dy, dx = n // GRID[1] - p // GRID[1], n % GRID[1] - p % GRID[1]
            if max(abs(dy), abs(dx)) <= half and ids[p] == ids[n] and there[n]:
                out[p] += kernel[dy + half, dx + half] * x[n]
    return out + parameters["bias"]


def projected(x: np.ndarray, parameters: Any, name: str) -> np.ndarray:
    return np.einsum("td,dhk->thk", x, parameters[name]["kernel"]) + parameters[name]["bias"]


def layer_norm(x: np.ndarray, parameters: Any) -> np.ndarray:
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normal * parameters["scale"] + parameters["bias"]


def test_window_attention_is_its_definition():
    mixer = LocalWindow(DIM, grid=GRID, heads=HEADS, window=3)
    x, ids, there = tokens()
    variables = drawn(mixer, x)
    own = variables["params"]
    placed = x[0] + neighbours(x[0], own["around"], ids[0], there[0])
    q, k, v = (projected(placed, own, name) for name in ("query", "key", "value"))
    wanted = np.zeros((LENGTH, HEADS, DIM // HEADS))
    for t in range(LENGTH):
        y, z = t // GRID[1], t % GRID[1]
        near = [j for j in range(LENGTH) if (j // GRID[1] // 3, j % GRID[1] // 3) == (y // 3, z // 3)]
        near = [j for j in near if ids[0, j] == ids[0, t] and there[0, j]]
        for h in range(HEADS):
            p = np.exp(k[near, h] @ q[t, h] / np.sqrt(DIM // HEADS))
            wanted[t, h] = (p / p.sum()) @ v[near, h] if near else 0
    out = np.einsum("thk,hkd->td", wanted, own["out"]["kernel"]) + own["out"]["bias"]
    close(applied(mixer, variables, x, segment_ids=ids, mask=there)[0], out)


@pytest.mark.parametrize("clamp", [1.0, 1e4])
def test_global_attention_is_its_definition(clamp: float):
    mixer = GlobalLinear(DIM, grid=GRID, heads=HEADS, clamp=clamp, concentrate=3)
    x, ids, there = tokens()
    variables = drawn(mixer, x)
    own, statistics = variables["params"], variables["batch_stats"]["concentration"]["norm"]
    placed = x[0] + neighbours(x[0], own["around"], ids[0], there[0])
    q, k, v = (projected(placed, own, name) for name in ("query", "key", "value"))
    weight = np.einsum("thk,jhk->htj", np.maximum(q, 0), np.maximum(k, 0))
    weight *= (ids[0][:, None] == ids[0]) & there[0]
    weight /= np.maximum(weight.sum(-1, keepdims=True), clamp)
    y = np.einsum("htj,jhk,h->thk", weight, v, own["temperature"])
    y = np.einsum("thk,hkd->td", y, own["out"]["kernel"]) + own["out"]["bias"]

    near = own["concentration"]
    z = neighbours(layer_norm(placed + y, own["norm"]), near["first"], ids[0], there[0])
    z = z * (1 + erf(z / np.sqrt(2))) / 2
    z = (z - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * near["norm"]["scale"] + near["norm"]["bias"]
    wanted = y + neighbours(z, near["second"], ids[0], there[0])
    close(applied(mixer, variables, x, segment_ids=ids, mask=there)[0], wanted)


def test_statistics_are_those_of_tokens_that_are_there():
    mixer = GlobalLinear(DIM, grid=GRID, heads=HEADS, concentrate=3, position=0)
    x, _, there = tokens()
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), drawn(mixer, x))

    def statistics(x: np.ndarray) -> Any:
        given = {"mask": jnp.asarray(there), "train": True}
        _, updates = mixer.apply(variables, jnp.asarray(x), **given, mutable=["batch_stats"])
        return updates["batch_stats"]["concentration"]["norm"]

    moved = statistics(x)
    again = statistics(np.where(there[..., None], x, 50))
    before = variables["batch_stats"]["concentration"]["norm"]
    assert np.abs(moved["mean"] - before["mean"]).max() > 1e-3
    np.testing.assert_allclose(moved["mean"], again["mean"], rtol=1e-5)
    np.testing.assert_allclose(moved["var"], again["var"], rtol=1e-4)
    # Momentum 0.1: after one batch the running mean is 0.9 of the old and 0.1 of the batch's.
    own = variables["params"]
    q, k, v = (projected(x[0], own, name) for name in ("query", "key", "value"))
    weight = np.einsum("thk,jhk->htj", np.maximum(q, 0), np.maximum(k, 0)) * there[0]
    y = np.einsum("htj,jhk,h->thk", weight / np.maximum(weight.sum(-1, keepdims=True), 100), v, own["temperature"])
    y = np.einsum("thk,hkd->td", y, own["out"]["kernel"]) + own["out"]["bias"]
    z = neighbours(layer_norm(x[0] + y, own["norm"]), own["concentration"]["first"], np.zeros(LENGTH), there[0])
    z = z * (1 + erf(z / np.sqrt(2))) / 2
    np.testing.assert_allclose(moved["mean"], 0.9 * before["mean"] + 0.1 * z[there[0]].mean(0), rtol=1e-4)


def test_statistics_of_each_layer_of_a_backbone_move_in_training():
    options = {"l2vit_global": {"grid": GRID, "position": 0, "concentrate": 3}}
    stack = Backbone(DIM, ("l2vit_global",) * 2, mixer_options=options, mlp="none")
    x = jnp.asarray(tokens()[0])
    variables = nn.unbox(jax.jit(stack.init, compiler_options=QUICK)(jax.random.key(0), x))
    train = jax.jit(partial(stack.apply, train=True, mutable=["batch_stats"]), compiler_options=QUICK)
    moved = jax.tree.leaves(train(variables, x)[1]["batch_stats"])
    for new, old in zip(moved, jax.tree.leaves(variables["batch_stats"]), strict=True):
        assert new.shape == (2, DIM)
        assert np.abs(new - old).max(axis=1).min() > 0


@pytest.mark.parametrize(("variant", "millions"), [("tiny", 29), ("small", 50), ("base", 89), ("base_384", 89)])
def test_sizes_are_those_published(variant: str, millions: int):
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(L2ViT(**VARIANTS[variant]).init, jax.random.key(0), image)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) / 1e6) == millions


@pytest.mark.slow
def test_whole_encoder_learns_from_images_of_any_size():
    model = L2ViT(classes=5, dims=(32, 32), depths=(2, 1), window=3, drop_path=0.2)
    image = jnp.asarray(np.random.default_rng(3).standard_normal((2, 22, 17, 3)), jnp.float32)
    variables = nn.unbox(jax.jit(model.init, compiler_options=QUICK)(jax.random.key(0), image))

    @partial(jax.jit, compiler_options=QUICK)
    def gradient(parameters: Any) -> tuple[Any, Any]:
        def loss(parameters: Any) -> Any:
            given = {"params": parameters, "batch_stats": variables["batch_stats"]}
            scores, new = model.apply(
                given, image, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
            )
            return jnp.sum(jax.nn.log_softmax(scores)[:, 0]), new

        return jax.grad(loss, has_aux=True)(parameters)

    found, _ = gradient(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalWindow(DIM, grid=(3, 4)), r"LocalWindow: grid \(3, 4\) has not the 20 places of the input"),
        (lambda: LocalWindow(DIM, grid=(1, 1, 4, 5)), "wanted at most 3 axes"),
        (lambda: LocalWindow(DIM, window=0), "at least 1 token along each axis, got 0"),
        (lambda: GlobalLinear(DIM, concentrate=4), "has an odd width, got 4"),
        (lambda: create_mixer("l2vit_local", DIM, causal=True), "causal: got True, wanted False"),
    ],
)
def test_bad_options_are_named(make: Any, message: str):
    with pytest.raises(ZooError, match=message):
        jax.eval_shape(make().init, jax.random.key(0), jnp.asarray(tokens()[0]))


def test_convolution_over_three_axes():
    grid, conv = (2, 3, 4), GridConvolution(3, 3, axes=3)
    x = np.random.default_rng(4).standard_normal((1, 24, 3))
    variables = {"params": {"kernel": np.ones((3, 3, 3, 3)), "bias": np.zeros(3)}}
    placed = np.pad(x.reshape(*grid, 3), ((1, 1), (1, 1), (1, 1), (0, 0)))
    wanted = sum(placed[a : a + 2, b : b + 3, c : c + 4] for a in range(3) for b in range(3) for c in range(3))
    close(applied(conv, variables, x, grid), wanted.reshape(1, 24, 3))
    close(applied(conv, variables, x, grid, segment_ids=np.zeros((1, 24), np.int32)), wanted.reshape(1, 24, 3))


@pytest.mark.slow
def test_global_attention_takes_linear_time():
    mixer = GlobalLinear(64, heads=2, concentrate=0, position=0)

    @jax.jit
    def mixed(variables: Any, x: jax.Array) -> jax.Array:
        return mixer.apply(variables, x)

    def seconds(length: int) -> float:
        x = jnp.asarray(np.random.default_rng(5).standard_normal((1, length, 64)), jnp.float32)
        variables = nn.unbox(mixer.init(jax.random.key(0), x))
        mixed(variables, x).block_until_ready()
        taken = []
        for _ in range(9):
            # Of this process alone, whatever else the machine does.
            start = time.process_time()
            mixed(variables, x).block_until_ready()
            taken.append(time.process_time() - start)
        return median(taken)

    short, long = seconds(1024), seconds(16 * 1024)
    # 16 times the tokens; quadratic cost would be 256 times the time. Half as much more is for caches that overflow.
    assert long < 1.5 * 16 * short, f"1k tokens {short:.4f} s, 16k tokens {long:.4f} s"
