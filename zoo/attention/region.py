"""Region attention: tokens see those of their own region, wherever they lie, and the layer of RAT that is built on it.

Source: "Region Attention Transformer for Medical Image Restoration" (2024) and its code (Yaziwel). Upstream adds −1000
to scores of other regions; here they are not seen at all.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels.packing import runs
from kernels.sparse_attention import Full
from zoo.attention.caches import KeepAll
from zoo.attention.native_sparse import reordered
from zoo.attention.softmax import Softmax, masked_attention
from zoo.errors import ZooError
from zoo.layers.mlp import GeluMLP
from zoo.layers.parameters import norm, partitioned
from zoo.types import Array


class Region(Softmax):
    """Softmax attention within regions, which need not hang together; every token sees its whole region.

    regions  a label for each of T tokens, the same for all examples, such as an atlas gives; segments then are what
             they are elsewhere, and no region reaches over their borders
    windows  regions are tiles of the `grid` with these sizes, smaller at its far border where they do not divide it
    scale    of scores: "width", K^-½; "heads", H^-½, what upstream has

    With neither, `segment_ids` are the labels: tokens with equal ids see each other also where others lie between them,
    so each example may have regions of its own; give examples packed in one row ids of their own. Without those all see
    all. As upstream there are biases and no positions unless `rotary`; the other options are those of `Softmax`.
    """

    regions: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    scale: str = "width"
    rotary: bool = False
    bias: bool = True
    causal: bool = False

    ways: ClassVar[tuple[bool, ...]] = (False,)

    def setup(self) -> None:
        super().setup()
        if self.scale not in ("width", "heads"):
            raise ZooError(f"region: scale: got {self.scale!r}, wanted width or heads")
        if self.regions and self.windows:
            raise ZooError("region: got regions and windows, wanted at most one of them")
        if self.windows and (len(self.windows) != len(self.grid) or min(self.windows) < 1):
            raise ZooError(f"region: windows: got {self.windows}, wanted a size for each axis of grid {self.grid}")
        if self.cache != KeepAll():
            raise ZooError(f"region has no step-by-step form: cache: got {self.cache}, wanted none")

    def mixed(self, q: Array, k: Array, v: Array, segment_ids: Array | None, mask: Array | None) -> Array:
        labels = self.labels(q.shape[1], segment_ids)
        scale = q.shape[2] ** -0.5 if self.scale == "heads" else None
        if labels is None:
            return masked_attention(q, k, v, Full(), mask=mask, scale=scale)
        # Sorted, a region is a run of equal ids, and blocks of queries and keys of other regions are skipped.
        order = jnp.broadcast_to(jnp.argsort(labels, axis=1, stable=True), q.shape[:2])
        labels = jnp.broadcast_to(labels, q.shape[:2])
        back = jnp.argsort(order, axis=1)
        q, k, v, labels, mask = reordered((q, k, v, labels, mask), order, back)
        out = masked_attention(q, k, v, Full(), segment_ids=labels, mask=mask, scale=scale)
        return reordered(out, back, order)

    @nn.nowrap
    def labels(self, length: int, segment_ids: Array | None) -> Array | None:
        """[1 or B, T], or None where all tokens are of one region."""
        if not self.regions and not self.windows:
            return segment_ids
        if self.windows:
            axes = [place // size for place, size in zip(np.indices(self.grid), self.windows, strict=True)]
            own = np.unique(np.stack([axis.reshape(-1) for axis in axes]), axis=1, return_inverse=True)[1].reshape(-1)
        else:
            own = np.unique(self.regions, return_inverse=True)[1]
        if own.size != length:
            raise ZooError(f"region: got {own.size} labels, wanted one for each of {length} tokens")
        if segment_ids is None:
            return jnp.asarray(own, jnp.int32)[None]
        return runs(segment_ids) * (own.max() + 1) + own.astype(np.int32)


class RegionLayer(nn.Module):
    """A layer of RAT: x += a ⊙ region(norm x); x += MLP(norm x); x += b ⊙ windows(norm x); x += MLP(norm x).

    a and b are learned for each feature and begin at 0. Norms are layer norms, MLPs have an exact GELU.

    grid     sizes of the axes, whose product is T
    heads    of both attentions
    windows  tiles of the grid that the second attention looks at
    hidden   width of the MLPs; 2 · dim unless given
    scale    see `Region`; upstream's is "heads"
    """

    dim: int
    grid: tuple[int, ...]
    heads: int = 8
    windows: tuple[int, ...] = (4, 4)
    hidden: int | None = None
    scale: str = "heads"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        shared: dict[str, Any] = {"grid": self.grid, "heads": self.heads, "scale": self.scale, "dtype": self.dtype}
        self.region = Region(self.dim, **shared)
        self.window = Region(self.dim, windows=self.windows, **shared)
        hidden = 2 * self.dim if self.hidden is None else self.hidden
        self.mlps = [GeluMLP(self.dim, hidden, dtype=self.dtype) for _ in range(2)]
        self.norms = [norm("layer", dtype=self.dtype) for _ in range(4)]
        zeros = partitioned(nn.initializers.zeros, "embed")
        self.scales = [self.param(f"{name}_scale", zeros, (self.dim,)) for name in ("region", "window")]

    def __call__(
        self, x: Float[Array, "B T D"], labels: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """x [B, T, D], labels [B, T] of its regions, mask [B, T] False where a token is not there."""
        region, window = (scale.astype(self.dtype) for scale in self.scales)
        x = x + region * self.region(self.norms[0](x), segment_ids=labels, mask=mask)
        x = x + self.mlps[0](self.norms[1](x))
        x = x + window * self.window(self.norms[2](x), mask=mask)
        return x + self.mlps[1](self.norms[3](x))
