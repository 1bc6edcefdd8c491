"""Reversed attention, in which tokens send to those they attend to, and the transformer of dependency trees on it.

Source: Ding et al., "Visual Dependency Transformers" (DependencyViT, 2304.03282), §3, appendix D.1 for the selector's
temperature. The official repository holds a licence only; where the paper is silent (no biases in selector and
controller, leaves ranked by the messages they receive, the order of last norm and messages) this follows the
re-implementation in the style of timm that names it.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels.sparse_attention import Full, attend
from zoo.attention.softmax import HEADS, segment_pair
from zoo.errors import ZooError
from zoo.layers.devices import on_devices
from zoo.layers.mixer import Mixer, head_count
from zoo.layers.mlp import GeluMLP
from zoo.layers.parameters import dense, merge_heads, norm, partitioned, split_heads
from zoo.types import Array

VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "heads": 12},
    "small": {"dim": 384, "depth": 12, "heads": 12},
    "lite_tiny": {"dim": 192, "depth": 12, "heads": 12, "prune_layers": (2, 5, 8, 11)},
}
"""Options of `DependencyTransformer`."""


class Reversed(Mixer):
    """out_j = sum over children i of F_ij · P_i · M_i · v_i for every head.

    F_ij = softmax over parents j of q_i · k_j / √K: here a token's attention says where it sends, not what it gathers.
    P_i [H], the head selector, is a softmax over heads of W_p x_i / temperature; M_i, the message controller, is the
    sigmoid of a two-layer MLP. Outputs are no means: they grow with how many tokens send to j. Every child sends to
    earlier and later tokens, so there is no causal form. All scores are worked on in blocks, none is kept.

    heads        H; as many of 64 features as fit unless given
    temperature  of the head selector
    bias         on queries, keys and values; the output has one in any case
    """

    causal: bool = False
    heads: int | None = None
    temperature: float = 0.1
    bias: bool = False

    ways = (False,)

    def setup(self) -> None:
        heads = head_count("Reversed", self.dim, self.heads)
        width = self.dim // heads
        if self.dim % 2:
            raise ZooError(f"Reversed: the message controller halves dim, got {self.dim}")
        self.query, self.key, self.value = (
            split_heads(self.dim, heads, width, bias=self.bias, dtype=self.dtype) for _ in range(3)
        )
        self.out = merge_heads(heads, width, self.dim, bias=True, dtype=self.dtype)
        self.selector = dense(heads, ("embed", "heads"), dtype=self.dtype)
        self.controller_in = dense(self.dim // 2, ("embed", "mlp"), dtype=self.dtype)
        self.controller_out = dense(1, ("mlp", None), dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        return self.send(x, segment_ids=segment_ids, mask=mask)[0]

    def send(
        self,
        x: Float[Array, "B T D"],
        message: Float[Array, "B T"] | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T"], Float[Array, "B T"]]:
        """What tokens receive, their messages and how much each received.

        `message` is the product of M over earlier layers, 1 unless given. The second result is that with this layer's,
        the third the sum over children and heads of F · P · M; both float32.
        """
        q, k, v = self.query(x), self.key(x), self.value(x)
        chosen = jax.nn.softmax(self.selector(x).astype(jnp.float32) / self.temperature, axis=-1)
        controlled = self.controller_out(jax.nn.gelu(self.controller_in(x), approximate=False))[..., 0]
        own = jax.nn.sigmoid(controlled.astype(jnp.float32))
        message = own if message is None else message * own
        weight = (chosen * message[..., None])[..., None].astype(self.dtype)
        # How much is received is one more value, which is the sender's weight itself.
        sent = jnp.concatenate([weight * v, weight], axis=-1)
        ids = segment_pair(segment_ids, mask)
        received = on_devices(reverse, (q, k, sent, *ids), (HEADS, HEADS, HEADS, *(("batch", None),) * len(ids)), HEADS)
        return self.out(received[..., :-1]), message, jnp.sum(received[..., -1].astype(jnp.float32), axis=-1)


def reverse(q: Array, k: Array, v: Array, *ids: Any) -> Array:
    """out_j = sum_i softmax_j(q_i · k_j / √K) v_i of [B, T, H, K]; `ids` as `segment_pair` gives them.

    The first pass gives the logarithm L_i of each sender's denominator. In the second receivers are the queries:
    exp(s_ij − L_i) is a softmax over i with its own denominator not divided out.
    """
    segments = ids or None
    scale = q.shape[-1] ** -0.5
    _, total = attend(q, k, k, Full(), scale=scale, segment_ids=segments)
    # A sender that sees no one is one that is not there; its −inf must not reach a product.
    bias = -jnp.where(jnp.isfinite(total), total, 0)
    # One more feature of each sender, in two parts: in bfloat16 one would lose its digits.
    high = bias.astype(q.dtype)
    low = (bias - high.astype(bias.dtype)).astype(q.dtype)
    senders = jnp.concatenate([q * scale, high[..., None], low[..., None]], axis=-1)
    receivers = jnp.concatenate([k, jnp.ones_like(k[..., :2])], axis=-1)
    mean, mass = attend(receivers, senders, v, Full(), scale=1.0, segment_ids=segments)
    if ids:
        # Of a token that is not there no denominator knows, and nothing bounds what it would receive.
        mass = jnp.where((ids[1] >= 0)[..., None], mass, -jnp.inf)
    return mean * jnp.exp(mass)[..., None].astype(mean.dtype)


class DependencyBlock(nn.Module):
    """x += scale · reversed(norm x); leaves are pruned; x += scale · mlp(norm x)."""

    dim: int
    heads: int
    layer_scale: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        message: Float[Array, "B N"],
        mask: Bool[Array, "B N"] | None,
        keep: int | None,
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """Tokens, messages, mask and, where `keep` is a number, the places of the tokens that are left [B, keep]."""
        initial = partitioned(nn.initializers.constant(self.layer_scale), "embed")
        scales = [self.param(name, initial, (self.dim,)).astype(self.dtype) for name in ("mixer_scale", "mlp_scale")]
        mixer = Reversed(self.dim, self.dtype, heads=self.heads, name="mixing")
        mixed, message, received = mixer.send(norm("layer", dtype=self.dtype, name="mixer_norm")(x), message, mask=mask)
        x = x + scales[0] * mixed
        kept = None
        if keep is not None:
            kept = most_received(received, keep, mask)
            x, message = jnp.take_along_axis(x, kept[..., None], axis=1), jnp.take_along_axis(message, kept, axis=1)
            mask = None if mask is None else jnp.take_along_axis(mask, kept, axis=1)
        normed = norm("layer", dtype=self.dtype, name="mlp_norm")(x)
        return x + scales[1] * GeluMLP(self.dim, dtype=self.dtype, name="feeding")(normed), message, mask, kept


class DependencyTransformer(nn.Module):
    """Layers of reversed attention whose messages multiply up, so that a token once silent stays so.

    prune_layers  after the attention of these layers, counted from 1, the leaves go: the tokens that received least
                  (DependencyViT-Lite: 2, 5, 8, 11)
    prune_ratio   how many each time, as a share of the tokens at first
    """

    dim: int
    depth: int = 12
    heads: int = 12
    layer_scale: float = 1e-6
    prune_layers: tuple[int, ...] = ()
    prune_ratio: float = 0.16
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], *, mask: Bool[Array, "B N"] | None = None
    ) -> tuple[Float[Array, "B M D"], Float[Array, "B M"], Int[Array, "B M"]]:
        """Tokens, positions already added → the M that are left, their messages and their places among the N.

        A token's last norm is multiplied by its message. Raises ZooError where pruning would leave none.
        """
        batch, length, _ = x.shape
        layers = sorted(set(self.prune_layers))
        if layers and not (layers[0] >= 1 and layers[-1] <= self.depth and len(layers) * self.prune_ratio < 1):
            raise ZooError(
                f"DependencyTransformer: prune_layers {self.prune_layers} of ratio {self.prune_ratio}: wanted layers "
                f"from 1 to {self.depth} that leave tokens"
            )
        message = jnp.ones((batch, length), jnp.float32)
        places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        for layer in range(1, self.depth + 1):
            share = 1 - (layers.index(layer) + 1) * self.prune_ratio if layer in layers else None
            keep = None if share is None else max(1, math.floor(share * length))
            block = DependencyBlock(self.dim, self.heads, self.layer_scale, self.dtype, name=f"layer_{layer - 1}")
            x, message, mask, kept = block(x, message, mask, keep)
            if kept is not None:
                places = jnp.take_along_axis(places, kept, axis=1)
        return norm("layer", dtype=self.dtype)(x) * message[..., None].astype(self.dtype), message, places


def most_received(received: Float[Array, "B N"], keep: int, mask: Bool[Array, "B N"] | None) -> Int[Array, "B M"]:
    """Places of the `keep` tokens that received most, in their order; those that are not there go first."""
    score = received if mask is None else jnp.where(mask, received, -jnp.inf)
    return jnp.sort(jax.lax.top_k(score, keep)[1], axis=-1)
