"""Softmax attention with a gate: a factor for each head or feature that the token itself decides.

Source: Qiu et al., "Gated Attention for Large Language Models" (2505.06708), §2.2, whose five positions, granularities,
shared gates, added gates and activations are the options here, and the authors' code (qiuzh20/gated_attention) for the
default. Of the paper's comparison only summaries could be read: that its gates 2 to 5 stand at the value, the key, the
query and the final output, the half sigmoid, and what is added where a gate is added, are from memory.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from zoo.attention.softmax import Softmax
from zoo.errors import ZooError
from zoo.layers.parameters import dense, split_heads
from zoo.types import Array

POSITIONS = ("attention", "value", "key", "query", "output")
ACTIVATIONS: dict[str, Any] = {
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "half_sigmoid": lambda x: 0.5 + 0.5 * jax.nn.sigmoid(x),
}


class Gated(Softmax):
    """y ⊙ sigmoid(W_g x) for a y inside softmax attention, x the mixer's input at the same token.

    position     y: "attention" is each head's output before heads are merged (gate 1, the paper's best), "value", "key"
                 and "query" are what they say, after their norm and before their rotation, "output" is the mixer's
    granularity  "element": a gate for every feature of a head; "head": one for each head
    shared       all heads have the same gates
    activation   "sigmoid", "silu", or "half_sigmoid", 1/2 + sigmoid / 2, which is never near zero
    additive     y + gate instead of y ⊙ gate

    The other options are those of `Softmax`; `bias` is also the gate's. The authors' code has one projection for gates
    and queries, which is the same map.
    """

    position: str = "attention"
    granularity: str = "element"
    shared: bool = False
    activation: str = "sigmoid"
    additive: bool = False

    def setup(self) -> None:
        super().setup()
        for option, got, wanted in (
            ("position", self.position, POSITIONS),
            ("granularity", self.granularity, ("element", "head")),
            ("activation", self.activation, tuple(ACTIVATIONS)),
        ):
            if got not in wanted:
                raise ZooError(f"gated: {option}: got {got!r}, wanted one of {', '.join(wanted)}")
        heads, groups, width = self.head_sizes()
        if self.position == "output" and (self.shared or self.granularity == "head"):
            raise ZooError("gated: position='output' has no heads: it wants granularity='element' and shared=False")
        features = width if self.granularity == "element" else 1
        if self.position == "output" or self.shared:
            whole = self.dim if self.position == "output" else features
            self.gate: nn.Module = dense(whole, ("embed", None), bias=self.bias, dtype=self.dtype)
        else:
            count = groups if self.position in ("key", "value") else heads
            self.gate = split_heads(self.dim, count, features, bias=self.bias, dtype=self.dtype)

    def unturned(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        q, k, v = super().unturned(x)
        return self.gated("query", x, q), self.gated("key", x, k), self.gated("value", x, v)

    def read_out(self, x: Float[Array, "B T D"], mixed: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        return self.gated("output", x, self.out(self.gated("attention", x, mixed)))

    def gated(self, position: str, x: Float[Array, "B T D"], y: Array) -> Array:
        """y, gated by x where this is the gate's position; gates are float32."""
        if position != self.position:
            return y
        gate = ACTIVATIONS[self.activation](self.gate(x).astype(jnp.float32))
        gate = (gate[:, :, None] if self.shared else gate).astype(y.dtype)
        return y + gate if self.additive else y * gate
