"""MambAttention: attention that time and frequency share, beside Mamba both ways along each.

Source: Kühne et al., "MambAttention: Mamba with Multi-Head Attention for Generalizable Single-Channel Speech
Enhancement" (2507.00966), §3; as in NikolaiKyhne/MambAttention (`mambattention_block.py`).
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from kernels.packing import runs
from zoo.attention.softmax import Softmax
from zoo.errors import ZooError
from zoo.layers.mixer import Mixer
from zoo.layers.parameters import LIKE_TORCH, dense, norm
from zoo.state_space.mamba import Mamba
from zoo.types import Array

EPSILON = 1e-5
"""Of both kinds of norm."""


class BothWays(Mixer):
    """out = W [f, b] + bias, where f = x + Mamba(RMSNorm x) and b is another such block run backwards."""

    states: int = 16
    expand: int = 4
    width: int = 4
    causal: bool = False

    ways = (False,)

    def setup(self) -> None:
        self.forward, self.backward = (
            Mamba(self.dim, self.dtype, states=self.states, expand=self.expand, width=self.width) for _ in range(2)
        )
        self.forward_norm, self.backward_norm = (norm("rms", epsilon=EPSILON, dtype=self.dtype) for _ in range(2))
        self.join = dense(self.dim, ("mlp", "embed"), bias=True, init=LIKE_TORCH, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        forward = self.forward(self.forward_norm(x), segment_ids=segment_ids, mask=mask)
        ids, there = (None if each is None else jnp.flip(each, 1) for each in (segment_ids, mask))
        backward = self.backward(jnp.flip(self.backward_norm(x), 1), segment_ids=ids, mask=there)
        return self.join(jnp.concatenate([x + forward, x + jnp.flip(backward, 1)], axis=-1))


class MambAttention(Mixer):
    """Along time at each frequency, then along frequency at each time: x += MHA(LN x); x += BothWays(x).

    MHA and LN are the same in both passes. Tokens are the places of a grid, frequency fastest. This is the block as
    published, with its residual branches inside: out holds x itself, and with it as a block's mixer a second residual
    runs beside. A segment is a run of equal ids along the flattened grid; each pass stays inside it, so a segment of
    whole times is what it would be on a grid of its own. Projections of the attention are drawn as the zoo's others,
    not as PyTorch's.

    grid    (times, frequencies), whose product is T
    heads   of the attention
    states, expand, width   of `Mamba`
    """

    grid: tuple[int, int] = (1, 1)
    heads: int = 8
    states: int = 16
    expand: int = 4
    width: int = 4
    causal: bool = False

    ways = (False,)

    def setup(self) -> None:
        self.attention = Softmax(self.dim, self.dtype, False, heads=self.heads, rotary=False, bias=True)
        self.norm = norm("layer", epsilon=EPSILON, dtype=self.dtype)
        self.time, self.frequency = (
            BothWays(self.dim, self.dtype, states=self.states, expand=self.expand, width=self.width) for _ in range(2)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        times, frequencies = self.grid
        if times * frequencies != x.shape[1]:
            raise ZooError(f"mambattention: grid {self.grid} has not the {x.shape[1]} places of the input")
        run = None if segment_ids is None else runs(segment_ids)
        for mixer, along_time in ((self.time, True), (self.frequency, False)):
            ids, there = (None if each is None else self._lines(each, along_time) for each in (run, mask))
            x = self._lines(x, along_time)
            x = x + self.attention(self.norm(x), segment_ids=ids, mask=there)
            x = x + mixer(x, segment_ids=ids, mask=there)
            x = self._flat(x, along_time)
        return x

    @nn.nowrap
    def _lines(self, x: Array, along_time: bool) -> Array:
        """[B, T, ...] → one sequence for every line of the grid, [B · lines, length, ...]."""
        x = x.reshape(x.shape[0], *self.grid, *x.shape[2:])
        x = jnp.swapaxes(x, 1, 2) if along_time else x
        return x.reshape(-1, *x.shape[2:])

    @nn.nowrap
    def _flat(self, x: Array, along_time: bool) -> Array:
        """The way back."""
        times, frequencies = self.grid
        shape = (frequencies, times) if along_time else (times, frequencies)
        x = x.reshape(-1, *shape, x.shape[-1])
        x = jnp.swapaxes(x, 1, 2) if along_time else x
        return x.reshape(x.shape[0], times * frequencies, x.shape[-1])
