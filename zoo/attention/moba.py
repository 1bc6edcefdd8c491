"""Mixture of block attention: every head of a query attends to its own block and the few whose mean key suits it best.

Source: Lu et al., "MoBA" (2502.13189), §2.2, and the authors' code (MoonshotAI/MoBA).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from kernels.moba import MobaCache, moba, moba_cache, moba_step
from kernels.split_blocks import split_moba
from zoo.attention.caches import KeepAll
from zoo.attention.native_sparse import closing_gaps
from zoo.attention.softmax import SPLIT_HEADS, SPLIT_IDS, Softmax
from zoo.errors import ZooError
from zoo.layers.devices import over_time
from zoo.types import Array


class MoBA(Softmax):
    """Softmax attention to the tokens of top_k blocks: the query's own and those before it with the largest q · mean k.

    block_size  in tokens
    top_k       blocks, the query's own among them

    The other options are those of `Softmax`; means are of turned keys, as in the authors' code. Tokens that are not
    there are left out before blocks are counted; those of a segment lie on the grid of the row. A step chooses blocks
    as training does, where the authors' code attends to all tokens. Where time is split over devices mean keys go to
    all of them, and keys and values go round.
    """

    block_size: int = 256
    top_k: int = 4

    ways = (True,)

    def setup(self) -> None:
        super().setup()
        if min(self.block_size, self.top_k) < 1:
            raise ZooError(f"moba: got block_size {self.block_size} and top_k {self.top_k}, wanted at least 1")
        if self.cache != KeepAll():
            raise ZooError(f"moba keeps all tokens: cache: got {self.cache}, wanted none")

    def initial_state(self, batch: int, capacity: int = 2048) -> MobaCache:
        _, groups, width = self.head_sizes()
        nothing = jnp.zeros((batch, 0, groups, width), self.dtype)
        return moba_cache(nothing, nothing, capacity=capacity, block_size=self.block_size)

    def mixed(self, q: Array, k: Array, v: Array, segment_ids: Array | None, mask: Array | None) -> Array:
        def op(q: Array, k: Array, v: Array, *ids: Array, axis: str | None) -> Array:
            options: dict[str, Any] = {"block_size": self.block_size, "top_k": self.top_k}
            options["segment_ids"] = ids[0] if ids else None
            return moba(q, k, v, **options) if axis is None else split_moba(q, k, v, axis=axis, **options)

        def mix(arrays: tuple[Array, ...], segment_ids: Array | None) -> Array:
            ids = () if segment_ids is None else (segment_ids,)
            axes = (SPLIT_HEADS,) * 3 + (SPLIT_IDS,) * len(ids)
            return over_time(op, (*arrays, *ids), axes, SPLIT_HEADS, self.block_size)

        return closing_gaps(mix, (q, k, v), segment_ids, mask)

    def recalled(self, q: Array, k: Array, v: Array, state: MobaCache) -> tuple[Array, MobaCache]:
        return moba_step(q, k, v, state, block_size=self.block_size, top_k=self.top_k)

    def remembered(self, q: Array, k: Array, v: Array, length: Array, capacity: int) -> MobaCache:
        return moba_cache(k, v, capacity=capacity, block_size=self.block_size, length=length)
