"""Kimi delta attention: the delta rule on a memory whose key channels fade each by a factor of its own.

Source: Kimi Team, "Kimi Linear" (2510.26692), §3 and eq. 1; sizes, initial values and the bounded gate as in fla
(flash-linear-attention).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from zoo.errors import ZooError
from zoo.layers.parameters import partitioned
from zoo.state_space.deltanet import DeltaNet
from zoo.state_space.gla import LowRank, ReadOut
from zoo.state_space.mamba import inverse_softplus_of_steps
from zoo.state_space.mamba2 import log_of_uniform
from zoo.types import Array


class KDA(DeltaNet):
    """S'_t = diag(exp(g_t)) S_{t−1}; S_t = S'_t + beta_t k_t (v_t − S'_tᵀ k_t)ᵀ, with
    g_t = −exp(A_log) softplus(W_up W_down x_t + b), one A_log a head, one b a key channel.

    The memory fades before its error is taken. All else as in `DeltaNet`, with a sigmoid gate on what is read whose
    projection, like the decay's, is of rank V. exp(A_log) is drawn from (1, 16), softplus(b) is log-uniform in
    (0.001, 0.1).

    heads         H; as many of about 128 key features as fit unless given
    lowest_decay  bounds the decay, at least −5 and below 0: g_t = lowest_decay · sigmoid(exp(A_log) (W_up W_down x_t +
                  b)), with exp(A_log) = 1 at first. Not bounded unless given
    """

    heads: int | None = None
    gate: str = "sigmoid"
    lowest_decay: float | None = None

    usual_width = 128

    def setup(self) -> None:
        if self.lowest_decay is not None and not -5 <= self.lowest_decay < 0:
            raise ZooError(f"KDA: lowest_decay: got {self.lowest_decay}, wanted at least -5 and below 0")
        super().setup()
        _, value_heads, key_width, value_width = self.sizes()
        self.fading = LowRank(value_width, value_heads, key_width, dtype=self.dtype)
        initial = log_of_uniform(1.0, 16.0) if self.lowest_decay is None else nn.initializers.zeros
        self.A_log = self.param("A_log", partitioned(initial, "heads"), (value_heads,))
        steps = partitioned(inverse_softplus_of_steps(1e-3, 0.1), "heads", "head_width")
        self.step_bias = self.param("step_bias", steps, (value_heads, key_width))

    @nn.nowrap
    def make_read_out(self, value_heads: int, value_width: int) -> ReadOut:
        return ReadOut(self.dim, value_heads, value_width, self.gate, rank=value_width, bias=True, dtype=self.dtype)

    def log_decay(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead H K"]:
        step, rate = self.fading(x).astype(jnp.float32) + self.step_bias, jnp.exp(self.A_log)[:, None]
        if self.lowest_decay is None:
            return -rate * jax.nn.softplus(step)
        return self.lowest_decay * jax.nn.sigmoid(rate * step)
