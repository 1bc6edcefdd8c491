"""Samples are RoIAlign's, and attention to them is that of windows where they are the tokens themselves."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from zoo.attention.hierarchical_window import HierarchicalWindow, HierarchicalWindowResampler, roi_taps, sampled
from zoo.attention.local_global_linear import LocalWindow
from zoo.errors import ZooError

QUICK = {"xla_backend_optimization_level": 0}
DIM, HEADS, GRID = 8, 2, (6, 5)
LENGTH = GRID[0] * GRID[1]


def close(got: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


def drawn(module: nn.Module, *args: Any) -> Any:
    variables = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.7 * rng.standard_normal(leaf.shape), jnp.float32), variables)


def run(module: nn.Module, variables: Any, *args: Any, **options: Any) -> np.ndarray:
    return np.asarray(jax.jit(partial(module.apply, **options), compiler_options=QUICK)(variables, *args))


def linear(image: np.ndarray, at: np.ndarray) -> np.ndarray | None:
    """The map between its places at a point, None beyond the edge; place i covers i to i + 1."""
    if np.any(at <= 0) or np.any(at >= image.shape[:2]):
        return None
    y, x = np.clip(at - 0.5, 0, np.array(image.shape[:2]) - 1)
    top, left = int(y), int(x)
    down, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
    y, x = y - top, x - left
    upper = (1 - x) * image[top, left] + x * image[top, right]
    return (1 - y) * upper + y * ((1 - x) * image[down, left] + x * image[down, right])


def roi_align(image: np.ndarray, centre: np.ndarray, wide: np.ndarray, samples: int) -> np.ndarray:
    """[samples, samples, D] of the region, bin by bin and point by point; points beyond the edge count as zeros."""
    size = wide / samples
    points = np.ceil(size - 1e-9).astype(int)
    out = np.zeros((samples, samples, image.shape[-1]))
    for bin_y in range(samples):
        for bin_x in range(samples):
            for point in np.ndindex(*points):
                at = centre - wide / 2 + (np.array([bin_y, bin_x]) + (np.array(point) + 0.5) / points) * size
                found = linear(image, at)
                out[bin_y, bin_x] += 0 if found is None else found / points.prod()
    return out


@pytest.mark.parametrize(
    ("size", "cells", "samples", "reach"),
    [((6, 8), (2, 4), 3, 1), ((7, 9), (3, 2), 2, 1), ((6, 8), (3, 4), 2, 3), ((4, 4), (2, 2), 2, 1)],
    ids=["finer than places", "uneven", "beyond the edge", "places themselves"],
)
def test_samples_are_those_of_roi_align(size: tuple[int, int], cells: tuple[int, int], samples: int, reach: int):
    image = np.random.default_rng(2).standard_normal((*size, 3))
    window = np.array(size) / cells
    taps = [roi_taps(n, w, c, samples, reach) for n, w, c in zip(size, window.tolist(), cells, strict=True)]
    got = sampled(jnp.asarray(image[None], jnp.float32), taps)[0]
    for place in np.ndindex(*cells):
        wanted = roi_align(image, (np.array(place) + 0.5) * window, reach * window, samples)
        y, x = np.array(place) * samples
        close(got[y : y + samples, x : x + samples], wanted)


def tokens() -> tuple[jax.Array, jax.Array, jax.Array]:
    x = np.random.default_rng(3).standard_normal((1, LENGTH, DIM))
    ids, there = (np.arange(LENGTH) >= 13)[None], np.arange(LENGTH)[None] % 7 != 3
    return jnp.asarray(x, jnp.float32), jnp.asarray(ids, jnp.int32), jnp.asarray(there)


def test_samples_that_are_tokens_make_window_attention():
    x, ids, there = tokens()
    options = {"grid": GRID, "heads": HEADS, "window": 4}
    ours = HierarchicalWindow(DIM, **options, reach=(1,), samples=(4,), position=False)
    plain = LocalWindow(DIM, **options, position=0)
    own = drawn(plain, x)
    variables = {"params": {**own["params"], "levels": jnp.zeros((1, DIM))}}
    close(
        run(ours, variables, x, segment_ids=ids, mask=there)[there],
        run(plain, own, x, segment_ids=ids, mask=there)[there],
    )


def sines(at: np.ndarray) -> np.ndarray:
    """[D] of one place: for each axis sines and cosines of 1 and of 1/100 (D = 8)."""
    return np.concatenate([f(axis * np.array([1, 0.01])) for axis in at for f in (np.sin, np.cos)])


def test_tokens_see_samples_of_their_own_segment_alone():
    x, ids, there = tokens()
    mixer = HierarchicalWindow(DIM, grid=GRID, heads=HEADS, window=2, reach=(1, 3), samples=(2, 3))
    variables = drawn(mixer, x)
    got = run(mixer, variables, x, segment_ids=ids, mask=there)[0]

    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    rows, segment, real = np.asarray(x[0], np.float64), np.asarray(ids[0]), np.asarray(there[0])
    # What each sample is made of: RoIAlign of a map with a feature for each token, those that are not there left out.
    each = np.eye(LENGTH).reshape(*GRID, LENGTH) * real
    out = np.zeros((LENGTH, HEADS, DIM // HEADS))
    hidden = 0
    for t in np.flatnonzero(real):
        place = np.array(divmod(t, GRID[1]))
        centre = (place // 2) * 2 + 1.0
        keys, values = [], []
        for level, (reach, samples) in enumerate(((1, 2), (3, 3))):
            shares = roi_align(each, centre, np.full(2, 2.0 * reach), samples)
            for bin_ in np.ndindex(samples, samples):
                share = shares[bin_]
                if share.sum() == 0:
                    continue
                if (segment[share > 0] != segment[t]).any():
                    hidden += 1
                    continue
                mean = share @ rows / share.sum()
                at = centre - reach + (np.array(bin_) + 0.5) * 2 * reach / samples - 0.5
                keys.append(mean + sines(at) + own["levels"][level])
                values.append(mean)
        if not keys:
            continue
        query = np.einsum("d,dhk->hk", rows[t] + sines(place), own["query"]["kernel"]) + own["query"]["bias"]
        k, v = (
            np.einsum("nd,dhk->nhk", np.stack(given), own[name]["kernel"]) + own[name]["bias"]
            for name, given in (("key", keys), ("value", values))
        )
        p = softmax(np.einsum("hk,nhk->hn", query, k) / np.sqrt(DIM // HEADS), axis=-1)
        out[t] = np.einsum("hn,nhk->hk", p, v)
    assert hidden
    wanted = np.einsum("thk,hkd->td", out, own["out"]["kernel"]) + own["out"]["bias"]
    close(got[real], wanted[real])


def layer_norm(x: np.ndarray, own: Any) -> np.ndarray:
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normal * own["scale"] + own["bias"]


def test_resampler_is_its_definition_and_learns():
    model = HierarchicalWindowResampler(DIM, queries=(2, 3), sets=2, samples=(2, 3), heads=HEADS)
    rng = np.random.default_rng(4)
    maps = [rng.standard_normal((2, 4, 6, 5)), rng.standard_normal((2, 8, 12, 4))]
    rounded = [jnp.asarray(x, jnp.float32) for x in maps]
    variables = drawn(model, rounded)

    @partial(jax.jit, compiler_options=QUICK)
    def pulled(variables: Any) -> Any:
        out, vjp = jax.vjp(lambda variables: model.apply(variables, rounded), variables)
        return out, vjp(jnp.asarray(rng.standard_normal(out.shape), jnp.float32))[0]

    out, gradient = pulled(variables)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path

    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    wanted = np.zeros((2, 6, DIM))
    for row, window in np.ndindex(2, 6):
        place, keys, values = np.array(divmod(window, 3)), [], []
        for level, (x, samples) in enumerate(zip(maps, (2, 3), strict=True)):
            project, wide = own[f"map_{level}"], np.array(x.shape[1:3]) / (2, 3)
            normal = layer_norm(x[row] @ project["kernel"] + project["bias"], own["map_norm"])
            found = roi_align(normal, (place + 0.5) * wide, wide, samples)
            for bin_ in np.ndindex(samples, samples):
                at = place + (np.array(bin_) + 0.5) / samples - 0.5
                keys.append(found[bin_] + sines(at) + own["levels"][level])
                values.append(found[bin_])
        k, v = (
            np.einsum("nd,dhk->nhk", np.stack(given), own[name]["kernel"]) + own[name]["bias"]
            for name, given in (("key", keys), ("value", values))
        )
        sets = []
        for asked in own["queries"][window]:
            asked = layer_norm(asked, own["query_norm"]) + sines(place)
            query = np.einsum("d,dhk->hk", asked, own["query"]["kernel"]) + own["query"]["bias"]
            p = softmax(np.einsum("hk,nhk->hn", query, k) / np.sqrt(DIM // HEADS), axis=-1)
            mixed = np.einsum("hn,nhk->hk", p, v)
            mixed = np.einsum("hk,hkd->d", mixed, own["out"]["kernel"]) + own["out"]["bias"]
            sets.append(layer_norm(mixed, own["set_norm"]))
        joined = np.concatenate(sets) @ own["join"]["kernel"] + own["join"]["bias"]
        wanted[row, window] = layer_norm(joined, own["joined_norm"]) @ own["project"]["kernel"]
    close(out, wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: HierarchicalWindow(DIM, reach=(1, 2), samples=(4,)).init(jax.random.key(0), tokens()[0]),
            r"reach \(1, 2\) and samples \(4,\): wanted one of each a level",
        ),
        (
            lambda: HierarchicalWindowResampler(DIM).init(jax.random.key(0), [jnp.zeros((1, 4, 4, 3))]),
            "got 1 maps, wanted 3",
        ),
    ],
)
def test_bad_options_are_named(make: Any, message: str):
    with pytest.raises(ZooError, match=message):
        make()
