"""Dilated residual convolutions with gates: the trunk of decoders of speech and images from brain signals."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from zoo.errors import ZooError
from zoo.layers.convolution import Convolution
from zoo.layers.temporal_filters import batch_norm
from zoo.types import Array


class DilatedConvolutions(nn.Module):
    """[B, T, F] → [B, T, width], or [B, T, outputs] (Défossez et al., 2208.12266; depth 10 and period 5 there).

    Layer k is a convolution of dilation growth^(k mod period), batch norm, GELU and dropout, added to its input where
    both have the same width; after every `gate_every` layers comes a gated linear unit, a convolution to twice the
    width of which one half gates the other.

    outputs       width of the last layer, which then has neither norm nor activation; 0: it is like the others
    kernel        odd
    gate_context  samples that a gate sees before and after its own
    """

    width: int = 320
    depth: int = 10
    outputs: int = 0
    kernel: int = 3
    growth: int = 2
    period: int = 5
    gate_every: int = 2
    gate_context: int = 1
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T F"], *, train: bool = False) -> Float[Array, "B T G"]:
        if not self.kernel % 2:
            raise ZooError(f"DilatedConvolutions kernel: got {self.kernel}, wanted an odd number")
        if min(self.depth, self.growth, self.period) < 1:
            raise ZooError(
                f"DilatedConvolutions: got depth {self.depth}, growth {self.growth}, period {self.period}, "
                "wanted at least 1 each"
            )
        for k, width in enumerate(self._widths()):
            dilations = (self.growth ** (k % self.period),)
            y = Convolution(
                width, (self.kernel,), dilations=dilations, paddings="same", dtype=self.dtype, name=f"convolution{k}"
            )(x)
            if k + 1 < self.depth or not self.outputs:
                y = jax.nn.gelu(batch_norm(train, 1e-5, name=f"norm{k}")(y), approximate=False)
                y = nn.Dropout(self.dropout)(y, deterministic=not train)
            x = x + y if x.shape == y.shape else y
            if self._gated(k):
                context = 1 + 2 * self.gate_context
                gate = Convolution(2 * width, (context,), paddings="same", dtype=self.dtype, name=f"gate{k}")
                value, opening = jnp.split(gate(x), 2, axis=-1)
                x = value * jax.nn.sigmoid(opening)
        return x

    @nn.nowrap
    def flops(self, features: int, samples: int) -> float:
        """Operations of one example in convolutions, a multiply-add counting two; of inputs of so many features."""
        total = 0.0
        for k, width in enumerate(self._widths()):
            total += 2 * samples * self.kernel * features * width
            total += 4 * samples * (1 + 2 * self.gate_context) * width**2 * self._gated(k)
            features = width
        return total

    def _widths(self) -> tuple[int, ...]:
        return (self.width,) * (self.depth - 1) + (self.outputs or self.width,)

    def _gated(self, layer: int) -> bool:
        return self.gate_every > 0 and (layer + 1) % self.gate_every == 0
