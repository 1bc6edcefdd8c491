"""The linear-attention transformer that BIOT, TFM-Tokenizer and NeuroBOLT are made of.

Source: Shen et al., "Efficient Attention: Attention with Linear Complexities", 1812.01243, section 3; the layers around
it are those of the package linear-attention-transformer (MIT), by which the three are published.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from zoo.errors import ZooError
from zoo.layers.parameters import LIKE_TORCH, dense, like_torch_bias, merge_heads, norm, split_heads
from zoo.types import AnyArray, Array
from zoo.weights.keys import Key, Rule


class LinearTransformer(nn.Module):
    """x + dropout(attention(norm x)), then x + mlp(norm x), `depth` times, without a norm at the end.

    Queries are a softmax over their features, divided by √K; keys a softmax over the tokens; what a token gets is its
    query times Σ keyᵀ value. Every token sees every other and there are no positions: permuted tokens give the outputs
    permuted. Tokens where `valid [..., N]` is False are seen by none.

    depth, heads  layers, attention heads
    mlp_ratio     width of the MLP, exact GELU, in D
    dropout       of what attention gives, in training; stream "dropout"
    dtype         compute dtype; both softmaxes stay float32
    """

    depth: int
    heads: int = 8
    mlp_ratio: int = 4
    dropout: float = 0.2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*lead N D"], valid: Bool[AnyArray, "*lead N"] | None = None, *, train: bool = False
    ) -> Float[Array, "*lead N D"]:
        if x.shape[-1] % self.heads:
            raise ZooError(f"LinearTransformer: {x.shape[-1]} features do not divide into {self.heads} heads")
        stack = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layers = stack(self.heads, self.mlp_ratio, self.dropout if train else 0.0, self.dtype, name="layers")
        return layers(x.astype(self.dtype), valid)[0]

    @nn.nowrap
    def flops(self, tokens: int, dim: int) -> float:
        """Operations of one sequence of `tokens`, a multiply-add counting two."""
        layer = 4 * dim**2 + 2 * self.mlp_ratio * dim**2 + 2 * dim * (dim // self.heads)
        return 2.0 * self.depth * tokens * layer


class Layer(nn.Module):
    """One layer, the body of a scan over layers."""

    heads: int
    mlp_ratio: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "*lead N D"], valid: Bool[AnyArray, "*lead N"] | None
    ) -> tuple[Float[Array, "*lead N D"], None]:
        dim = x.shape[-1]
        width = dim // self.heads
        into = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", (0,), (1, 2))
        out_of = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", (0, 1), (2,))
        bias = like_torch_bias(dim)

        normal = norm("layer", epsilon=1e-5, dtype=self.dtype, name="attention_norm")(x)
        query, key, value = (
            split_heads(dim, self.heads, width, init=into, dtype=self.dtype, name=name)(normal)
            for name in ("query", "key", "value")
        )
        query = jax.nn.softmax(query.astype(jnp.float32), axis=-1) * width**-0.5
        key = key.astype(jnp.float32)
        if valid is not None:
            key = jnp.where(valid[..., None, None], key, -1e30)
        key = jax.nn.softmax(key, axis=-3)
        memory = jnp.einsum("...nhk,...nhv->...hkv", key.astype(self.dtype), value)
        seen = jnp.einsum("...nhk,...hkv->...nhv", query.astype(self.dtype), memory)
        attended = merge_heads(
            self.heads, width, dim, bias=True, init=out_of, bias_init=bias, dtype=self.dtype, name="out"
        )(seen)
        x = x + nn.Dropout(self.dropout, deterministic=not self.dropout)(attended)

        normal = norm("layer", epsilon=1e-5, dtype=self.dtype, name="mlp_norm")(x)
        hidden = dense(
            self.mlp_ratio * dim, bias=True, init=LIKE_TORCH, bias_init=bias, dtype=self.dtype, name="mlp_in"
        )(normal)
        wide = like_torch_bias(self.mlp_ratio * dim)
        out = dense(dim, ("mlp", "embed"), bias=True, init=LIKE_TORCH, bias_init=wide, dtype=self.dtype, name="mlp_out")
        return x + out(nn.gelu(hidden, approximate=False)), None


_THEIRS, _OURS = "layers.layers.{l}.", "params/layers/"

KEYS: tuple[Rule, ...] = (
    *(
        Key(f"{_THEIRS}0.fn.to_{name[0]}.weight", f"{_OURS}{name}/kernel[{{l}}]", "(h k) d -> d h k")
        for name in ("query", "key", "value")
    ),
    Key(f"{_THEIRS}0.fn.to_out.weight", f"{_OURS}out/kernel[{{l}}]", "d (h k) -> h k d"),
    Key(f"{_THEIRS}0.fn.to_out.bias", f"{_OURS}out/bias[{{l}}]"),
    Key(f"{_THEIRS}0.norm.weight", f"{_OURS}attention_norm/scale[{{l}}]"),
    Key(f"{_THEIRS}0.norm.bias", f"{_OURS}attention_norm/bias[{{l}}]"),
    Key(f"{_THEIRS}1.norm.weight", f"{_OURS}mlp_norm/scale[{{l}}]"),
    Key(f"{_THEIRS}1.norm.bias", f"{_OURS}mlp_norm/bias[{{l}}]"),
    Key(f"{_THEIRS}1.fn.fn.w1.weight", f"{_OURS}mlp_in/kernel[{{l}}]", "o i -> i o"),
    Key(f"{_THEIRS}1.fn.fn.w1.bias", f"{_OURS}mlp_in/bias[{{l}}]"),
    Key(f"{_THEIRS}1.fn.fn.w2.weight", f"{_OURS}mlp_out/kernel[{{l}}]", "o i -> i o"),
    Key(f"{_THEIRS}1.fn.fn.w2.bias", f"{_OURS}mlp_out/bias[{{l}}]"),
)
"""Of the package's LinearAttentionTransformer; `zoo.weights.keys.below` leads to it within a model."""
