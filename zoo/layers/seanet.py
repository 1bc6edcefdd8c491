"""SEANet: the convolutional encoder and decoder of SoundStream and EnCodec, in the form that BrainTokenizer takes over.

Source: EnCodec, 2210.13438, section 3.1, and its code (MIT); the sizes are BrainTokenizer's (2505.18185). Convolutions
are weight-normed (1602.07868), not causal, their input reflected at both ends, the odd sample on the left. Sequences
are [rows, steps, features].

Convolutions are written as one matmul over stacked windows: on the CPU this is as fast as XLA's own, several times
faster where windows are long, and it splits over devices as any matmul does. Kernels are PyTorch's transposed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Float

from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, like_torch_bias, partitioned
from zoo.types import Array

_LIKE_TORCH_TRANSPOSED = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2)
"""PyTorch counts the outputs of a transposed convolution as its fan-in."""


class Convolution(nn.Module):
    """[rows, steps, inputs] → [rows, steps / stride, features], steps a multiple of the stride.

    The kernel of output f is length_f · direction_f / |direction_f|.
    """

    inputs: int
    features: int
    width: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "R T F"]) -> Float[Array, "R A G"]:
        kernel = _normed(self, LIKE_TORCH, (self.width, self.inputs, self.features), (0, 1)).astype(self.dtype)
        bias = _bias(self, self.features, self.width * self.inputs).astype(self.dtype)
        left, right = _ends(self.width, self.stride)
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (left, right), (0, 0)), mode="reflect")
        steps = (x.shape[1] - self.width) // self.stride + 1
        reach = (steps - 1) * self.stride + 1
        windows = jnp.concatenate([x[:, tap : tap + reach : self.stride] for tap in range(self.width)], axis=-1)
        return windows @ kernel.reshape(-1, self.features) + bias


class TransposedConvolution(nn.Module):
    """[rows, steps, inputs] → [rows, steps · stride, features], each step spread over 2 · stride samples.

    The kernel of input i is length_i · direction_i / |direction_i|: of inputs, as PyTorch's weight norm has it.
    """

    inputs: int
    features: int
    stride: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "R A F"]) -> Float[Array, "R T G"]:
        shape = (2 * self.stride, self.inputs, self.features)
        kernel = _normed(self, _LIKE_TORCH_TRANSPOSED, shape, (0, 2)).astype(self.dtype)
        bias = _bias(self, self.features, 2 * self.stride * self.features).astype(self.dtype)
        early, late = jnp.einsum("rai,hsio->hraso", x.astype(self.dtype), kernel.reshape(2, self.stride, *shape[1:]))
        y = jnp.pad(early, ((0, 0), (0, 1), (0, 0), (0, 0))) + jnp.pad(late, ((0, 0), (1, 0), (0, 0), (0, 0)))
        left, right = _ends(2 * self.stride, self.stride)
        y = y.reshape(x.shape[0], -1, self.features)
        return y[:, left : y.shape[1] - right] + bias


class ResidualUnit(nn.Module):
    """conv1(x) + conv1(ELU(conv3(ELU(x)))), half as wide inside."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "R T F"]) -> Float[Array, "R T F"]:
        wide, narrow = self.features, self.features // 2
        inner = Convolution(wide, narrow, 3, dtype=self.dtype, name="in")(nn.elu(x))
        branch = Convolution(narrow, wide, 1, dtype=self.dtype, name="out")(nn.elu(inner))
        return Convolution(wide, wide, 1, dtype=self.dtype, name="shortcut")(x) + branch


class ResidualLSTM(nn.Module):
    """x + LSTM(x), `layers` deep, states from zero; gates in PyTorch's order, with its two biases a layer.

    The matmuls of the inputs are done for all steps at once. States are float32.
    """

    features: int
    layers: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "R A F"]) -> Float[Array, "R A F"]:
        size = self.features

        def parameter(name: str, *shape: int) -> Array:
            axes = ("layers", *(None,) * len(shape))
            return self.param(name, partitioned(like_torch_bias(size), *axes), (self.layers, *shape))

        kernel, bias = parameter("input", size, 4 * size), parameter("input_bias", 4 * size)
        recurrent, recurrent_bias = parameter("recurrent", size, 4 * size), parameter("recurrent_bias", 4 * size)
        steps = jnp.moveaxis(x.astype(jnp.float32), 1, 0)
        for layer in range(self.layers):
            weights = recurrent[layer].astype(self.dtype)
            given = steps.astype(self.dtype) @ kernel[layer].astype(self.dtype)
            given = given.astype(jnp.float32) + bias[layer] + recurrent_bias[layer]

            def step(state: tuple[Array, Array], given: Array, weights: Array = weights) -> Any:
                hidden, cell = state
                gates = given + (hidden.astype(self.dtype) @ weights).astype(jnp.float32)
                enter, forget, new, leave = jnp.split(gates, 4, axis=-1)
                cell = nn.sigmoid(forget) * cell + nn.sigmoid(enter) * jnp.tanh(new)
                hidden = nn.sigmoid(leave) * jnp.tanh(cell)
                return (hidden, cell), hidden

            start = jnp.zeros_like(steps[0])
            _, steps = lax.scan(step, (start, start), given)
        return x + jnp.moveaxis(steps, 0, 1).astype(x.dtype)


class SEANetEncoder(nn.Module):
    """Samples [rows, T] → features [rows, T / hop, D], hop the product of the ratios.

    dim      D
    filters  features of the first convolution; they double at each downsampling
    ratios   strides of the downsamplings, in their order; their kernels are twice as wide
    width    of the first and the last kernel
    """

    dim: int
    filters: int = 32
    ratios: Sequence[int] = (2, 4, 8)
    width: int = 5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, samples: Float[Array, "R T"]) -> Float[Array, "R A D"]:
        features = self.filters
        x = Convolution(1, features, self.width, dtype=self.dtype, name="first")(samples[..., None])
        for stage, ratio in enumerate(self.ratios):
            x = nn.elu(ResidualUnit(features, dtype=self.dtype, name=f"unit{stage}")(x))
            down = Convolution(features, 2 * features, 2 * ratio, ratio, dtype=self.dtype, name=f"down{stage}")
            x, features = down(x), 2 * features
        x = nn.elu(ResidualLSTM(features, dtype=self.dtype, name="lstm")(x))
        return Convolution(features, self.dim, self.width, dtype=self.dtype, name="last")(x)


class SEANetDecoder(nn.Module):
    """Features [rows, A, D] → samples [rows, A · hop]: the encoder mirrored, its options those of the encoder."""

    dim: int
    filters: int = 32
    ratios: Sequence[int] = (2, 4, 8)
    width: int = 5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "R A D"]) -> Float[Array, "R T"]:
        features = self.filters * 2 ** len(self.ratios)
        x = Convolution(self.dim, features, self.width, dtype=self.dtype, name="first")(x)
        x = ResidualLSTM(features, dtype=self.dtype, name="lstm")(x)
        for stage, ratio in enumerate(reversed(self.ratios)):
            up = TransposedConvolution(features, features // 2, ratio, dtype=self.dtype, name=f"up{stage}")
            x, features = up(nn.elu(x)), features // 2
            x = ResidualUnit(features, dtype=self.dtype, name=f"unit{stage}")(x)
        return Convolution(features, 1, self.width, dtype=self.dtype, name="last")(nn.elu(x))[..., 0]


def seanet_flops(dim: int, filters: int, ratios: Sequence[int], width: int, samples: int) -> float:
    """Operations of an encoder or a decoder, which have equally many, on one row of `samples`, without biases."""
    steps, features = samples, filters
    multiplied = steps * width * features
    for ratio in ratios:
        multiplied += steps * features**2 * 3
        steps //= ratio
        multiplied += steps * 4 * ratio * features**2
        features *= 2
    return 2.0 * (multiplied + steps * (16 * features**2 + width * features * dim))


def check_seanet(ratios: Sequence[int], width: int, samples: int) -> None:
    """Raises ZooError for windows of `samples` that these options cannot take."""
    hop = math.prod(ratios)
    least = (width // 2 + 1) * hop
    if samples % hop or samples < least:
        raise ZooError(f"SEANet window: got {samples} samples, wanted a multiple of {hop}, at least {least}")


def _ends(width: int, stride: int) -> tuple[int, int]:
    """How many samples a kernel wants before the first and after the last."""
    total = width - stride
    return total - total // 2, total // 2


def _normed(module: nn.Module, init: Any, shape: tuple[int, int, int], axes: tuple[int, int]) -> Array:
    """A kernel whose norm over `axes`, one each for what is left, is a parameter of its own."""
    direction = module.param("direction", partitioned(init, None, None, None), shape)
    norm = jnp.sqrt(jnp.sum(jnp.square(direction), axes, keepdims=True))
    length = module.param("length", partitioned(lambda _: norm.ravel(), None))
    return direction / norm * length.reshape(norm.shape)


def _bias(module: nn.Module, features: int, fan_in: int) -> Array:
    return module.param("bias", partitioned(like_torch_bias(fan_in), None), (features,))
