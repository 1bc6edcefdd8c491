"""Convolutions: any, as PyTorch has them, and the short causal one before a recurrence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels.packing import runs
from zoo.layers.devices import on_devices
from zoo.layers.parameters import LIKE_TORCH, like_torch_bias, partitioned
from zoo.types import Array


class Convolution(nn.Module):
    """[B, *space, F] → [B, *space', features], over one or two axes: PyTorch's Conv1d and Conv2d, last axis first.

    Under a mesh each device convolves its own examples. The kernel is [*widths, F / groups, features].

    widths       of the kernel, one an axis
    strides, dilations, paddings
                 one an axis; padding is (before, after), a number for both, or all of it "same", the odd one after
    groups       how many sets of features do not see each other; F makes it depthwise, features · f to feature f
    max_norm     largest norm of the kernel of an output: it is used scaled down to that (EEGNet's constraint); 0: none
    kernel_init, bias_init
                 as PyTorch's begin unless given
    """

    features: int
    widths: Sequence[int]
    strides: Sequence[int] = ()
    dilations: Sequence[int] = ()
    paddings: str | Sequence[int | tuple[int, int]] = ()
    groups: int = 1
    bias: bool = True
    max_norm: float = 0.0
    kernel_init: Any = LIKE_TORCH
    bias_init: Any = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *space F"]) -> Float[Array, "B *spaces G"]:
        axes, inputs = len(self.widths), x.shape[-1] // self.groups
        shape = (*self.widths, inputs, self.features)
        kernel = self.param("kernel", partitioned(self.kernel_init, *[None] * len(shape)), shape)
        if self.max_norm:
            kernel = limited(kernel, self.max_norm, tuple(range(axes + 1)))
        y = convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            tuple(self.strides) or (1,) * axes,
            self._padding(),
            tuple(self.dilations) or (1,) * axes,
            self.groups,
        )
        if self.bias:
            init = self.bias_init or like_torch_bias(inputs * math.prod(self.widths))
            y = y + self.param("bias", partitioned(init, None), (self.features,)).astype(self.dtype)
        return y

    def _padding(self) -> list[tuple[int, int]]:
        spans = [
            (width - 1) * dilation
            for width, dilation in zip(self.widths, tuple(self.dilations) or (1,) * len(self.widths), strict=True)
        ]
        if self.paddings == "same":
            return [(span // 2, span - span // 2) for span in spans]
        given = tuple(self.paddings) or (0,) * len(spans)
        return [each if isinstance(each, tuple) else (int(each), int(each)) for each in given]


def convolve(
    x: Float[Array, "B *space F"],
    kernel: Float[Array, "*shape"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilations: Sequence[int],
    groups: int = 1,
) -> Float[Array, "B *spaces G"]:
    """`Convolution` with a given kernel [*widths, F / groups, G]."""
    axes = len(strides)
    letters = "HW"[:axes]

    def whole(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            tuple(strides),
            tuple(padding),
            rhs_dilation=tuple(dilations),
            feature_group_count=groups,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )

    # Left to the compiler, kernels of grouped convolutions over split batches get wrong gradients (jaxlib 0.10).
    return on_devices(
        whole,
        (x, kernel),
        (("batch", *[None] * (axes + 1)), (None,) * (axes + 2)),
        ("batch", *[None] * (axes + 1)),
    )


class TransposedConvolution(nn.Module):
    """[B, T, F] → [B, (T − 1) · stride − 2 · padding + width + more, features]: PyTorch's ConvTranspose1d.

    Each step is spread over `width` samples, `stride` apart from the next step's. The kernel is [width, F, features].

    padding  samples cut off at both ends
    more     samples that the end keeps of those (PyTorch's output_padding)
    """

    features: int
    width: int
    stride: int = 1
    padding: int = 0
    more: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B U G"]:
        # PyTorch counts the outputs of a transposed convolution as its fan-in.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2)
        shape = (self.width, x.shape[-1], self.features)
        kernel = self.param("kernel", partitioned(init, None, None, None), shape)
        ends = self.width - 1 - self.padding
        y = on_devices(
            lambda x, kernel: lax.conv_general_dilated(
                x,
                kernel,
                window_strides=(1,),
                padding=[(ends, ends + self.more)],
                lhs_dilation=(self.stride,),
                dimension_numbers=("NHC", "HIO", "NHC"),
            ),
            (x.astype(self.dtype), kernel[::-1].astype(self.dtype)),
            (("batch", None, None), (None, None, None)),
            ("batch", None, None),
        )
        bias = partitioned(like_torch_bias(self.width * self.features), None)
        return y + self.param("bias", bias, (self.features,)).astype(self.dtype)


def limited(kernel: Float[Array, "*shape"], most: float, axes: Sequence[int]) -> Float[Array, "*shape"]:
    """The kernel, scaled down where its norm over `axes` is above `most`."""
    norm = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(axes), keepdims=True) + 1e-24)
    return kernel * jnp.minimum(1.0, most / norm)


class ShortConvolution(nn.Module):
    """y_t = sum over j < width of kernel_j · x_{t−width+1+j} (+ bias), every feature on its own (Mamba, 2312.00752).

    Tokens before the sequence, of another segment, or that are not there count as zeros. kernel [width, F], its last
    row for the token itself.

    features, width   F and how many tokens are seen
    bias              whether there is one
    kernel_init       how it is drawn; uniform in ±width^-½ unless given, as PyTorch's Conv1d
    """

    features: int
    width: int = 4
    bias: bool = False
    kernel_init: Any = LIKE_TORCH
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.kernel = self.param("kernel", partitioned(self.kernel_init, None, "mlp"), (self.width, self.features))
        if self.bias:
            self.offset = self.param("bias", partitioned(nn.initializers.zeros, "mlp"), (self.features,))

    def __call__(
        self,
        x: Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T F"]:
        x = x.astype(self.dtype)
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        run = None if segment_ids is None else runs(segment_ids)
        kernel = self.kernel.astype(self.dtype)
        y = x * kernel[-1]
        for lag in range(1, min(self.width, x.shape[1])):
            earlier = jnp.pad(x[:, :-lag], ((0, 0), (lag, 0), (0, 0)))
            if run is not None:
                same = jnp.pad(run[:, :-lag], ((0, 0), (lag, 0)), constant_values=-1) == run
                earlier = jnp.where(same[..., None], earlier, 0)
            y += earlier * kernel[-1 - lag]
        return y + self.offset.astype(self.dtype) if self.bias else y

    def initial_state(self, batch: int) -> Float[Array, "B W F"]:
        """The last width − 1 tokens: none yet, so zeros."""
        return jnp.zeros((batch, self.width - 1, self.features), self.dtype)

    def step(
        self, x: Float[Array, "B F"], state: Float[Array, "B W F"]
    ) -> tuple[Float[Array, "B F"], Float[Array, "B W F"]]:
        """One token and the new state."""
        window = jnp.concatenate([state, x[:, None].astype(self.dtype)], axis=1)
        y = jnp.sum(window * self.kernel.astype(self.dtype), axis=1)
        return (y + self.offset.astype(self.dtype) if self.bias else y), window[:, 1:]
