"""Attention to the nearest tokens, with sinks: the first tokens of a sequence, which all others may see too.

Source: Longformer (2004.05150), §3.1, for the window; Xiao et al. (2309.17453), §3.2, for sinks.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.packing import begins
from kernels.sparse_attention import Causal, Compressed, Mask, Sinks, Window
from kernels.split_attention import split_attend
from zoo.attention.caches import KeepAll, KeepWindow
from zoo.attention.softmax import SPLIT_HEADS, SPLIT_IDS, Softmax, masked_attention, segment_pair
from zoo.errors import ZooError
from zoo.layers.devices import over_time, splits_time
from zoo.types import Array


class SlidingWindow(Softmax):
    """Softmax attention of token t to tokens t − window < j <= t and to the first `sinks` tokens of its segment.

    window  in tokens, the query's own among them; both ways |t − j| <= window // 2
    sinks   tokens; both ways at most window // 2 + 1, so that they see each other
    causal  False sees both ways

    The other options are those of `Softmax`; streaming keeps window + sinks tokens, whatever the capacity. Where time
    is split over devices, a window asks the devices beside it, and sinks send all keys round.
    """

    window: int = 512
    sinks: int = 0

    def setup(self) -> None:
        super().setup()
        if self.window < 1 or self.sinks < 0:
            raise ZooError(
                f"sliding_window: got window {self.window} and sinks {self.sinks}, wanted at least 1 and at least 0"
            )
        if not self.causal and self.sinks > self.window // 2 + 1:
            raise ZooError(
                f"sliding_window: sinks: got {self.sinks}, wanted at most {self.window // 2 + 1} "
                f"where a window of {self.window} looks both ways"
            )
        if self.cache != KeepAll():
            raise ZooError(f"sliding_window keeps its window and sinks: cache: got {self.cache}, wanted none")

    def sight(self) -> Mask:
        near = Window(self.window, symmetric=not self.causal)
        return Causal() & near if self.causal else near

    def mixed(self, q: Array, k: Array, v: Array, segment_ids: Array | None, mask: Array | None) -> Array:
        sight = self.sight()
        if self.sinks and segment_ids is None and splits_time(q.shape[1]):
            segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
        if self.sinks and segment_ids is not None:
            return self._with_sinks_of_segments(q, k, v, segment_ids, mask)
        if self.sinks:
            sight |= Causal() & Sinks(self.sinks) if self.causal else Sinks(self.sinks)
        return masked_attention(q, k, v, sight, segment_ids=segment_ids, mask=mask)

    @nn.nowrap
    def policy(self) -> KeepWindow:
        return KeepWindow(self.window, self.sinks)

    def _with_sinks_of_segments(self, q: Array, k: Array, v: Array, segment_ids: Array, mask: Array | None) -> Array:
        """`Sinks` are the first tokens of a row; those of its segments are a second set of keys, merged with the first.

        The sets are disjoint: the second holds the keys before the window only, which is what a compressed key of as
        many tokens and one is visible to.
        """
        queries, keys = segment_pair(segment_ids, mask)
        first = jnp.arange(q.shape[1]) - begins(segment_ids) < self.sinks
        before = Compressed((self.window if self.causal else self.window // 2 + 1) + 1, 1)

        def op(q: Array, k: Array, v: Array, queries: Array, *keys: Array, axis: str | None) -> Array:
            near, log_near = split_attend(q, k, v, self.sight(), axis=axis, segment_ids=(queries, keys[0]))
            far, log_far = split_attend(q, k, v, before, axis=axis, segment_ids=(queries, keys[1]))
            # A query that sees nothing has -inf twice, of which a softmax makes NaN.
            share = jax.nn.softmax(jnp.maximum(jnp.stack([log_near, log_far]), -1e30), axis=0).astype(v.dtype)
            return share[0, ..., None] * near + share[1, ..., None] * far

        arrays = q, k, v, queries, keys, jnp.where(first, keys, -1)
        return over_time(op, arrays, (SPLIT_HEADS,) * 3 + (SPLIT_IDS,) * 3, SPLIT_HEADS)
