"""Mixers with time split over eight devices: packed rows with tokens that are not there equal those of one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zoo.layers.mixer import create_mixer
from zoo.train.config import Rules
from zoo.train.mesh import AXES, logical_rules

QUICK = {"xla_backend_optimization_level": 0}
DIM, BATCH, LENGTH = 16, 2, 64
BLOCKS = {"heads": 2, "block_size": 4, "stride": 2, "compression_block": 4, "selected_blocks": 4}
TITANS = {"heads": 2, "expansion": 2, "chunk": 4, "segment": 8, "window": 6, "persistent": 2}

CASES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "softmax": ("softmax", {"heads": 2}),
    "softmax both ways": ("softmax", {"heads": 2, "causal": False}),
    "sliding_window": ("sliding_window", {"heads": 2, "window": 5, "sinks": 2}),
    "sliding_window long": ("sliding_window", {"heads": 2, "window": 19}),
    "native_sparse": ("native_sparse", {**BLOCKS, "window": 6}),
    "asa_local": ("asa_local", {"heads": 2, "window": 6}),
    "asa_global": ("asa_global", BLOCKS),
    "mamba": ("mamba", {"states": 4}),
    "moba": ("moba", {"heads": 2, "block_size": 4, "top_k": 3}),
    "kda": ("kda", {"heads": 2}),
    "titans lmm": ("titans", {**TITANS, "wiring": "lmm", "depth": 1, "granularity": "chunk"}),
    "titans mac": ("titans", TITANS),
    "titans mag": ("titans", {**TITANS, "wiring": "mag", "depth": 1, "residual": True}),
    "titans mal": ("titans", {**TITANS, "wiring": "mal"}),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def packed() -> tuple[jax.Array, jax.Array]:
    """Segments that begin on and off the borders of devices, and tokens that are not there."""
    ids, mask = np.zeros((BATCH, LENGTH), np.int32), np.ones((BATCH, LENGTH), bool)
    for row, borders in enumerate([(8, 24, 52), (20, 56)]):
        for border in borders:
            ids[row, border:] += 1
    mask[0, 12:19] = mask[1, 3] = mask[1, 60:] = False
    return jnp.asarray(ids), jnp.asarray(mask)


def pulled(mixer: nn.Module, given: Mapping[str, jax.Array]) -> Any:
    def run(variables: Any, x: jax.Array) -> Any:
        def apply(variables: Any, x: jax.Array) -> jax.Array:
            out = mixer.apply(variables, x, **given)
            there = given.get("mask")
            return out if there is None else jnp.where(there[..., None], out, 0)

        out, vjp = jax.vjp(apply, variables, x)
        return out, vjp(normal(2, *x.shape))

    return run


def on_eight(run: Any, variables: Any, x: jax.Array, sizes: tuple[int, ...]) -> Any:
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules(Rules())):
        tokens = jax.device_put(x, NamedSharding(mesh, P("fsdp", "sequence")))
        compiled = jax.jit(run).lower(jax.device_put(variables, NamedSharding(mesh, P())), tokens).compile(QUICK)
        return compiled(variables, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (("segment_ids",), (1, 1, 1, 1, 8)),
        (("mask",), (1, 1, 1, 1, 8)),
        (("segment_ids", "mask"), (1, 1, 1, 1, 8)),
        (("segment_ids", "mask"), (1, 1, 2, 2, 2)),
    ],
    ids=["segments", "mask", "both", "with examples and heads"],
)
def test_packed_rows_and_gaps(name, given, sizes):
    mixer = create_mixer(CASES[name][0], DIM, **CASES[name][1])
    x, (ids, mask) = normal(1, BATCH, LENGTH, DIM), packed()
    arrays = {key: {"segment_ids": ids, "mask": mask}[key] for key in given}
    variables = nn.unbox(jax.jit(mixer.init, compiler_options=QUICK)(jax.random.key(0), x))
    run = pulled(mixer, arrays)
    wanted = jax.jit(run, compiler_options=QUICK)(variables, x)
    got = on_eight(run, variables, x, sizes)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1e-3, float(jnp.abs(theirs).max())))
