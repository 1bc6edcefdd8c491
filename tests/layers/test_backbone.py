"""The stack of blocks: patterns, scans, recomputation, what it refuses. Each mixer's own part: tests/test_mixers.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.layers.backbone import Backbone
from zoo.layers.residual import drop_path

QUICK = {"xla_backend_optimization_level": 0}
OPTIONS: dict[str, Any] = {
    "mlp": "gelu",
    "mlp_options": {"hidden": 8},
    "layer_scale": 0.5,
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def stack(*mixers: str, **options: Any) -> tuple[Backbone, Any]:
    """A backbone of 16 features and its variables."""
    heads = {name: {"heads": 2} for name in mixers}
    made = Backbone(16, mixers, heads, **{**OPTIONS, **options})
    return made, nn.unbox(jax.jit(made.init, compiler_options=QUICK)(jax.random.key(0), normal(0, 2, 6, 16)))


@pytest.mark.parametrize(
    ("mixers", "pattern"),
    [
        (("linear",) * 6, ("linear",)),
        (("linear", "linear", "softmax") * 2, ("linear", "linear", "softmax")),
        (("linear", "softmax", "linear"), ("linear", "softmax", "linear")),
    ],
)
def test_shortest_pattern(mixers, pattern):
    assert Backbone(16, mixers).pattern() == pattern


def test_every_layer_has_parameters_of_its_own_and_axes_with_names():
    made, variables = stack("linear", "softmax", "linear", "softmax")
    boxed = jax.eval_shape(made.init, jax.random.key(0), normal(0, 2, 6, 16))["params"]
    query = boxed["layers"]["blocks_1"]["mixing"]["query"]["kernel"]
    assert query.names == ("layers", "embed", "heads", "head_width")
    assert query.value.shape == (2, 16, 2, 8)
    kernel = variables["params"]["layers"]["blocks_0"]["mixing"]["query"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


@pytest.mark.slow
def test_layers_apart_equal_layers_scanned():
    scanned, variables = stack("linear", "softmax", "linear", "softmax")
    apart = scanned.clone(scan=False)
    own = {f"layer_{n}": jax.tree.map(lambda x, n=n: x[n], variables["params"]["layers"]) for n in range(2)}
    own["final_norm"] = variables["params"]["final_norm"]
    x = normal(1, 2, 6, 16)

    def run(made: Backbone, variables: Any) -> Any:
        state = made.apply(variables, 2, 6, method="initial_state")
        return made.apply(variables, x, intermediates=True), made.apply(variables, x[:, 0], state, method="step")[0]

    pairs = ((scanned, variables), (apart, {"params": own}))
    results = [jax.jit(partial(run, made), compiler_options=QUICK)(own) for made, own in pairs]
    ((y, outs), first), ((y_apart, outs_apart), first_apart) = results
    np.testing.assert_allclose(y_apart, y, atol=2e-6)
    np.testing.assert_allclose(outs_apart, outs, atol=2e-6)
    np.testing.assert_allclose(first, y[:, 0], atol=2e-6)
    np.testing.assert_allclose(first_apart, y[:, 0], atol=2e-6)
    assert outs.shape == (4, 2, 6, 16)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("scan", [True, False])
def test_recomputation_changes_nothing_but_memory(remat, scan):
    whole, variables = stack("linear", "linear", scan=scan)
    again = whole.clone(remat=remat)
    x = normal(1, 2, 6, 16)

    def gradient(made: Backbone) -> Any:
        return jax.jit(jax.grad(lambda v: jnp.sum(made.apply(v, x) ** 3)), compiler_options=QUICK)(variables)

    for got, wanted in zip(*(jax.tree.leaves(gradient(made)) for made in (again, whole)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    assert "remat" in str(jax.make_jaxpr(jax.grad(lambda v: jnp.sum(again.apply(v, x))))(variables))


@pytest.mark.slow
def test_drop_path_grows_with_depth_and_keeps_the_mean():
    branch = jnp.ones((4000, 3))
    dropped = drop_path(branch, 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_array_equal(dropped.min(1), dropped.max(1))
    np.testing.assert_allclose(dropped.mean(), 1, atol=0.03)

    made, variables = stack("linear", "linear", drop_path=0.999, layer_scale=0.0)
    x = normal(1, 64, 4, 16)
    _, outs = made.apply(variables, x, train=True, intermediates=True, rngs={"dropout": jax.random.key(0)})
    _, still = made.apply(variables, x, intermediates=True)
    np.testing.assert_allclose(outs[0], still[0], atol=1e-5)  # the first layer's rate is 0
    unchanged = np.abs(outs[1] - outs[0]).max((1, 2)) < 1e-6
    assert unchanged.sum() >= 62


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixers": ()}, r"Backbone: mixers: got none, wanted a name for each layer"),
        ({"mixers": ("sofmax",)}, r"no mixer is called 'sofmax'; the nearest name is 'softmax'"),
        ({"mixer_options": {"kda": {}}}, r"Backbone: mixer_options: 'kda' is not among the mixers \['softmax'\]"),
        ({"mlp": "swish"}, r"no MLP is called 'swish'; the nearest name is 'swiglu'"),
        ({"mlp_options": {"hiden": 3}}, r"MLP 'swiglu' has no option 'hiden'; the nearest is 'hidden'"),
        ({"norm": "batch"}, r"a norm is 'rms' or 'layer', got 'batch'"),
        ({"remat": "some"}, r"Backbone: remat must be one of \['dots', 'full', 'none'\], got 'some'"),
        ({"drop_path": 1.0}, r"Backbone: drop_path must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ZooError, match=message):
        Backbone(16, **{"mixers": ("softmax",), **options}).init(jax.random.key(0), normal(0, 1, 4, 16))
