"""DeltaNet: a memory that is corrected where it is wrong, by the delta rule.

Source: Schlag, Irie and Schmidhuber (2102.11174), §4.2; the layer Yang et al., "Parallelizing Linear Transformers with
the Delta Rule over Sequence Length" (2406.06484), §3.3; negative eigenvalues Grazzi et al. (2411.12537). Sizes, gates
and grouped value heads as in fla (flash-linear-attention); projections are drawn as everywhere in the zoo.
"""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from kernels.delta_rule import delta_rule_step
from zoo.errors import ZooError
from zoo.layers.devices import delta_rule
from zoo.layers.mixer import Mixer, head_count
from zoo.layers.parameters import dense
from zoo.state_space.gla import Memory, QueryKeyValue, ReadOut, head_sizes
from zoo.types import Array

EPSILON = 1e-6
"""Added to the squared length of a key."""


class DeltaNet(Mixer):
    """S_t = S_{t−1} + beta_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ; out_t = S_tᵀ q_t / √K, queries and keys of length one.

    Queries, keys and values pass through a short convolution and a SiLU, beta_t = sigmoid(w · x_t) is one number a
    head. What is read is normalised by head, gated where asked for, and projected.

    heads                  H of queries and keys
    value_heads            of values, a multiple of H: each query and key serves several; H unless given
    expand_key             H · K / D
    expand_value           V / K
    convolution            tokens that the short convolution sees; 0 leaves it out, which costs much quality
    gate                   of what is read: "silu", "sigmoid" or "none"
    negative_eigenvalues   beta is doubled, so that a correction may overshoot and turn a direction round
    """

    heads: int | None = 4
    value_heads: int | None = None
    expand_key: float = 1.0
    expand_value: float = 1.0
    convolution: int = 4
    gate: str = "none"
    negative_eigenvalues: bool = False

    usual_width: ClassVar[int] = 256
    """About K where `heads` is None."""

    def setup(self) -> None:
        heads, value_heads, key_width, value_width = self.sizes()
        self.project = QueryKeyValue(
            self.dim, heads, value_heads, key_width, value_width, self.convolution, silu=True, dtype=self.dtype
        )
        self.strength = dense(value_heads, ("embed", "heads"), dtype=self.dtype)
        self.read_out = self.make_read_out(value_heads, value_width)

    @nn.nowrap
    def make_read_out(self, value_heads: int, value_width: int) -> ReadOut:
        """What turns what was read into tokens."""
        return ReadOut(self.dim, value_heads, value_width, self.gate, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        q, k, v = self.project(x, segment_ids, mask)
        beta, log_decay = self._beta(x), self.log_decay(x)
        if mask is not None:
            beta = jnp.where(mask[..., None], beta, 0)
            if log_decay is not None:
                log_decay = jnp.where(jnp.expand_dims(mask, range(2, log_decay.ndim)), log_decay, 0)
        read, _ = delta_rule(unit_length(q), unit_length(k), v, beta, log_decay=log_decay, segment_ids=segment_ids)
        return self.read_out(read, x)

    def initial_state(self, batch: int, capacity: int = 2048) -> Memory:
        _, value_heads, key_width, value_width = self.sizes()
        state = jnp.zeros((batch, value_heads, key_width, value_width), jnp.float32)
        return Memory(state, self.project.initial_state(batch))

    def step(self, x: Float[Array, "B D"], state: Memory) -> tuple[Float[Array, "B D"], Memory]:
        (q, k, v), windows = self.project.step(x, state.windows)
        q, k = unit_length(q), unit_length(k)
        read, after = delta_rule_step(q, k, v, self._beta(x), state.state, log_decay=self.log_decay(x))
        return self.read_out(read, x), Memory(after, windows)

    @nn.nowrap
    def sizes(self) -> tuple[int, int, int, int]:
        """(H, value heads, K, V). Raises ZooError where they are no whole numbers or do not divide."""
        name, heads = type(self).__name__, self.heads
        if heads is None:
            heads = head_count(name, round(self.expand_key * self.dim), None, self.usual_width)
        heads, key_width, value_width = head_sizes(name, self.dim, heads, self.expand_key, self.expand_value)
        value_heads = heads if self.value_heads is None else self.value_heads
        if value_heads < 1 or value_heads % heads:
            raise ZooError(f"{name}: got {value_heads} value_heads, wanted a multiple of the {heads} heads")
        return heads, value_heads, key_width, value_width

    def log_decay(self, x: Float[Array, "*lead D"]) -> Array | None:
        """What the memory fades by before it is corrected: None, [*lead, H] or [*lead, H, K], at most 0."""
        return None

    def _beta(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead H"]:
        beta = jax.nn.sigmoid(self.strength(x).astype(jnp.float32))
        return 2 * beta if self.negative_eigenvalues else beta


def unit_length(x: Float[Array, "*lead K"]) -> Float[Array, "*lead K"]:
    """x / √(|x|² + 1e-6), in float32 and back."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + EPSILON)).astype(x.dtype)
