"""Retention: linear attention whose memory fades by a fixed factor a token, another for every head.

Source: Sun et al., "Retentive Network" (2307.08621), eq. 5–8, sizes §3.1, scores divided by √K §2.2; the learned scale
of the heads' norm as in fla. Lightning attention's decays: Qin et al., "Lightning Attention-2" (2401.04658) and
TransNormerLLM (2307.14995), as in fla. Its activations and gate are options too, to be set beside the decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from kernels.linear_attention import linear_attention_step
from zoo.errors import ZooError
from zoo.layers.devices import linear_attention
from zoo.layers.mixer import Mixer, head_count
from zoo.layers.rotary import BASE, rotate, times
from zoo.state_space.gla import QueryKeyValue, ReadOut, head_sizes
from zoo.types import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Retained:
    """What retention remembers."""

    state: Array
    """[B, H, K, V] float32"""
    length: Array
    """[B] int32, tokens so far"""


class Retention(Mixer):
    """S_t = gamma S_{t−1} + k_t v_tᵀ; out_t = S_tᵀ q_t / √K, with queries and keys turned by their positions.

    What is read is normalised by head, gated by W_g x_t and projected.

    heads           H; as many of about 256 key features as fit unless given
    expand_value    V / K
    decay           "retnet": gamma_h = 1 − 2^(−5−h); "lightning": log gamma_h = −(8 / H)(1 − layer / layers) h, so that
                    head 0 never forgets. h counts from 0
    layer, layers   which of how many this one is, from 0; only Lightning's decays ask
    rotary, base    whether positions turn queries and keys, and the base of the angles
    silu            whether queries, keys and values pass through a SiLU, as Lightning's do
    gate            of what is read: "silu" (RetNet), "sigmoid" (Lightning) or "none"
    causal          False lets every token see all, tokens n apart weighted by gamma^n

    Where a token is not there, nothing fades.
    """

    heads: int | None = None
    expand_value: float = 2.0
    decay: str = "retnet"
    layer: int = 0
    layers: int = 1
    rotary: bool = True
    base: float = BASE
    silu: bool = False
    gate: str = "silu"

    ways = (True, False)

    def setup(self) -> None:
        if self.decay not in ("retnet", "lightning"):
            raise ZooError(f"retention: decay is retnet or lightning, got {self.decay!r}")
        if not 0 <= self.layer < self.layers:
            raise ZooError(f"retention: got layer {self.layer} of {self.layers}, wanted one of 0 to {self.layers - 1}")
        heads, key_width, value_width = self.sizes()
        self.project = QueryKeyValue(self.dim, heads, heads, key_width, value_width, silu=self.silu, dtype=self.dtype)
        self.read_out = ReadOut(self.dim, heads, value_width, self.gate, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        q, k, v = self.project(x)
        if self.rotary:
            positions = times(x.shape[1], segment_ids)
            q, k = rotate(q, positions, self.base), rotate(k, positions, self.base)
        log_decay = self.log_decay()
        if mask is not None:
            k = jnp.where(mask[..., None, None], k, 0)
            log_decay = jnp.where(mask[..., None], log_decay, 0)
        read, _ = linear_attention(q, k, v, log_decay=log_decay, causal=self.causal, segment_ids=segment_ids)
        return self.read_out(read, x)

    def initial_state(self, batch: int, capacity: int = 2048) -> Retained:
        self.check_causal()
        return Retained(jnp.zeros((batch, *self.sizes()), jnp.float32), jnp.zeros(batch, jnp.int32))

    def step(self, x: Float[Array, "B D"], state: Retained) -> tuple[Float[Array, "B D"], Retained]:
        q, k, v = self.project(x[:, None])
        if self.rotary:
            positions = state.length[:, None]
            q, k = rotate(q, positions, self.base), rotate(k, positions, self.base)
        read, after = linear_attention_step(q[:, 0], k[:, 0], v[:, 0], state.state, log_decay=self.log_decay())
        return self.read_out(read, x), Retained(after, state.length + 1)

    @nn.nowrap
    def sizes(self) -> tuple[int, int, int]:
        """(H, K, V). Raises ZooError where they are no whole numbers."""
        heads = head_count("retention", self.dim, self.heads, 256)
        return head_sizes("retention", self.dim, heads, 1.0, self.expand_value)

    @nn.nowrap
    def log_decay(self) -> Array:
        """log gamma [H], at most 0."""
        heads = self.sizes()[0]
        head = np.arange(heads)
        if self.decay == "retnet":
            log_gamma = np.log1p(-(2.0 ** (-5 - head)))
        else:
            log_gamma = -8 / heads * (1 - self.layer / self.layers) * head
        return jnp.asarray(log_gamma, jnp.float32)
