"""Filters over time and weights over channels: how convolutional classifiers of EEG begin.

They are written as few large matrix products: a filter on each of C channels, then weights over channels, is the same
as the weights first and the filter on what is left, and kernels over time and over channels multiply to one.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from zoo.layers.convolution import convolve, limited
from zoo.layers.parameters import partitioned
from zoo.types import Array

GLOROT = nn.initializers.glorot_uniform()


def batch_norm(train: bool, epsilon: float, momentum: float = 0.9, name: str | None = None) -> nn.BatchNorm:
    """Batch normalisation of the last axis; `momentum` is Flax's, so 1 minus PyTorch's."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=momentum,
        epsilon=epsilon,
        scale_init=partitioned(nn.initializers.ones, None),
        bias_init=partitioned(nn.initializers.zeros, None),
        name=name,
    )


def filtered(x: Float[Array, "B S F"], kernel: Float[Array, "W F"]) -> Float[Array, "B T F"]:
    """y_t = Σ_w kernel_w · x_{t+w}, every feature with a filter of its own, T = S − W + 1.

    A block of as many outputs as the kernel is long is one product with a banded matrix: twice the operations of the
    convolution, and on a CPU a tenth of the time of XLA's depthwise one.
    """
    width, features = kernel.shape
    times = x.shape[1] - width + 1
    block = max(width, 32)
    count = -(-times // block)
    span = (count + 1) * block
    x = jnp.pad(x, ((0, 0), (0, max(0, span - x.shape[1])), (0, 0)))[:, :span]
    blocks = x.reshape(x.shape[0], count + 1, block, features)
    both = jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], axis=2)
    # Row t of the band is the kernel, t later: repeated rows of 2·block + 1 numbers, read in rows of 2·block.
    row = jnp.pad(kernel, ((0, 2 * block + 1 - width), (0, 0)))
    band = jnp.tile(row, (block, 1))[: 2 * block * block].reshape(block, 2 * block, features)
    return jnp.einsum("bmsf,tsf->bmtf", both, band).reshape(x.shape[0], -1, features)[:, :times]


def moments(
    signal: Float[Array, "B C S"], kernel: Float[Array, "W F"]
) -> tuple[Float[Array, " F"], Float[Array, " F"]]:
    """Mean and variance, over examples, channels and times, of what `filtered` makes of every channel.

    Without making it: the variance is kernelᵀ R kernel, R the mean products of the signal's samples up to W apart.
    As any variance from sums it loses digits where channels' offsets are far larger than what varies.
    """
    width = kernel.shape[0]
    times = signal.shape[-1] - width + 1
    block = max(width, 32)
    count = -(-signal.shape[-1] // block)
    padded = jnp.pad(signal, ((0, 0), (0, 0), (0, (count + 1) * block - signal.shape[-1])))
    blocks = padded.reshape(*signal.shape[:2], count + 1, block)
    both = jnp.concatenate([blocks[:, :, :-1], blocks[:, :, 1:]], axis=-1)
    products = jnp.einsum("bcml,bcmr->mlr", blocks[:, :, :-1], both)
    # [m, l, r] → [m, l, lag = r − l], by reading rows of 2·block in rows of 2·block + 1.
    flat = jnp.pad(products.reshape(count, -1), ((0, 0), (0, block)))
    lagged = flat.reshape(count * block, 2 * block + 1)[: signal.shape[-1], :width]
    # Sample j of the kernel meets samples j to j + times − 1 of the signal.
    starts = np.arange(width)[:, None]
    meets = (np.arange(signal.shape[-1]) >= starts) & (np.arange(signal.shape[-1]) < starts + times)
    examples = signal.shape[0] * signal.shape[1] * times
    summed = jnp.asarray(meets, jnp.float32) / examples
    sums = summed @ lagged
    first, second = np.indices((width, width))
    mean_products = sums[np.minimum(first, second), np.abs(first - second)]
    mean = (summed @ signal.sum((0, 1))) @ kernel
    square = jnp.einsum("jf,jk,kf->f", kernel, mean_products, kernel)
    return mean, jnp.maximum(square - jnp.square(mean), 0)


class FilterBank(nn.Module):
    """[B, C, T] → [B, T', filters · depth]: `filters` filters over time of every channel, batch normalisation of each
    filter, and of each `depth` sums over channels. EEGNet's first block up to the second normalisation.

    width, paddings  of the filters; samples of silence before and after the window
    max_norm         largest norm of the weights of a sum; 0: none
    epsilon, momentum
                     of the normalisation; its statistics are in "batch_stats"
    """

    filters: int
    width: int
    depth: int
    paddings: tuple[int, int] = (0, 0)
    max_norm: float = 0.0
    epsilon: float = 1e-3
    momentum: float = 0.99
    temporal_init: Any = GLOROT
    spatial_init: Any = GLOROT

    @nn.compact
    def __call__(self, signal: Float[Array, "B C T"], train: bool) -> Float[Array, "B _ _"]:
        channels, filters = signal.shape[1], self.filters

        def parameter(name: str, init: Any, *shape: int) -> Array:
            return self.param(name, partitioned(init, *[None] * len(shape)), shape)

        kernel = parameter("temporal", self.temporal_init, self.width, filters)
        spatial = parameter("spatial", self.spatial_init, channels, filters, self.depth)
        scale = parameter("scale", nn.initializers.ones, filters)
        bias = parameter("bias", nn.initializers.zeros, filters)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, filters)
        running_variance = self.variable("batch_stats", "var", jnp.ones, filters)
        if self.max_norm:
            spatial = limited(spatial, self.max_norm, (0,))

        signal = jnp.pad(signal, ((0, 0), (0, 0), self.paddings))
        mean, variance = running_mean.value, running_variance.value
        if train:
            mean, variance = moments(signal, kernel)
            if not self.is_initializing():
                kept = self.momentum
                running_mean.value = kept * running_mean.value + (1 - kept) * mean
                running_variance.value = kept * running_variance.value + (1 - kept) * variance
        scale = scale / jnp.sqrt(variance + self.epsilon)
        sums = jnp.einsum("bct,cg->btg", signal, spatial.reshape(channels, -1))
        y = filtered(sums, jnp.repeat(kernel * scale, self.depth, axis=1))
        # The normalisation's offset is the same in every channel, so each sum has it as often as its weights say.
        return y + (spatial.sum(0) * (bias - mean * scale)[:, None]).reshape(-1)


class TemporalSpatial(nn.Module):
    """[B, C, T] → [B, T − width + 1, features]: `filters` filters over time of every channel, then `features` sums over
    channels and filters, nothing between: how Schirrmeister et al. (2017) begin.

    filters, width   F and the samples of each
    spatial_bias     whether the sums have an offset of their own
    bias_inits       initial values of the two offsets
    """

    filters: int
    width: int
    features: int
    spatial_bias: bool = False
    temporal_init: Any = GLOROT
    spatial_init: Any = GLOROT
    bias_inits: tuple[Any, Any] = (nn.initializers.zeros, nn.initializers.zeros)

    @nn.compact
    def __call__(self, signal: Float[Array, "B C T"]) -> Float[Array, "B _ _"]:
        channels = signal.shape[1]

        def parameter(name: str, init: Any, *shape: int) -> Array:
            return self.param(name, partitioned(init, *[None] * len(shape)), shape)

        temporal = parameter("temporal", self.temporal_init, self.width, self.filters)
        temporal_bias = parameter("temporal_bias", self.bias_inits[0], self.filters)
        spatial = parameter("spatial", self.spatial_init, channels, self.filters, self.features)
        kernel = jnp.einsum("wi,cio->wco", temporal, spatial)
        offset = jnp.einsum("i,cio->o", temporal_bias, spatial)
        if self.spatial_bias:
            offset += parameter("spatial_bias", self.bias_inits[1], self.features)
        return convolve(signal.swapaxes(1, 2), kernel, (1,), ((0, 0),), (1,)) + offset


def average_pool(x: Float[Array, "B T F"], size: int, stride: int) -> Float[Array, "B A F"]:
    """Means of `size` times, `stride` apart; what is left over at the end is not read."""
    count = (x.shape[1] - size) // stride + 1
    if size == stride:
        return x[:, : count * size].reshape(x.shape[0], count, size, -1).mean(2)
    part = int(np.gcd(size, stride))
    parts = (count - 1) * stride // part + size // part
    sums = x[:, : parts * part].reshape(x.shape[0], parts, part, -1).sum(2)
    starts = np.arange(count)[:, None] * (stride // part)
    inside = (np.arange(parts) >= starts) & (np.arange(parts) < starts + size // part)
    return jnp.einsum("ap,bpf->baf", inside.astype(np.float32) / size, sums)


def max_pool(x: Float[Array, "B T F"], size: int) -> Float[Array, "B A F"]:
    """Largest of each `size` times; what is left over at the end is not read. Equals share the gradient."""
    count = x.shape[1] // size
    return x[:, : count * size].reshape(x.shape[0], count, size, -1).max(2)
