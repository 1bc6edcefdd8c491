"""Softmax attention in many heads, of tokens over themselves or over a context, as PyTorch's MultiheadAttention is."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from zoo.layers.parameters import like_torch_bias, merge_heads, split_heads
from zoo.types import Array


class MultiHead(nn.Module):
    """What tokens [B, N, D] make of a context [B, M, E]: [B, N, D] (Vaswani et al., 1706.03762, section 3.2).

    heads, width  attention heads, features of each; width is D / heads unless given
    bias          of queries, keys and values; what leaves has one always
    dropout       of the attention weights, in training; stream "dropout"
    init, out_init
                  of the kernels [D, H, K] and [H, K, D]; as PyTorch's Linear unless given, as biases are
    dtype         compute dtype; the softmax is float32
    """

    heads: int
    width: int = 0
    bias: bool = True
    dropout: float = 0.0
    init: Any = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", (0,), (1, 2))
    out_init: Any = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", (0, 1), (2,))
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Float[Array, "B M E"],
        *,
        valid: Bool[Array, "B M"] | None = None,
        causal: bool = False,
        train: bool = False,
    ) -> Float[Array, "B N D"]:
        """valid: tokens of the context that are seen; where none is, all are. causal: token n sees tokens 0 to n."""
        dim = x.shape[-1]
        width = self.width or dim // self.heads

        def project(name: str, given: Array) -> Array:
            inputs = given.shape[-1]
            bias = like_torch_bias(inputs)
            return split_heads(
                inputs, self.heads, width, bias=self.bias, init=self.init, bias_init=bias, dtype=self.dtype, name=name
            )(given)

        query, key, value = project("query", x), project("key", context), project("value", context)
        score = jnp.einsum("bnhk,bmhk->bhnm", query, key, preferred_element_type=jnp.float32) * width**-0.5
        if valid is not None:
            score = jnp.where(valid[:, None, None], score, -1e30)
        if causal:
            score = jnp.where(jnp.tril(jnp.ones(score.shape[-2:], bool)), score, -1e30)
        weight = nn.Dropout(self.dropout, deterministic=not train)(jax.nn.softmax(score, axis=-1))
        mixed = jnp.einsum("bhnm,bmhk->bnhk", weight.astype(self.dtype), value)
        return merge_heads(
            self.heads,
            width,
            dim,
            bias=True,
            init=self.out_init,
            bias_init=like_torch_bias(self.heads * width),
            dtype=self.dtype,
            name="out",
        )(mixed)


def multi_head_flops(tokens: int, context: int, dim: int, features: int, inner: int) -> float:
    """Operations for N tokens of D features, M of a context of E, and H·K = inner; a multiply-add counts two."""
    return 2.0 * inner * (2 * tokens * dim + 2 * context * features + 2 * tokens * context)
