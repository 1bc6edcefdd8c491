"""MambAttention: its definition line by line of the grid, what is shared, packed grids, and errors."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.state_space.mamba import Mamba
from zoo.state_space.mambattention import MambAttention

QUICK = {"xla_backend_optimization_level": 0}
BATCH, DIM, GRID = 2, 8, (5, 3)
OPTIONS = {"heads": 2, "states": 4, "expand": 2}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def variables() -> Any:
    """Moved off their initial values."""
    mixer = MambAttention(DIM, grid=GRID, **OPTIONS)
    x = normal(0, BATCH, GRID[0] * GRID[1], DIM)
    drawn = nn.unbox(jax.jit(mixer.init, compiler_options=QUICK)(jax.random.key(0), x))
    leaves, tree = jax.tree.flatten(drawn)
    return jax.tree.unflatten(tree, [leaf + 0.2 * normal(n, *leaf.shape) for n, leaf in enumerate(leaves)])


def run(grid: tuple[int, int], variables: Any, x: jax.Array, **arrays: jax.Array) -> np.ndarray:
    mixer = MambAttention(DIM, grid=grid, **OPTIONS)
    return np.asarray(jax.jit(mixer.apply, compiler_options=QUICK)(variables, x, **arrays))


def attended(p: Any, x: np.ndarray) -> np.ndarray:
    """MHA(LN x) + x of [B, T, D]."""
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normed = normed * p["norm"]["scale"] + p["norm"]["bias"]
    q, k, v = (
        np.einsum("btd,dhk->bhtk", normed, part["kernel"]) + part["bias"][:, None]
        for part in (p["attention"][name] for name in ("query", "key", "value"))
    )
    s = np.exp(q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]))
    out = s / s.sum(-1, keepdims=True) @ v
    return np.einsum("bhtk,hkd->btd", out, p["attention"]["out"]["kernel"]) + p["attention"]["out"]["bias"] + x


def both_ways(p: Any, x: np.ndarray) -> np.ndarray:
    """Lin([x + Mamba(norm x), flip(of the flipped)]) + x of [B, T, D]."""
    mamba, parts = Mamba(DIM, states=4, expand=2), []
    apply = jax.jit(mamba.apply, compiler_options=QUICK)
    for name, flip in (("forward", False), ("backward", True)):
        line = x[:, ::-1] if flip else x
        normed = line / np.sqrt(np.mean(line**2, -1, keepdims=True) + 1e-5) * p[f"{name}_norm"]["scale"]
        out = line + np.asarray(apply({"params": p[name]}, jnp.asarray(normed, jnp.float32)))
        parts.append(out[:, ::-1] if flip else out)
    return np.concatenate(parts, axis=-1) @ p["join"]["kernel"] + p["join"]["bias"] + x


@pytest.mark.slow
def test_the_block_is_its_definition(variables: Any):
    times, frequencies = GRID
    x = normal(9, BATCH, times * frequencies, DIM)
    p = variables["params"]
    grid = np.asarray(x).reshape(BATCH, times, frequencies, DIM)
    lines = np.swapaxes(grid, 1, 2).reshape(-1, times, DIM)
    lines = both_ways(p["time"], attended(p, lines))
    grid = np.swapaxes(lines.reshape(BATCH, frequencies, times, DIM), 1, 2)
    lines = both_ways(p["frequency"], attended(p, grid.reshape(-1, frequencies, DIM)))
    wanted = lines.reshape(x.shape)
    np.testing.assert_allclose(run(GRID, variables, x), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_segments_of_whole_times_are_grids_of_their_own(variables: Any):
    frequencies = GRID[1]
    x = normal(9, BATCH, 15, DIM)
    ids = jnp.broadcast_to(jnp.arange(15) >= 2 * frequencies, (BATCH, 15)).astype(jnp.int32)
    packed = run(GRID, variables, x, segment_ids=ids)
    for part, grid in ((slice(0, 6), (2, 3)), (slice(6, 15), (3, 3))):
        np.testing.assert_allclose(packed[:, part], run(grid, variables, x[:, part]), rtol=1e-4, atol=1e-4)


def test_sizes_as_published():
    """64 features, expand 4: one attention and norm for both passes, four Mambas with norms, two joins."""
    mixer = MambAttention(64, grid=(2, 2))
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 4, 64)))["params"]
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}
    attention, mamba, join = 4 * (64**2 + 64), 32_768 + 1_280 + 9_216 + 1_280 + 4_096 + 256 + 16_384, 129 * 64
    both = 2 * (mamba + 64) + join
    assert sizes == {"attention": attention, "norm": 128, "time": both, "frequency": both}


def test_a_grid_that_does_not_fit_is_refused(variables: Any):
    with pytest.raises(ZooError, match=r"mambattention: grid \(5, 3\) has not the 14 places of the input"):
        run(GRID, variables, normal(9, BATCH, 14, DIM))
