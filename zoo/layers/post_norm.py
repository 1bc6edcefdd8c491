"""The post-norm transformer of Du-IN, with normalised queries and keys.

Source: Vaswani et al., 1706.03762, section 3; queries and keys have layer norms of their own as in ViT-22B, 2302.05442;
sizes and initial values are those of Du-IN's official code (github.com/liulab-repository/Du-IN, MIT).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from zoo.layers.parameters import dense, merge_heads, norm, split_heads
from zoo.types import Array

NORMAL = nn.initializers.normal(0.02)
"""The code's `trunc_normal_` cuts at ±2, a hundred deviations away."""


class PostNormTransformer(nn.Module):
    """Sinusoids of time added, then `depth` blocks."""

    depth: int
    heads: int
    width: int
    mlp_ratio: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B A D"], train: bool) -> Float[Array, "B A D"]:
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.heads, self.width, self.mlp_ratio, self.dropout if train else 0.0, self.dtype, name="blocks")
        x = (x + sinusoids(*x.shape[1:])).astype(self.dtype)
        x = nn.with_logical_constraint(x, ("batch", None, None))
        return blocks(x, jnp.arange(1.0, self.depth + 1.0))[0]


class Block(nn.Module):
    """One post-norm layer, the body of a scan; `index` from 1. Its first weights are divided by √(2 · index)."""

    heads: int
    width: int
    mlp_ratio: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B A D"], index: Float[Array, ""]) -> tuple[Float[Array, "B A D"], None]:
        dim = x.shape[-1]

        def init(key: Array, shape: Any, dtype: DTypeLike = jnp.float32) -> Array:
            return NORMAL(key, shape, dtype) * jax.lax.rsqrt(2.0 * index)

        def normal(name: str, axis: str = "embed") -> nn.Module:
            return norm("layer", epsilon=1e-5, axis=axis, dtype=self.dtype, name=name)

        def drop(x: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=not self.dropout)(x)

        query, key, value = (
            split_heads(dim, self.heads, self.width, bias=True, init=init, dtype=self.dtype, name=name)(x)
            for name in ("query", "key", "value")
        )
        query, key = normal("query_norm", "head_width")(query), normal("key_norm", "head_width")(key)
        score = jnp.einsum("bnhk,bmhk->bhnm", query, key, preferred_element_type=jnp.float32) * self.width**-0.5
        weight = drop(jax.nn.softmax(score, axis=-1)).astype(self.dtype)
        mixed = jnp.einsum("bhnm,bmhk->bnhk", weight, value)
        out = merge_heads(self.heads, self.width, dim, bias=True, init=init, dtype=self.dtype, name="out")(mixed)
        x = normal("attention_norm")(x + out)

        hidden = dense(self.mlp_ratio * dim, bias=True, init=init, dtype=self.dtype, name="mlp_in")(x)
        out = dense(dim, ("mlp", "embed"), bias=True, init=init, dtype=self.dtype, name="mlp_out")(
            drop(nn.relu(hidden))
        )
        return normal("mlp_norm")(x + out), None


def sinusoids(count: int, dim: int) -> Float[np.ndarray, "A D"]:
    """Sine and cosine by turns of a / 10000^(2i / D) (1706.03762, section 3.5)."""
    angle = np.arange(count)[:, None] * np.exp(np.arange(0, dim, 2) * -np.log(1e4) / dim)
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(count, dim).astype(np.float32)
