"""Mixture of hidden dimensions: the hidden features of one MLP in groups, of which each token uses a part.

Source: Chen et al., "Mixture of Hidden-Dimensions" (ICML 2025, 2412.05644), the form for feed-forward layers. The paper
routes the features of the residual stream, too; that is not built here.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from zoo.errors import ZooError
from zoo.layers.parameters import dense, partitioned
from zoo.types import Array

FUSIONS = ("monarch", "blocks", "none")


class MixtureOfHidden(nn.Module):
    """out = W_down silu(fuse(alpha · s_g (W_up x)_g for active groups g, 0 for the others)), no biases.

    s = softmax(Phi x) over N groups, Phi one centroid [D] for each; alpha = N · sum of s over active groups, so that
    evenly routed features keep their size.

    hidden    width; 4 · dim unless given; divides into groups
    groups    N
    active    share of groups that a token uses
    common    share of groups that every token uses, the first ones; the rest of `active` is the token's best others
    fusion    what mixes features after routing: "monarch" (paper: block-diagonal within groups, then across them),
              "blocks" (within groups only) or "none". They begin as identities (our choice)
    balance   weight of the balance loss N' · sum_g f_g p_g over the N' groups that are not common; 0 leaves it out

    The loss is in the collection "losses"; the router is float32. Groups a token does not use are computed and then
    masked: the result is that of the sparse layer, the saving is not.
    """

    dim: int
    hidden: int | None = None
    groups: int = 16
    active: float = 0.5
    common: float = 0.375
    fusion: str = "monarch"
    balance: float = 0.01
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        hidden = 4 * self.dim if self.hidden is None else self.hidden
        if hidden % self.groups:
            raise ZooError(f"mohd: {hidden} hidden features do not divide into {self.groups} groups")
        if not 0 <= self.common <= self.active <= 1 or self.active == 0:
            raise ZooError(f"mohd: wanted 0 <= common <= active <= 1, got common {self.common}, active {self.active}")
        if self.fusion not in FUSIONS:
            raise ZooError(f"mohd: fusion is one of {', '.join(FUSIONS)}, got {self.fusion!r}")
        width = hidden // self.groups
        self.up = dense(hidden, dtype=self.dtype)
        self.down = dense(self.dim, ("mlp", "embed"), dtype=self.dtype)
        centroids = partitioned(nn.initializers.normal(self.dim**-0.5), None, "embed")
        self.centroids = self.param("centroids", centroids, (self.groups, self.dim))
        if self.fusion != "none":
            self.within = self.param("within", _identities("mlp"), (self.groups, width, width))
        if self.fusion == "monarch":
            self.across = self.param("across", _identities(None), (width, self.groups, self.groups))

    def __call__(self, x: Float[Array, "*lead D"], *, train: bool = False) -> Float[Array, "*lead D"]:
        gates = self._gates(x)
        alpha = self.groups * gates.sum(-1, keepdims=True)
        hidden = self.up(x)
        grouped = hidden.reshape(*hidden.shape[:-1], self.groups, -1)
        grouped = self._fused(grouped * (gates * alpha).astype(self.dtype)[..., None])
        return self.down(jax.nn.silu(grouped.reshape(hidden.shape)))

    def _gates(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead N"]:
        """s of the active groups, 0 of the others."""
        s = jax.nn.softmax(x.astype(jnp.float32) @ self.centroids.T, axis=-1)
        common = round(self.common * self.groups)
        chosen = max(round(self.active * self.groups), 1) - common
        if chosen < 1:
            return s * (jnp.arange(self.groups) < common)
        routed = s[..., common:]
        _, best = jax.lax.top_k(routed, chosen)
        used = jax.nn.one_hot(best, routed.shape[-1]).sum(-2)
        if self.balance:
            lead = tuple(range(x.ndim - 1))
            loss = routed.shape[-1] * (used.mean(lead) * routed.mean(lead)).sum()
            self.sow("losses", "balance", self.balance * loss)
        return jnp.concatenate([s[..., :common], routed * used], axis=-1)

    def _fused(self, h: Float[Array, "*lead N W"]) -> Float[Array, "*lead N W"]:
        if self.fusion != "none":
            h = jnp.einsum("...nw,nwv->...nv", h, self.within.astype(self.dtype))
        if self.fusion == "monarch":
            h = jnp.einsum("...nw,wnm->...mw", h, self.across.astype(self.dtype))
        return h


def _identities(axis: str | None) -> nn.initializers.Initializer:
    """[n, w, w]: n identity matrices, the first axis named."""

    def init(key: Array, shape: tuple[int, int, int], dtype: DTypeLike = jnp.float32) -> Array:
        return jnp.broadcast_to(jnp.eye(shape[1], dtype=dtype), shape)

    return partitioned(init, axis, None, None)
