"""Projections and normalisations whose parameters carry logical axis names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from zoo.errors import ZooError
from zoo.types import Array

LIKE_TORCH = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform in ±fan_in^-½: how PyTorch's Linear draws its kernel, and so how papers with code in it do."""


def like_torch_bias(inputs: int) -> Any:
    """Uniform in ±inputs^-½: how PyTorch draws the bias of a Linear or a convolution of so many inputs a sum."""

    def init(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return init


def partitioned(init: Any, *axes: str | None) -> Any:
    """The initialiser, its parameters boxed with logical axis names."""
    return nn.with_logical_partitioning(init, axes)


def fan_in(inputs: Sequence[int], outputs: Sequence[int], scale: float = 1.0) -> Any:
    """Truncated normal of variance scale / (product of the `inputs` axes)."""
    return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal", tuple(inputs), tuple(outputs))


def dense(
    features: int,
    axes: tuple[str | None, str | None] = ("embed", "mlp"),
    *,
    bias: bool = False,
    init: Any = None,
    bias_init: Any = nn.initializers.zeros,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.Dense:
    """[..., D] → [..., features]; `axes` are the kernel's logical ones."""
    return nn.Dense(
        features,
        use_bias=bias,
        kernel_init=partitioned(fan_in((0,), (1,)) if init is None else init, *axes),
        bias_init=partitioned(bias_init, axes[1]),
        dtype=dtype,
        name=name,
    )


def torch_linear(features: int, inputs: int, name: str) -> nn.Dense:
    """[..., inputs] → [..., features], whole on every device; it begins as PyTorch's Linear does."""
    return dense(features, (None, None), bias=True, init=LIKE_TORCH, bias_init=like_torch_bias(inputs), name=name)


def split_heads(
    dim: int,
    heads: int,
    width: int,
    *,
    bias: bool = False,
    init: Any = None,
    bias_init: Any = nn.initializers.zeros,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.Einsum:
    """[..., D] → [..., H, K]."""
    return nn.Einsum(
        (dim, heads, width),
        "...d,dhk->...hk",
        use_bias=bias,
        kernel_init=partitioned(fan_in((0,), (1, 2)) if init is None else init, "embed", "heads", "head_width"),
        bias_init=partitioned(bias_init, "heads", "head_width"),
        dtype=dtype,
        name=name,
    )


def merge_heads(
    heads: int,
    width: int,
    dim: int,
    *,
    bias: bool = False,
    init: Any = None,
    bias_init: Any = nn.initializers.zeros,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.Einsum:
    """[..., H, V] → [..., D]."""
    return nn.Einsum(
        (heads, width, dim),
        "...hk,hkd->...d",
        use_bias=bias,
        kernel_init=partitioned(fan_in((0, 1), (2,)) if init is None else init, "heads", "head_width", "embed"),
        bias_init=partitioned(bias_init, "embed"),
        dtype=dtype,
        name=name,
    )


def norm(
    kind: str,
    *,
    epsilon: float = 1e-6,
    axis: str | None = "embed",
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.Module:
    """`rms` or `layer` normalisation of the last axis, `axis` its logical name. Raises ZooError for another kind."""
    scale = partitioned(nn.initializers.ones, axis)
    if kind == "rms":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype, scale_init=scale, name=name)
    if kind == "layer":
        bias = partitioned(nn.initializers.zeros, axis)
        return nn.LayerNorm(epsilon=epsilon, dtype=dtype, scale_init=scale, bias_init=bias, name=name)
    raise ZooError(f"a norm is 'rms' or 'layer', got {kind!r}")
