"""Kernels on a mesh: values are those of one device, and what need not travel does not."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.linear_attention import linear_attention as whole_linear_attention
from kernels.linear_scan import linear_scan as whole_linear_scan
from zoo.layers.devices import linear_attention, linear_scan, on_devices
from zoo.train.config import Rules
from zoo.train.mesh import AXES, logical_rules

QUICK = {"xla_backend_optimization_level": 0}
GATHERS = r" (all-gather|all-to-all|reduce-scatter)(-start)?\("


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def on_mesh(sizes: tuple[int, ...], spec: P, op: Any, *arrays: jax.Array) -> tuple[Any, str]:
    """op(*arrays) under the rules on a mesh of these sizes, and the compiled program."""
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules(Rules())):
        placed = [jax.device_put(x, NamedSharding(mesh, P(*spec[: x.ndim]))) for x in arrays]
        compiled = jax.jit(op).lower(*placed).compile(QUICK)
        return compiled(*placed), compiled.as_text()


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_linear_attention_stays_where_it_is(decay):
    q, k, v = (normal(n, 4, 16, 2, 4) for n in range(3))
    gate = {"none": None, "head": -jnp.array([0.1, 0.2]), "channel": -jnp.abs(normal(3, 4, 16, 2, 4))}[decay]

    def mixed(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return linear_attention(q, k, v, log_decay=gate)

    got, text = on_mesh((1, 2, 1, 2, 2), P("data", "sequence", "tensor"), mixed, q, k, v)
    for ours, theirs in zip(got, whole_linear_attention(q, k, v, log_decay=gate), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    if decay != "channel":  # a constant gate of the program is cut as the compiler likes
        assert not re.search(GATHERS, text)
    assert "collective-permute" in text


def test_linear_scan_with_tokens_split():
    x, decay = normal(0, 2, 16, 6), -jnp.abs(normal(1, 2, 16, 6))
    got, text = on_mesh((1, 2, 1, 2, 2), P("data", "sequence", "tensor"), linear_scan, x, decay)
    for ours, theirs in zip(got, whole_linear_scan(x, decay), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert not re.search(GATHERS, text)


def test_an_axis_that_does_not_divide_stays_whole():
    shapes = {}

    def op(q: jax.Array, k: jax.Array) -> jax.Array:
        shapes.update(q=q.shape, k=k.shape)
        return q * k.sum(2, keepdims=True)

    axes = ("batch", None, "heads", None)
    q, k = normal(0, 4, 5, 4, 2), normal(1, 4, 5, 3, 2)

    def split(q: jax.Array, k: jax.Array) -> jax.Array:
        return on_devices(op, (q, k), (axes, axes), axes)

    wanted = op(q, k)
    got, _ = on_mesh((1, 4, 1, 2, 1), P("data"), split, q, k)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert shapes == {"q": (1, 5, 4, 2), "k": (1, 5, 3, 2)}  # three heads of k keep all of q together


def test_without_a_mesh_it_is_the_operation():
    x = normal(0, 2, 3)
    assert "shard_map" not in str(
        jax.make_jaxpr(lambda x: on_devices(jnp.sin, (x,), (("batch", None),), ("batch", None)))(x)
    )
