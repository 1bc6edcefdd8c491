"""A discrete key–value bottleneck: codes choose learned values, and learning changes only those that were chosen.

Source: Träuble et al., 2207.11240: keys follow moving averages of the inputs first and are frozen then; heads read
fixed random projections of the input; their values are averaged.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from zoo.layers.parameters import partitioned
from zoo.layers.quantizers.quantizer import COLLECTION, Quantized, Quantizer
from zoo.types import Array


class KeyValueBottleneck(Quantizer):
    """The keys nearest to x, one a head, and in their place the mean of the values that belong to them.

    keys        a quantizer of H codebooks of M keys each, such as GroupedQuantizer(VectorQuantizer(M, D / H), H)
    values      V, the width of values and so of the result
    projection  (D, H · K): a fixed random projection of x to what the heads read; None: they read x
    moving      keys follow the inputs in training; False freezes them, for all that is learned after

    There are no losses and x has no gradient: the keys know the inputs from their statistics alone. A value has a
    gradient only from the vectors that chose its key.
    """

    keys: Quantizer
    values: int
    projection: tuple[int, int] | None = None
    moving: bool = True

    def setup(self) -> None:
        shape = (len(self.code_sizes), self.code_sizes[0], self.values)
        self.memories = self.param("values", partitioned(nn.initializers.normal(1.0), None, None, None), shape)
        if self.projection:
            self.heads = self.variable(COLLECTION, "heads", self._first_heads, self.projection)

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return self.keys.code_sizes

    def __call__(
        self, x: Float[Array, "*rows D"], *, valid: Bool[Array, "*rows"] | None = None, train: bool = False
    ) -> Quantized:
        x = lax.stop_gradient(x.astype(jnp.float32))
        if self.projection:
            x = x @ self.heads.value
        codes = self.keys(x, valid=valid, train=train and self.moving).codes
        return Quantized(self.decode(codes), codes, {})

    def decode(self, codes: Int[Array, "*rows Q"]) -> Float[Array, "*rows V"]:
        memories = self.memories[jnp.arange(len(self.code_sizes)), jnp.maximum(codes, 0)]
        chosen = jnp.where((codes >= 0)[..., None], memories, 0)
        return chosen.mean(-2)

    def _first_heads(self, shape: tuple[int, int]) -> Array:
        return nn.initializers.xavier_normal()(self.make_rng("params"), shape)
