"""Mixture of experts: many MLPs, of which each token uses a few.

Source: top-k gates Shazeer et al. (1701.06538), normalised over the chosen as in Mixtral (2401.04088, §2.1), or the one
expert's probability as in Switch Transformer (Fedus et al., 2101.03961, eq. 2), whose router would learn nothing from
a gate of 1; balance loss ibid., eq. 4–6; z-loss Zoph et al., ST-MoE (2202.08906), eq. 5; shared
experts Dai et al., DeepSeekMoE (2401.06066), §3.2. Experts have no capacity: no token is ever dropped.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from zoo.errors import ZooError
from zoo.layers.devices import on_devices
from zoo.layers.mlp import SwiGLU
from zoo.layers.parameters import fan_in, partitioned
from zoo.types import Array

TOKENS = ("batch", "tokens", None)


class MixtureOfExperts(nn.Module):
    """sum over the top_k experts e of a token of gate_e · W_out,e (silu(W_gate,e x) ⊙ W_in,e x), no biases.

    hidden    width of an expert; 8/3 · dim / top_k unless given, rounded up to a multiple of 8: a token then costs as
              much as in `SwiGLU`
    experts   E
    top_k     experts that a token uses, those of the largest gates
    shared    experts that every token uses beside them, ungated
    balance   weight of the balance loss E · sum_e f_e p_e, f the share of choices and p the mean probability; the sum
              over all experts is 1 where choices are even. 0 leaves it out
    z_loss    weight of the mean of logsumexp(router logits)². 0 leaves it out

    Both losses are means over the tokens of the call, weighted, in the collection "losses". The router is float32.
    """

    dim: int
    hidden: int | None = None
    experts: int = 8
    top_k: int = 2
    shared: int = 0
    balance: float = 0.01
    z_loss: float = 0.001
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ZooError(f"moe: top_k: got {self.top_k}, wanted 1 to the {self.experts} experts")
        hidden = -(-8 * self.dim // (24 * self.top_k)) * 8 if self.hidden is None else self.hidden
        up = partitioned(fan_in((1,), (2,)), None, "embed", "mlp")
        down = partitioned(fan_in((1,), (2,)), None, "mlp", "embed")
        self.router = self.param("router", partitioned(fan_in((0,), (1,)), "embed", None), (self.dim, self.experts))
        self.gate = self.param("gate", up, (self.experts, self.dim, hidden))
        self.inner = self.param("in", up, (self.experts, self.dim, hidden))
        self.out = self.param("out", down, (self.experts, hidden, self.dim))
        if self.shared:
            self.shared_experts = SwiGLU(self.dim, hidden * self.shared, dtype=self.dtype)

    def __call__(self, x: Float[Array, "*lead D"], *, train: bool = False) -> Float[Array, "*lead D"]:
        tokens = x.reshape(math.prod(x.shape[:-1][:1]), -1, self.dim)
        logits = tokens.astype(jnp.float32) @ self.router
        probabilities = jax.nn.softmax(logits, axis=-1)
        gates, chosen = jax.lax.top_k(probabilities, self.top_k)
        self._sow_losses(logits, probabilities, chosen)
        if self.top_k > 1:
            gates = gates / gates.sum(-1, keepdims=True)
        parameters = [part.astype(self.dtype) for part in (self.gate, self.inner, self.out)]
        # The last product's inputs may be split over devices: each gives its part of the sum.
        up = (None, None, "mlp")
        parts = on_devices(
            _mixed,
            (tokens.astype(self.dtype), gates.astype(self.dtype), chosen, *parameters),
            (TOKENS, TOKENS, TOKENS, up, up, (None, "mlp", None)),
            ("mlp", *TOKENS),
        )
        y = parts.sum(0).reshape(x.shape)
        return y + self.shared_experts(x) if self.shared else y

    def _sow_losses(self, logits: Array, probabilities: Array, chosen: Array) -> None:
        if self.balance:
            share = jax.nn.one_hot(chosen, self.experts).mean((0, 1, 2))
            self.sow("losses", "balance", self.balance * self.experts * (share * probabilities.mean((0, 1))).sum())
        if self.z_loss:
            self.sow("losses", "z", self.z_loss * jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2))


def _mixed(
    x: Float[Array, "B T D"],
    gates: Float[Array, "B T K"],
    chosen: Int[Array, "B T K"],
    gate: Float[Array, "E D F"],
    inner: Float[Array, "E D F"],
    out: Float[Array, "E F D"],
) -> Float[Array, "1 B T D"]:
    """Tokens sorted by expert, one product for each run of equal experts, and back."""
    experts = chosen.reshape(-1)
    order = jnp.argsort(experts)
    rows = x.reshape(-1, x.shape[-1])[order // chosen.shape[-1]]
    sizes = jnp.bincount(experts, length=len(gate)).astype(jnp.int32)
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, inner, sizes)
    sorted_out = jax.lax.ragged_dot(hidden, out, sizes)
    each = jnp.zeros_like(sorted_out).at[order].set(sorted_out, unique_indices=True).reshape(*chosen.shape, -1)
    return jnp.einsum("btk,btkd->btd", gates, each)[None]
