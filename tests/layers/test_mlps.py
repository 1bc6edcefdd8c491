"""The MLPs that choose: their contract, and each against its definition written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.interpolate import BSpline
from scipy.special import eval_chebyt, eval_jacobi

from zoo.errors import ZooError
from zoo.layers import kan
from zoo.layers.block import Block
from zoo.layers.mlp import create_mlp
from zoo.train.config import Rules
from zoo.train.mesh import logical_rules, parameter_shardings

QUICK = {"xla_backend_optimization_level": 0}
DIM, LEAD = 32, (4, 8)

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    # Router 32 · 4, three matrices of four experts, 32 · 16 each.
    "moe": ("moe", {"experts": 4, "hidden": 16}, 128 + 3 * 4 * 32 * 16),
    # 8/3 · 32 / 1, rounded up to a multiple of 8: 88. Router, 2 experts, and one more that all use.
    "moe shared": ("moe", {"experts": 2, "top_k": 1, "shared": 1}, 64 + 3 * 3 * 32 * 88),
    # Up and down 32 · 128 each, 16 centroids of 32; 16 blocks of 8² and 8 of 16².
    "mohd": ("mohd", {}, 2 * 32 * 128 + 16 * 32 + 16 * 64 + 8 * 256),
    "mohd blocks": ("mohd", {"hidden": 64, "groups": 8, "fusion": "blocks"}, 2 * 32 * 64 + 8 * 32 + 8 * 64),
    # Two layers: a norm of 64, eight choices an input, 9 + 8 + 8 + 5 + 5 + 8 + 5 + 8 = 56 functions for each of 32².
    "kan": ("kan", {}, 2 * (64 + 32 * 8 + 56 * 32 * 32)),
    # One family has no choice: norms of 32 and 16 features, 9 functions for each of 32 · 16 edges, there and back.
    "kan spline": ("kan", {"hidden": 16, "bases": ("spline",)}, 64 + 32 + 2 * 9 * 32 * 16),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def prepared(mlp: str, **options: Any) -> tuple[nn.Module, Any]:
    """The MLP and its boxed variables, moved off their initial values."""
    module = create_mlp(mlp, DIM, **options)
    variables = jax.jit(module.init, compiler_options=QUICK)(jax.random.key(0), normal(1, *LEAD, DIM))
    leaves, tree = jax.tree.flatten(variables["params"])
    moved = [x + 0.05 * normal(n, *x.shape).astype(x.dtype) for n, x in enumerate(leaves)]
    return module, {"params": jax.tree.unflatten(tree, moved)}


def applied(module: nn.Module, variables: Any, x: jax.Array) -> jax.Array:
    return jax.jit(module.apply, compiler_options=QUICK)(nn.unbox(variables), x)


def close(got: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * max(1e-3, np.abs(wanted).max()))


def pulled(module: nn.Module, variables: Any, x: jax.Array) -> Any:
    """Outputs, losses, and the gradients of both with respect to all."""

    def outputs(variables: Any, x: jax.Array) -> Any:
        return module.apply(variables, x, mutable=["losses"])

    (y, losses), vjp = jax.vjp(outputs, variables, x)
    return y, losses, vjp((normal(2, *x.shape).astype(y.dtype), jax.tree.map(jnp.ones_like, losses)))


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str):
    mlp, options, parameters = CASES[name]
    module, boxed = prepared(mlp, **options)
    variables, x = nn.unbox(boxed), normal(1, *LEAD, DIM)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters
    run = jax.jit(partial(pulled, module), compiler_options=QUICK)
    whole = run(variables, x)
    y, _, (d_variables, d_x) = whole
    assert y.shape == x.shape
    assert y.dtype == jnp.float32
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whole))
    assert np.abs(d_x).max() > 0
    for path, gradient in jax.tree_util.tree_leaves_with_path(d_variables):
        assert np.abs(gradient).max() > 0, f"{jax.tree_util.keystr(path)} has no gradient"
    # A token is the same alone, in a step of decoding.
    close(applied(module, variables, x[:, 3]), y[:, 3])
    rough = create_mlp(mlp, DIM, **options, dtype=jnp.bfloat16)
    out = applied(rough, variables, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    # A choice near a tie may fall otherwise for a rounded token: the median token does not feel it.
    error = np.sqrt(np.mean((np.asarray(out, np.float32) - y) ** 2, axis=-1) / np.mean(np.square(y)))
    assert np.median(error) < 0.03


@pytest.mark.parametrize("name", ["moe shared", "moe", "mohd", "kan"])
def test_split_over_devices_equals_whole(name: str):
    mlp, options, _ = CASES[name]
    module, boxed = prepared(mlp, **options)
    x, rules = normal(1, *LEAD, DIM), Rules()
    mesh = jax.make_mesh(
        (1, 1, 2, 2, 2), ("slice", "data", "fsdp", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 5
    )
    variables = nn.unbox(boxed)
    run = partial(pulled, module)
    wanted = jax.jit(run, compiler_options=QUICK)(variables, x)
    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules(rules)):
        split = jax.device_put(variables, parameter_shardings(boxed, rules, mesh))
        tokens = jax.device_put(x, NamedSharding(mesh, P("fsdp", "sequence")))
        got = jax.jit(run, compiler_options=QUICK)(split, tokens)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        close(ours, theirs, 1e-4)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def numbers(boxed: Any) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nn.unbox(boxed)["params"])


def test_experts_equal_a_loop_over_tokens():
    module, boxed = prepared("moe", experts=4, top_k=2, hidden=16, shared=1, balance=0.5, z_loss=0.25)
    x = normal(1, *LEAD, DIM)
    y, losses = jax.jit(partial(module.apply, mutable=["losses"]), compiler_options=QUICK)(nn.unbox(boxed), x)
    p = numbers(boxed)
    choices = np.zeros(4)
    logits = np.asarray(x, np.float64).reshape(-1, DIM) @ p["router"]
    for token, own, got in zip(np.asarray(x).reshape(-1, DIM), logits, np.asarray(y).reshape(-1, DIM), strict=True):
        best = np.argsort(-own)[:2]
        choices[best] += 1
        wanted = np.zeros(DIM)
        for e, gate in zip(best, softmax(own[best]), strict=True):
            wanted += gate * (silu(token @ p["gate"][e]) * (token @ p["in"][e])) @ p["out"][e]
        shared = p["shared_experts"]
        inner = silu(token @ shared["gate"]["kernel"]) * (token @ shared["in"]["kernel"])
        np.testing.assert_allclose(got, wanted + inner @ shared["out"]["kernel"], atol=1e-4)
    share = choices / choices.sum()
    balance = 0.5 * 4 * (share * softmax(logits).mean(0)).sum()
    np.testing.assert_allclose(losses["losses"]["balance"], [balance], rtol=1e-5)
    z = 0.25 * np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    np.testing.assert_allclose(losses["losses"]["z"], [z], rtol=1e-5)


def test_equal_experts_are_one_mlp():
    """All experts the same: whatever the router says, the layer is that expert."""
    module, boxed = prepared("moe", experts=4, top_k=3, hidden=16)
    parameters = nn.unbox(boxed)["params"]
    same = {name: part if name == "router" else part[:1].repeat(4, 0) for name, part in parameters.items()}
    x = normal(1, *LEAD, DIM)
    plain = {name: {"kernel": parameters[name][0]} for name in ("gate", "in", "out")}
    one = create_mlp("swiglu", DIM, hidden=16)
    close(applied(module, {"params": same}, x), applied(one, {"params": plain}, x), 1e-4)


def test_hidden_features_equal_a_loop_over_tokens():
    module, boxed = prepared("mohd", hidden=64, groups=8, active=0.5, common=0.25, balance=0.5)
    x = normal(1, *LEAD, DIM)
    y, losses = jax.jit(partial(module.apply, mutable=["losses"]), compiler_options=QUICK)(nn.unbox(boxed), x)
    p = numbers(boxed)
    used, mean = np.zeros(6), np.zeros(6)
    for token, got in zip(np.asarray(x).reshape(-1, DIM), np.asarray(y).reshape(-1, DIM), strict=True):
        s = softmax(p["centroids"] @ token)
        active = [0, 1, *(2 + np.argsort(-s[2:])[:2])]
        hidden = (token @ p["up"]["kernel"]).reshape(8, 8)
        gated = np.zeros_like(hidden)
        gated[active] = 8 * s[active].sum() * s[active, None] * hidden[active]
        gated = np.stack([gated[n] @ p["within"][n] for n in range(8)])
        gated = np.stack([gated[:, w] @ p["across"][w] for w in range(8)], axis=1)
        np.testing.assert_allclose(got, silu(gated.reshape(-1)) @ p["down"]["kernel"], atol=1e-4)
        used[np.array(active[2:]) - 2] += 1
        mean += s[2:]
    tokens = x.size // DIM
    np.testing.assert_allclose(losses["losses"]["balance"], [0.5 * 6 * (used * mean).sum() / tokens**2], rtol=1e-5)


@pytest.mark.parametrize("fusion", ["monarch", "none"])
def test_evenly_routed_hidden_features_are_a_plain_mlp(fusion: str):
    """All groups active, routed evenly and fused by identities: alpha · s = N · 1/N."""
    module = create_mlp("mohd", DIM, active=1.0, common=1.0, fusion=fusion)
    x = normal(1, *LEAD, DIM)
    parameters = nn.unbox(jax.jit(module.init, compiler_options=QUICK)(jax.random.key(0), x))["params"]
    parameters = {**parameters, "centroids": jnp.zeros_like(parameters["centroids"])}
    hidden = x @ parameters["up"]["kernel"]
    close(applied(module, {"params": parameters}, x), jax.nn.silu(hidden) @ parameters["down"]["kernel"], 1e-4)


def test_bases_are_their_definitions():
    x = np.linspace(-0.99, 0.99, 23)
    with jax.enable_x64(True):
        every = jax.jit(lambda x: {name: basis(x) for name, basis in kan.BASES.items()}, compiler_options=QUICK)
        got = jax.tree.map(np.asarray, every(jnp.asarray(np.append(x, [-2.5, 2.5]))))
    far, got = got["spline"][-2:], {name: values[:-2] for name, values in got.items()}
    knots = -1 + 0.4 * np.arange(-3, 9)
    splines = BSpline.design_matrix(x, knots, 3).toarray()
    np.testing.assert_allclose(got["spline"], np.concatenate([silu(x)[:, None], splines], axis=1), atol=1e-12)
    assert not far[:, 1:].any()
    np.testing.assert_allclose(got["chebyshev"], np.stack([eval_chebyt(n, np.tanh(x)) for n in range(5)], 1))
    np.testing.assert_allclose(got["jacobi"], np.stack([eval_jacobi(n, 1, 1, np.tanh(x)) for n in range(5)], 1))
    centres = np.linspace(-1, 1, 8)
    u = (x[:, None] - centres) * 3.5
    np.testing.assert_allclose(got["gaussian"], np.exp(-(u**2)))
    np.testing.assert_allclose(got["switch"], 1 / np.cosh(u) ** 2)
    hat = 2 / (np.sqrt(3) * np.pi**0.25) * (1 - u**2) * np.exp(-(u**2) / 2)
    np.testing.assert_allclose(got["wavelet"], hat, atol=1e-12)
    start = -1 + 0.4 * np.arange(-3, 5)
    bump = (np.maximum(start + 1.6 - x[:, None], 0) * np.maximum(x[:, None] - start, 0)) ** 2 / 0.8**4
    np.testing.assert_allclose(got["relu"], bump, atol=1e-12)
    # Gram: orthogonal on sixteen equidistant points.
    points = -1 + (2 * np.arange(16) + 1) / 16
    with jax.enable_x64(True):
        values = np.asarray(kan.gram(jnp.asarray(np.arctanh(points))))
    products = values.T @ values
    np.testing.assert_allclose(products - np.diag(np.diag(products)), 0, atol=1e-12)


def test_kan_is_a_sum_over_edges_and_its_choice_hardens():
    bases = ("spline", "chebyshev")
    module, boxed = prepared("kan", hidden=16, bases=bases, temperature=0.5)
    hard = create_mlp("kan", DIM, hidden=16, bases=bases, hard=True)
    x, p = normal(1, 3, DIM), numbers(boxed)

    def naive(x: np.ndarray, choose: Any) -> np.ndarray:
        for name in ("in", "out"):
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * p[f"{name}_norm"]["scale"] + p[f"{name}_norm"]["bias"]
            pi = choose(p[f"{name}_choice"])
            functions = [np.asarray(jax.jit(kan.BASES[base])(x.astype(np.float32))) for base in bases]
            y = 0.0
            for i in range(x.shape[1]):
                weighed = np.concatenate([pi[i, m] * each[:, i] for m, each in enumerate(functions)], axis=-1)
                y = y + weighed @ p[name][i]
            x = y
        return x

    close(applied(module, boxed, x), naive(np.asarray(x), lambda logits: softmax(logits / 0.5)), 1e-4)
    close(applied(hard, boxed, x), naive(np.asarray(x), lambda logits: np.eye(2)[logits.argmax(-1)]), 1e-4)
    slope = jax.jit(jax.grad(lambda params: (hard.apply({"params": params}, x) ** 2).sum()), compiler_options=QUICK)
    assert np.abs(slope(nn.unbox(boxed)["params"])["in_choice"]).max() > 0


@pytest.mark.parametrize("mlp", ["moe", "mohd", "kan"])
def test_a_block_holds_it(mlp: str):
    block = Block(DIM, "softmax", mlp, {"heads": 2})
    x = normal(1, *LEAD, DIM)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    assert "losses" in variables or mlp == "kan"
    assert jax.eval_shape(partial(block.apply, mutable=["losses"]), nn.unbox(variables), x)[0].shape == x.shape


@pytest.mark.parametrize(
    ("mlp", "options", "message"),
    [
        ("moe", {"top_k": 9}, "top_k: got 9, wanted 1 to the 8 experts"),
        ("mohd", {"hidden": 100}, "100 hidden features do not divide into 16 groups"),
        ("mohd", {"common": 0.75}, r"wanted 0 <= common <= active <= 1, got common 0\.75, active 0\.5"),
        ("mohd", {"fusion": "dense"}, "fusion is one of monarch, blocks, none, got 'dense'"),
        ("kan", {"bases": ("sine",)}, "bases are some of spline, gaussian, .*, got"),
        ("kan", {"temperature": 0.0}, r"temperature: got 0\.0, wanted more than 0"),
    ],
)
def test_wrong_options_are_named(mlp: str, options: dict[str, Any], message: str):
    with pytest.raises(ZooError, match=message):
        create_mlp(mlp, DIM, **options).init(jax.random.key(0), normal(1, 2, DIM))
