"""A stack of Conformer layers, or of plain transformer ones, over tokens some of which may not be there.

Source: Gulati et al., "Conformer", 2005.08100, section 2, with layer norms in place of its batch norm, so that examples
do not mix, rotary positions in place of relative ones, and GELU in its feed-forward halves; without a convolution the
pre-norm transformer layer (2002.04745).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from zoo.layers.convolution import ShortConvolution
from zoo.layers.mixer import create_mixer
from zoo.layers.mlp import GeluMLP
from zoo.layers.parameters import dense, norm
from zoo.types import Array


class Stack(nn.Module):
    """`depth` layers, each `Layer(*options)`, scanned, then a norm."""

    depth: int
    options: tuple[int, int, int, float, DTypeLike]

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], here: Bool[Array, "B N"], *, train: bool) -> Float[Array, "B N D"]:
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x = layers(*self.options, name="layers")(x, here, train)[0]
        return norm("layer", epsilon=1e-5, dtype=self.options[-1], name="norm")(x)


class Layer(nn.Module):
    """A pre-norm transformer layer, x += attention(norm x), x += mlp(norm x); with a `kernel`, a Conformer's:

    x += ½ mlp(norm x), attention, x += convolution(norm x), x += ½ mlp(norm x), norm. The convolution is a gated linear
    unit, each feature alone over `kernel` tokens, norm, swish, linear.
    """

    heads: int
    hidden: int
    kernel: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], here: Bool[Array, "B N"], train: bool) -> tuple[Array, None]:
        dim = x.shape[-1]

        def normed(name: str, x: Array) -> Array:
            return norm("layer", epsilon=1e-5, dtype=self.dtype, name=name)(x)

        def dropped(x: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=not train)(x)

        def fed(name: str, x: Array) -> Array:
            return dropped(GeluMLP(dim, self.hidden, self.dtype, name=name)(normed(f"{name}_norm", x)))

        if self.kernel:
            x = x + 0.5 * fed("first_mlp", x)
        attention = create_mixer("softmax", dim, heads=self.heads, causal=False, bias=True, dtype=self.dtype)
        x = x + dropped(attention(normed("attention_norm", x), mask=here))
        if not self.kernel:
            return x + fed("mlp", x), None
        x = x + dropped(self._convolved(normed("convolution_norm", x), here, normed))
        return normed("norm", x + 0.5 * fed("mlp", x)), None

    def _convolved(self, x: Array, here: Array, normed: Any) -> Array:
        dim, half = x.shape[-1], self.kernel // 2
        gate, value = (dense(dim, bias=True, dtype=self.dtype, name=name)(x) for name in ("gate", "value"))
        value = jnp.where(here[..., None], value * nn.sigmoid(gate), 0)
        # What looks back, half a kernel later, looks both ways.
        later = jnp.pad(value, ((0, 0), (0, half), (0, 0)))
        mixed = ShortConvolution(dim, self.kernel, bias=True, dtype=self.dtype, name="depthwise")(later)[:, half:]
        mixed = nn.silu(normed("depthwise_norm", mixed))
        return dense(dim, ("mlp", "embed"), bias=True, dtype=self.dtype, name="mixed")(mixed)
