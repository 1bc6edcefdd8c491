"""Gated DeltaNet: the delta rule on a memory that also fades, by one factor a token and head.

Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (2412.06464), eq. 10, decays as in Mamba-2; sizes, initial
values and grouped value heads as in fla (flash-linear-attention).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from zoo.layers.parameters import dense, partitioned
from zoo.state_space.deltanet import DeltaNet
from zoo.state_space.mamba import inverse_softplus_of_steps
from zoo.state_space.mamba2 import log_of_uniform
from zoo.types import Array


class GatedDeltaNet(DeltaNet):
    """S'_t = exp(g_t) S_{t−1}; S_t = S'_t + beta_t k_t (v_t − S'_tᵀ k_t)ᵀ; g_t = −exp(A_log) softplus(w · x_t + b).

    The memory fades before its error is taken. All else as in `DeltaNet`, with H · K = ¾ D, values twice as wide as
    keys and a gate: about 6 D² parameters. exp(A_log) is drawn from (0.001, 16), where the paper's code has (0, 16),
    whose logarithm may be −inf; softplus(b) is log-uniform in (0.001, 0.1).

    heads  H; as many of about 256 key features as fit unless given
    """

    heads: int | None = None
    expand_key: float = 0.75
    expand_value: float = 2.0
    gate: str = "silu"

    def setup(self) -> None:
        super().setup()
        value_heads = self.sizes()[1]
        self.fading = dense(value_heads, ("embed", "heads"), dtype=self.dtype)
        self.A_log = self.param("A_log", partitioned(log_of_uniform(1e-3, 16.0), "heads"), (value_heads,))
        steps = partitioned(inverse_softplus_of_steps(1e-3, 0.1), "heads")
        self.step_bias = self.param("step_bias", steps, (value_heads,))

    def log_decay(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead H"]:
        return -jnp.exp(self.A_log) * jax.nn.softplus(self.fading(x).astype(jnp.float32) + self.step_bias)
