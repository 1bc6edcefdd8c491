"""L2ViT: linear attention to everything and softmax attention inside windows, in turn, on a grid of tokens.

Source: Zheng, "The Linear Attention Resurrection in Vision Transformer" (2501.16182), and its code
(github.com/ChuanyangZheng/L2ViT, MIT).

`LocalWindow` and `GlobalLinear` are its two attentions as mixers, `L2ViT` the whole classifier. Where this differs from
the code: places with which it fills windows that overhang the grid are not seen, there they are zeros that take part
(at 224² none overhang); MLPs are drawn as the zoo's others; the mixers add their position encoding to the tokens they
are given, which a block has normalised, the code (and `L2ViT`) to the residual stream.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels.packing import runs
from zoo.errors import ZooError
from zoo.layers.devices import linear_attention, on_devices
from zoo.layers.mixer import Mixer, head_count
from zoo.layers.mlp import GeluMLP
from zoo.layers.parameters import dense, merge_heads, norm, partitioned, split_heads
from zoo.layers.residual import drop_path
from zoo.types import Array

INIT = nn.initializers.normal(0.02)
"""The code truncates at 100 deviations, which is to say not."""
EPSILON = 1e-5

VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2)},
    "small": {"dims": (96, 192, 384, 768), "depths": (2, 2, 18, 2)},
    "base": {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2)},
    "base_384": {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "window": 12},
}
"""Options of `L2ViT`: 29, 50, 89 and 89 million parameters with 1000 classes; the last for images of 384²."""


def batch_norm(dtype: DTypeLike, axis: str = "embed") -> nn.BatchNorm:
    """Over all but the features, as PyTorch's: momentum 0.1, running statistics in the collection "batch_stats".

    `axis` is the features' logical name.
    """
    scale, bias = (partitioned(init, axis) for init in (nn.initializers.ones, nn.initializers.zeros))
    return nn.BatchNorm(momentum=0.9, epsilon=EPSILON, dtype=dtype, scale_init=scale, bias_init=bias)


class GridConvolution(nn.Module):
    """y_p = bias + sum of kernel_o ⊙ x_{p+o} over the width^A places o around p, every feature on its own.

    Places outside the grid, of another segment, or that are not there count as zeros.

    features, width   F, and how many places are seen along each axis: an odd number
    axes              A, those of the grid
    kernel_init       how the kernel is drawn; the bias is 0
    """

    features: int
    width: int = 3
    axes: int = 2
    kernel_init: Any = INIT
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        if self.width < 1 or self.width % 2 == 0:
            raise ZooError(f"a convolution around its place has an odd width, got {self.width}")
        whole = (None,) * self.axes
        self.kernel = self.param(
            "kernel", partitioned(self.kernel_init, *whole, "embed"), ((self.width,) * self.axes + (self.features,))
        )
        self.bias = self.param("bias", partitioned(nn.initializers.zeros, "embed"), (self.features,))

    def __call__(
        self,
        x: Float[Array, "B T F"],
        grid: tuple[int, ...],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T F"]:
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        placed, kernel = x.astype(self.dtype).reshape(-1, *grid, self.features), self.kernel.astype(self.dtype)
        if segment_ids is None:
            # Left to the compiler (of jax 0.10 and 0.12) the kernel's gradient is as many times too large as devices
            # hold the same part of x.
            whole = (None,) * self.axes
            axes = ("batch", *whole, "mlp")
            y = on_devices(self._everywhere, (placed, kernel), (axes, (*whole, "mlp")), axes)
        else:
            y = self._within(placed, runs(segment_ids).reshape(-1, *grid), kernel)
        return y.reshape(x.shape) + self.bias.astype(self.dtype)

    @nn.nowrap
    def _everywhere(self, x: Array, kernel: Array) -> Array:
        space = "XYZ"[: self.axes]
        layout = (f"N{space}C", f"{space}IO", f"N{space}C")
        options: dict[str, Any] = {"dimension_numbers": layout, "feature_group_count": x.shape[-1]}
        return lax.conv_general_dilated(x, kernel[..., None, :], (1,) * self.axes, "SAME", **options)

    def _within(self, x: Array, run: Array, kernel: Array) -> Array:
        """The sum over neighbours of the same run, one o after the other."""
        sides = ((self.width // 2,) * 2,) * self.axes
        padded = jnp.pad(x, ((0, 0), *sides, (0, 0)))
        runs_around = jnp.pad(run, ((0, 0), *sides), constant_values=-1)

        @jax.checkpoint
        def add(y: Array, each: tuple[Array, Array]) -> tuple[Array, None]:
            offset, weight = each
            start = (0, *offset)
            same = lax.dynamic_slice(runs_around, start, run.shape) == run
            return y + jnp.where(same[..., None], lax.dynamic_slice(padded, (*start, 0), x.shape), 0) * weight, None

        offsets = jnp.asarray(np.indices((self.width,) * self.axes).reshape(self.axes, -1).T, jnp.int32)
        return lax.scan(add, jnp.zeros_like(x), (offsets, kernel.reshape(-1, self.features)))[0]


class Concentration(nn.Module):
    """The local concentration module: convolution 7×7 → GELU → batch norm → convolution 7×7, each feature on its own.

    Tokens of another segment, or that are not there, are zeros to it and stay out of the statistics, which are those of
    all other tokens of a batch where `train`, and else running ones.
    """

    features: int
    width: int = 7
    axes: int = 2
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.first, self.second = (
            GridConvolution(self.features, self.width, self.axes, dtype=self.dtype) for _ in range(2)
        )
        self.norm = batch_norm(self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T F"],
        grid: tuple[int, ...],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T F"]:
        x = jax.nn.gelu(self.first(x, grid, segment_ids=segment_ids, mask=mask), approximate=False)
        x = self.norm(x, use_running_average=not train, mask=None if mask is None else mask[..., None])
        return self.second(x, grid, segment_ids=segment_ids, mask=mask)


class GridMixer(Mixer):
    """A mixer of tokens that lie on a grid, no matter in which direction, by attention of some kind.

    grid       sizes of one to three axes whose product is T, the last axis fastest; () is time alone
    heads      H; as many of 32 features as fit unless given
    bias       on the projections to queries, keys and values; the output has one in any case
    """

    causal: bool = False
    grid: tuple[int, ...] = ()
    heads: int | None = None
    bias: bool = True

    ways = (False,)

    def setup(self) -> None:
        if len(self.grid) > 3:
            raise ZooError(f"{type(self).__name__}: grid {self.grid}: wanted at most 3 axes")
        heads = head_count(type(self).__name__, self.dim, self.heads, 32)
        width = self.dim // heads
        self.query, self.key, self.value = (
            split_heads(self.dim, heads, width, bias=self.bias, init=INIT, dtype=self.dtype) for _ in range(3)
        )
        self.out = merge_heads(heads, width, self.dim, bias=True, init=INIT, dtype=self.dtype)

    @nn.nowrap
    def axes(self) -> int:
        """How many axes the grid has."""
        return max(1, len(self.grid))

    @nn.nowrap
    def sizes(self, length: int) -> tuple[int, ...]:
        """The grid of `length` tokens. Raises ZooError where it has another number of places."""
        grid = self.grid or (length,)
        if math.prod(grid) != length:
            raise ZooError(f"{type(self).__name__}: grid {grid} has not the {length} places of the input")
        return grid


class Conditional(GridMixer):
    """One that knows places by a convolution whose result is added to the tokens first (2102.10882).

    position   its width; 0 leaves it out
    """

    position: int = 3

    def setup(self) -> None:
        super().setup()
        if self.position:
            self.around = GridConvolution(self.dim, self.position, self.axes(), dtype=self.dtype)

    def placed(self, x: Array, segment_ids: Array | None, mask: Array | None) -> Array:
        """The tokens with what tells their places."""
        if not self.position:
            return x
        return x + self.around(x, self.sizes(x.shape[1]), segment_ids=segment_ids, mask=mask)


class LocalWindow(Conditional):
    """Softmax attention among the tokens of a window; windows stand side by side, none is shifted.

    window   tokens along each axis
    """

    window: int = 7

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        x = self.placed(x, segment_ids, mask)
        places, back = windows(self.sizes(x.shape[1]), self.window)
        q, k, v = (in_windows(project(x), places) for project in (self.query, self.key, self.value))
        seen = jnp.asarray(places < x.shape[1]) if mask is None else in_windows(mask, places)
        visible = jnp.broadcast_to(seen[..., None, :], (*seen.shape, seen.shape[-1]))
        if segment_ids is not None:
            run = in_windows(runs(segment_ids), places)
            visible &= run[..., :, None] == run[..., None, :]
        out = attend(q, k, v, visible)
        return self.out(out.reshape(x.shape[0], -1, *out.shape[3:])[:, back])


class GlobalLinear(Conditional):
    """out_t = τ · (sum_j relu(q_t) · relu(k_j) v_j) / max(sum_j relu(q_t) · relu(k_j), clamp) for every head.

    τ is learned for each head, at first K^-½. The denominator's bound is the code's, for stability; it meets sums that
    are not scaled, and so depends on how many tokens there are and how wide heads are.

    concentrate   width of the convolutions of the local concentration module, whose result on the norm of tokens and
                  attention is added ("enhanced" linear attention); 0 leaves it out
    clamp         the least a denominator may be
    """

    concentrate: int = 7
    clamp: float = 100.0

    def setup(self) -> None:
        super().setup()
        heads = head_count("GlobalLinear", self.dim, self.heads, 32)
        start = nn.initializers.constant((self.dim // heads) ** -0.5)
        self.temperature = self.param("temperature", partitioned(start, "heads"), (heads,))
        if self.concentrate:
            self.norm = norm("layer", epsilon=EPSILON, dtype=self.dtype)
            self.concentration = Concentration(self.dim, self.concentrate, self.axes(), dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        x = self.placed(x, segment_ids, mask)
        q, k, v = jax.nn.relu(self.query(x)), jax.nn.relu(self.key(x)), self.value(x)
        if mask is not None:
            k = jnp.where(mask[..., None, None], k, 0)
        # The sum of keys is one more value, which is always 1.
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        summed, _ = linear_attention(q, k, v, scale=1.0, causal=False, segment_ids=segment_ids)
        summed = summed.astype(jnp.float32)
        out = self.temperature[:, None] * summed[..., :-1] / jnp.maximum(summed[..., -1:], self.clamp)
        y = self.out(out.astype(self.dtype))
        if not self.concentrate:
            return y
        given: dict[str, Any] = {"segment_ids": segment_ids, "mask": mask, "train": train}
        return y + self.concentration(self.norm(x + y), self.sizes(x.shape[1]), **given)


class L2ViT(nn.Module):
    """Images [B, X, Y, C] → class scores [B, classes].

    A stem and, before every further stage, a norm and a convolution halve the resolution (the stem twice). Layers of a
    stage are local and global in turn, heads have 32 features, MLPs 4 times the width.

    dims, depths   features and layers of each stage
    window         of local attention
    drop_path      stochastic-depth rate of the last layer; earlier ones in proportion. Drawn from "dropout"
    """

    classes: int = 1000
    dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    window: int = 7
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "B X Y C"], *, train: bool = False) -> Float[Array, "B classes"]:
        rates = iter(np.linspace(0.0, self.drop_path, sum(self.depths)))
        x = image.astype(self.dtype)
        for stage, (dim, depth) in enumerate(zip(self.dims, self.depths, strict=True)):
            x = self._stem(x, dim, train) if stage == 0 else self._halved(x, dim)
            batch, *grid, _ = x.shape
            tokens = x.reshape(batch, -1, dim)
            for layer in range(depth):
                tokens = self._layer(tokens, tuple(grid), bool(layer % 2), next(rates), train)
            x = tokens.reshape(x.shape)
        pooled = jnp.mean(self._norm()(x), axis=(1, 2))
        return dense(self.classes, ("embed", None), bias=True, init=INIT, dtype=self.dtype, name="head")(pooled)

    def _stem(self, x: Array, dim: int, train: bool) -> Array:
        x = self._convolved(_whole(x, 4), dim // 2, 3, ((1, 1), (1, 1)))
        x = jax.nn.relu(batch_norm(self.dtype)(x, use_running_average=not train))
        x = self._convolved(x, dim, 3, ((1, 1), (1, 1)))
        return self._norm()(batch_norm(self.dtype)(x, use_running_average=not train))

    def _halved(self, x: Array, dim: int) -> Array:
        return self._convolved(_whole(self._norm()(x), 2), dim, 2, "VALID")

    def _convolved(self, x: Array, features: int, width: int, padding: Any) -> Array:
        kernel, bias = partitioned(INIT, None, None, None, "embed"), partitioned(nn.initializers.zeros, "embed")
        options = {"strides": 2, "padding": padding, "kernel_init": kernel, "bias_init": bias, "dtype": self.dtype}
        return nn.Conv(features, (width, width), **options)(x)

    def _norm(self) -> nn.Module:
        return norm("layer", epsilon=EPSILON, dtype=self.dtype)

    def _layer(self, x: Array, grid: tuple[int, ...], everywhere: bool, rate: float, train: bool) -> Array:
        dim = x.shape[-1]

        def drop(branch: Array) -> Array:
            if train and rate > 0 and self.has_rng("dropout"):
                return drop_path(branch, rate, self.make_rng("dropout"))
            return branch

        x += GridConvolution(dim, dtype=self.dtype)(x, grid)
        given: dict[str, Any] = {"dim": dim, "grid": grid, "position": 0, "dtype": self.dtype}
        if everywhere:
            x += drop(GlobalLinear(**given, concentrate=0)(self._norm()(x)))
            x += drop(Concentration(dim, dtype=self.dtype)(self._norm()(x), grid, train=train))
        else:
            x += drop(LocalWindow(**given, window=self.window)(self._norm()(x)))
            x += GridConvolution(dim, dtype=self.dtype)(x, grid)
        return x + drop(GeluMLP(dim, dtype=self.dtype)(self._norm()(x)))


def windows(grid: tuple[int, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each window [W, size^A], T where it overhangs the grid; where among these each is [T].

    Raises ZooError for a window of nothing.
    """
    if size < 1:
        raise ZooError(f"a window has at least 1 token along each axis, got {size}")
    place = np.indices(grid).reshape(len(grid), -1)
    which = np.ravel_multi_index(tuple(place // size), tuple(-(-np.asarray(grid) // size)))
    inside = np.ravel_multi_index(tuple(place % size), (size,) * len(grid))
    members = np.full((which.max() + 1, size ** len(grid)), place.shape[1])
    members[which, inside] = np.arange(place.shape[1])
    return members, which * size ** len(grid) + inside


def in_windows(x: Array, places: np.ndarray) -> Array:
    """[B, T, ...] → [B, W, S, ...], zeros (False) where a window overhangs."""
    padded = jnp.pad(x, ((0, 0), (0, 1), *((0, 0),) * (x.ndim - 2)))
    return padded[:, places]


def attend(
    q: Float[Array, "B W S H K"],
    k: Float[Array, "B W N H K"],
    v: Float[Array, "B W N H V"],
    visible: Bool[Array, "... S N"],
) -> Float[Array, "B W S H V"]:
    """Softmax attention inside every window to the keys that are visible, 0 where none is; scores float32."""
    scores = jnp.einsum("bwshk,bwnhk->bwhsn", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[..., None, :, :], scores, -jnp.inf)
    most = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min))
    p = jnp.exp(scores - most)
    total = jnp.sum(p, axis=-1, keepdims=True)
    p /= jnp.where(total > 0, total, 1)
    return jnp.einsum("bwhsn,bwnhv->bwshv", p.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(v.dtype)


def _whole(x: Array, size: int) -> Array:
    """Zeros to the right and below, up to a multiple of `size`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, -x.shape[2] % size), (0, 0)))
