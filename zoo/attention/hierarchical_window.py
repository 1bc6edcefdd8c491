"""Hierarchical window attention: the queries of a window look at samples of it at several scales.

Source: Zhang et al., "LLaVA-UHD v2" (2412.13871), the hierarchical window transformer, and its code
(github.com/thunlp/LLaVA-UHD, `AdaptSpatialResampler`): a grid of learned queries, each of which attends once to
RoIAlign samples (Mask R-CNN, 1703.06870) of its window at every level of a feature pyramid.
`HierarchicalWindowResampler` is that, `HierarchicalWindow` our choice of what it is among the tokens of one grid: they
are the queries and, as there is no finer map than they are, a level shows wider surroundings more coarsely.

Where the resampler differs from the code: windows divide each map evenly and have as many samples whatever the image's
aspect; samples lie where their coordinates say, there half a place further; positions are sines and cosines at the
places of samples, there a table for the queries is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels.packing import runs
from zoo.attention.local_global_linear import INIT, GridMixer, attend, in_windows, windows
from zoo.errors import ZooError
from zoo.layers.mixer import head_count
from zoo.layers.parameters import dense, merge_heads, norm, partitioned, split_heads
from zoo.layers.rotary import BASE
from zoo.types import Array

Taps = tuple[np.ndarray, np.ndarray]
"""Along one axis, for each sample: the places it is made of [N, P] and their weights [N, P], 0 beyond the edge."""


def roi_taps(size: int, window: float | int, cells: int, samples: int, reach: int = 1) -> Taps:
    """RoIAlign along one axis of `size` places, cut into `cells` windows `window` wide.

    A region is its window or, around the same centre, `reach` times as wide. It has `samples` equal bins, each the mean
    of points a place or less apart, each of these linear between the two places around it. Points beyond the edge
    weigh nothing.
    """
    wide = reach * window / samples
    points = max(1, math.ceil(wide - 1e-9))
    first = (np.arange(cells) + 0.5 - reach / 2) * window
    at = first[:, None, None] + (np.arange(samples)[:, None] + (np.arange(points) + 0.5) / points) * wide
    at = at.reshape(-1, points)
    inside = (at > 0) & (at < size)
    place = np.clip(at - 0.5, 0, size - 1)
    low = np.floor(place).astype(int)
    start = np.where(inside, low, size - 1).min(axis=1)
    weights = np.zeros((len(at), int(np.where(inside, low - start[:, None], 0).max()) + 2))
    row = np.broadcast_to(np.arange(len(at))[:, None], at.shape)[inside]
    for after, share in ((0, 1 - (place - low)), (1, place - low)):
        np.add.at(weights, (row, (low - start[:, None])[inside] + after), share[inside] / points)
    weights = weights[:, : 1 + np.flatnonzero(weights.any(axis=0)).max()]
    return np.minimum(start[:, None] + np.arange(weights.shape[1]), size - 1), weights


def sampled(x: Float[Array, "B *grid D"], taps: Sequence[Taps]) -> Float[Array, "B *samples D"]:
    """The samples of a map, one axis after the other, float32."""
    x = x.astype(jnp.float32)
    for axis, (places, weights) in enumerate(taps, start=1):
        weight = weights.reshape(*weights.shape, *(1,) * (x.ndim - axis - 1)).astype(np.float32)
        x = jnp.sum(jnp.take(x, places, axis=axis) * weight, axis=axis + 1)
    return x


def among(ids: Int[Array, "B ..."], taps: Sequence[Taps], largest: bool) -> Int[Array, "B ..."]:
    """The largest or least of the ids that a sample is made of."""
    edge = jnp.iinfo(ids.dtype).min if largest else jnp.iinfo(ids.dtype).max
    for axis, (places, weights) in enumerate(taps, start=1):
        weighs = (weights > 0).reshape(*weights.shape, *(1,) * (ids.ndim - axis - 1))
        each = jnp.where(weighs, jnp.take(ids, places, axis=axis), edge)
        ids = jnp.max(each, axis=axis + 1) if largest else jnp.min(each, axis=axis + 1)
    return ids


def sines(places: np.ndarray, dim: int) -> np.ndarray:
    """[N, A] coordinates → [N, D]: for each axis D / A features, half sines and half cosines of base^(−i / count)."""
    share = dim // places.shape[1] // 2
    rate = BASE ** (-np.arange(share) / max(1, share))
    angle = places[..., None] * rate
    both = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).reshape(len(places), -1)
    return np.pad(both, ((0, 0), (0, dim - both.shape[1]))).astype(np.float32)


def middles(cells: tuple[int, ...], window: float | int, samples: int, reach: int = 1) -> np.ndarray:
    """[N, A]: where the samples of all windows lie, in places; the last axis fastest."""
    wide, inside = reach * window / samples, np.arange(samples) + 0.5
    axes = [((np.arange(n)[:, None] + 0.5 - reach / 2) * window + inside * wide - 0.5).ravel() for n in cells]
    return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=-1)


class HierarchicalWindow(GridMixer):
    """The tokens of a window attend to samples of it and of wider regions around it.

    A sample is the mean of the tokens it is made of that are there; it is seen by the tokens of a segment if it is made
    of theirs alone. Where `reach` is 1 and `samples` is `window`, samples are tokens.

    window            tokens along each axis
    reach, samples    of each level: how many times as wide as the window, and how many samples along each axis
    position          sines and cosines of places are added for queries and keys
    """

    window: int = 4
    reach: tuple[int, ...] = (1, 2, 4)
    samples: tuple[int, ...] = (4, 4, 4)
    position: bool = True

    def setup(self) -> None:
        if len(self.reach) != len(self.samples) or not self.samples or min(*self.reach, *self.samples) < 1:
            raise ZooError(
                f"HierarchicalWindow: reach {self.reach} and samples {self.samples}: wanted one of each a level"
            )
        super().setup()
        self.levels = self.param("levels", partitioned(INIT, None, "embed"), (len(self.samples), self.dim))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        grid = self.sizes(x.shape[1])
        cells = tuple(-(-size // self.window) for size in grid)
        there = jnp.ones(x.shape[:2], bool) if mask is None else mask
        run = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else runs(segment_ids)
        shown = [self._level(level, x, there, run, grid, cells) for level in range(len(self.samples))]
        keys, values, own = (jnp.concatenate(each, axis=2) for each in zip(*shown, strict=True))

        places, back = windows(grid, self.window)
        placed = np.indices(grid).reshape(len(grid), -1).T
        q = in_windows(self.query(x + self._sines(placed)), places)
        visible = in_windows(run, places)[..., :, None] == own[..., None, :]
        out = attend(q, self.key(keys), self.value(values), visible)
        return self.out(out.reshape(x.shape[0], -1, *out.shape[3:])[:, back])

    def _level(
        self, level: int, x: Array, there: Array, run: Array, grid: tuple[int, ...], cells: tuple[int, ...]
    ) -> tuple[Array, Array, Array]:
        """What keys and values are made of [B, W, S, D], and the run that sees each sample [B, W, S], −1 for none."""
        reach, samples = self.reach[level], self.samples[level]
        taps = [roi_taps(size, self.window, n, samples, reach) for size, n in zip(grid, cells, strict=True)]
        members, _ = windows(tuple(n * samples for n in cells), samples)

        def laid(x: Array) -> Array:
            return x.reshape(x.shape[0], *grid, *x.shape[2:])

        def flat(x: Array) -> Array:
            return x.reshape(x.shape[0], -1, *x.shape[1 + len(grid) :])

        total = flat(sampled(laid(there[..., None].astype(jnp.float32)), taps))
        mean = flat(sampled(laid(jnp.where(there[..., None], x, 0)), taps)) / jnp.where(total > 0, total, 1)
        mean = mean.astype(self.dtype)
        # Of tokens that are not there no id counts, as of places beyond the edge.
        info = jnp.iinfo(run.dtype)
        least = flat(among(laid(jnp.where(there, run, info.max)), taps, largest=False))
        most = flat(among(laid(jnp.where(there, run, info.min)), taps, largest=True))
        own = jnp.where((total[..., 0] > 0) & (least == most), least, -1)
        keys = mean + self._sines(middles(cells, self.window, samples, reach))
        keys += self.levels[level].astype(self.dtype)
        return in_windows(keys, members), in_windows(mean, members), in_windows(own, members)

    @nn.nowrap
    def _sines(self, places: np.ndarray) -> Array:
        return jnp.asarray(sines(places, self.dim) * self.position, self.dtype)


class HierarchicalWindowResampler(nn.Module):
    """A pyramid of maps → one grid of tokens, each from its window of every map.

    queries  sizes of the grid
    sets     learned queries of a window, put together in the end
    samples  of each level, along each axis of a window
    heads    H; as many of 64 features as fit unless given
    """

    dim: int
    queries: tuple[int, int] = (12, 12)
    sets: int = 4
    samples: tuple[int, ...] = (3, 3, 3)
    heads: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[Float[Array, "B _X _Y _F"]]) -> Float[Array, "B N D"]:
        """Maps [B, X, Y, F], each of any size → [B, N, D], the second axis of the grid fastest.

        Raises ZooError where there are not as many maps as levels.
        """
        if len(maps) != len(self.samples):
            raise ZooError(f"HierarchicalWindowResampler: got {len(maps)} maps, wanted {len(self.samples)}")
        heads, count = head_count("HierarchicalWindowResampler", self.dim, self.heads), math.prod(self.queries)
        width = self.dim // heads
        levels = self.param("levels", partitioned(nn.initializers.zeros, None, "embed"), (len(self.samples), self.dim))
        shared = norm("layer", dtype=self.dtype, name="map_norm")
        keys, values = [], []
        for level, (x, samples) in enumerate(zip(maps, self.samples, strict=True)):
            axes = ("embed", None)
            project = dense(self.dim, axes, bias=True, init=INIT, dtype=self.dtype, name=f"map_{level}")
            taps = [roi_taps(size, size / n, n, samples) for size, n in zip(x.shape[1:3], self.queries, strict=True)]
            members, _ = windows(tuple(n * samples for n in self.queries), samples)
            seen = sampled(shared(project(x)), taps).astype(self.dtype).reshape(x.shape[0], -1, self.dim)
            placed = jnp.asarray(sines(middles(self.queries, 1.0, samples), self.dim), self.dtype)
            keys.append(in_windows(seen + placed + levels[level].astype(self.dtype), members))
            values.append(in_windows(seen, members))

        query = self.param("queries", partitioned(INIT, None, None, "embed"), (count, self.sets, self.dim))
        places = np.indices(self.queries).reshape(2, -1).T
        asked = norm("layer", dtype=self.dtype, name="query_norm")(query) + sines(places, self.dim)[:, None]
        options: dict[str, Any] = {"bias": True, "dtype": self.dtype}
        q, k, v = (
            split_heads(self.dim, heads, width, **options, name=name)(given)
            for name, given in (
                ("query", jnp.broadcast_to(asked, (maps[0].shape[0], *asked.shape))),
                ("key", jnp.concatenate(keys, axis=2)),
                ("value", jnp.concatenate(values, axis=2)),
            )
        )
        out = attend(q, k, v, jnp.ones((q.shape[2], k.shape[2]), bool))
        out = merge_heads(heads, width, self.dim, **options, name="out")(out)
        out = norm("layer", dtype=self.dtype, name="set_norm")(out).reshape(*out.shape[:2], -1)
        joined = dense(self.dim, ("mlp", "embed"), bias=True, init=INIT, dtype=self.dtype, name="join")(out)
        scale = nn.initializers.normal(self.dim**-0.5)
        last = dense(self.dim, ("embed", "mlp"), init=scale, dtype=self.dtype, name="project")
        return last(norm("layer", dtype=self.dtype, name="joined_norm")(joined))
