"""Attention to chosen keys on several devices: rows and heads are split by `jax.shard_map`, and nothing travels."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against import QUICK, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.moba import moba
from kernels.native_sparse_attention import native_sparse_attention
from kernels.sparse_attention import Causal, Window, sparse_attention

OPERATIONS = {
    "sparse": lambda q, k, v, gates: sparse_attention(q, k, v, Causal() & Window(12)),
    "native": lambda q, k, v, gates: native_sparse_attention(
        q, k, v, gates, block_size=8, stride=4, selected_blocks=3, window=10
    ),
    "moba": lambda q, k, v, gates: moba(q, k, v, block_size=8, top_k=3),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_and_heads_on_devices_of_their_own(name):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", None, "tensor")
    whole = OPERATIONS[name]
    split = jax.shard_map(whole, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=False)
    arrays = normal(0, 4, 40, 4, 8), normal(1, 4, 40, 2, 8), normal(2, 4, 40, 2, 8), jnp.abs(normal(3, 4, 40, 4, 3))
    cotangent = normal(4, 4, 40, 4, 8)

    @partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def pulled(op, *arrays):
        out, vjp = jax.vjp(op, *arrays)
        return out, vjp(cotangent)

    on_devices = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
    for got, wanted in zip(*map(jax.tree.leaves, (pulled(split, *on_devices), pulled(whole, *arrays))), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    text = jax.jit(split, compiler_options=QUICK).lower(*on_devices).compile().as_text()
    assert not re.search(r" (all-\w+|reduce-scatter|collective-permute)(-start)?\(", text)
