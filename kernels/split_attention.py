"""`kernels.sparse_attention` with time split over devices, for the inside of `jax.shard_map`.

    attention = partial(split_attention, axis="sequence")
    jax.shard_map(lambda q, k, v: attention(q, k, v, Causal()), in_specs=P(None, "sequence"), …)

Every device has one stretch of queries, keys and values, in order. A mask that looks no further than a stretch needs
only the nearest keys of the devices beside (a halo exchange), any other the ring (`kernels.ring`), as far as it looks.
Temporary memory grows with a stretch, and for a halo with the window.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.ring import Keys, Queries, Results, Ring, Rounds, go_round
from kernels.sparse_attention import Mask, attend, attend_piece, piece_gradients
from kernels.sparse_attention.shifted import Shifted, distances, piece

ABSENT = -3
"""The segment of a neighbour's token where there is no neighbour, which is nobody's."""


def split_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    axis: str | None,
    scale: float | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`sparse_attention` of this device's queries to the keys of all.

    Args:
      q, k, v: [B, T / P, H, K], [B, T / P, G, K] and [B, T / P, G, V], the stretches of this device among the P of
        `axis`.
      mask: of all T tokens, one that tells of how far apart two tokens are and no more: `Full`, `Causal`, `Window`,
        `Strided`, `Compressed` with a stride of 1, and what joins them.
      axis: the mesh axis, or None where time is whole.
      scale: of the scores; K**-0.5 unless given.
      segment_ids: ids [B, T / P] of queries and of keys, 0 or more for queries. All devices number segments alike.
      implementation: None (best for the platform), "xla" or "pallas", of each piece.

    Returns:
      out [B, T / P, H, V] in v's dtype.

    Raises:
      ValueError: an argument of another shape or dtype.
      NotImplementedError: a mask of another kind, or "pallas" where it cannot serve.
    """
    options: dict[str, Any] = {"scale": scale, "segment_ids": segment_ids, "implementation": implementation}
    return split_attend(q, k, v, mask, axis=axis, **options)[0]


def split_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    axis: str | None,
    scale: float | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    implementation: str | None = None,
) -> Results:
    """`split_attention` and the log-normalisers [B, T / P, H], as `kernels.sparse_attention.attend` gives them."""
    options: dict[str, Any] = {"scale": scale, "implementation": implementation}
    if axis is None:
        return attend(q, k, v, mask, segment_ids=segment_ids, **options)
    apart = distances(mask)
    if apart is None:
        raise NotImplementedError(
            f"split_attention: mask: got {mask}, wanted one that tells of how far apart tokens are and no more"
        )
    length, size = q.shape[1], lax.axis_size(axis)
    before, after = max(apart[1], 0), max(-apart[0], 0)
    if max(before, after) <= length:
        queries, keys = segment_ids or (jnp.zeros(q.shape[:2], jnp.int32),) * 2
        k, v, keys = with_neighbours((k, v, keys), axis, before, after, ABSENT)
        return attend(q, k, v, Shifted(mask, before), segment_ids=(queries, keys), **options)
    pair = segment_ids or (None, None)
    ring = Ring(axis, size, _rounds(mask, length, size, scale, implementation))
    return go_round(ring, (q, pair[0]), (k, v, pair[1]))


def with_neighbours(tree: Any, axis: str, before: int, after: int, absent: int = 0) -> Any:
    """Arrays [B, T / P, …] → [B, before + T / P + after, …] with what the devices beside have next to them.

    Where there is none, integers are `absent` and numbers 0. At most T / P tokens come from each side.
    """
    size = lax.axis_size(axis)
    onwards = [(i, i + 1) for i in range(size - 1)]

    def joined(x: jax.Array) -> jax.Array:
        filling = absent if jnp.issubdtype(x.dtype, jnp.integer) else 0
        own = x - jnp.asarray(filling, x.dtype) if filling else x
        parts = [own]
        if before:
            parts.insert(0, lax.ppermute(own[:, -before:], axis, onwards))
        if after:
            parts.append(lax.ppermute(own[:, :after], axis, [(j, i) for i, j in onwards]))
        whole = jnp.concatenate(parts, axis=1)
        return whole + jnp.asarray(filling, x.dtype) if filling else whole

    return jax.tree.map(joined, tree)


@dataclass(frozen=True)
class _Masked:
    """Keys seen through a mask."""

    mask: Mask
    scale: float | None
    implementation: str | None

    def forward(self, distance: Any, queries: Queries, keys: Keys) -> Results:
        return attend_piece(queries[0], *keys[:2], self.mask, **self._options(queries, keys))

    def backward(
        self, distance: Any, queries: Queries, keys: Keys, *of_queries: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return piece_gradients(queries[0], *keys[:2], self.mask, *of_queries, **self._options(queries, keys))

    def _options(self, queries: Queries, keys: Keys) -> dict[str, Any]:
        ids = None if queries[1] is None else (queries[1], keys[2])
        return {"scale": self.scale, "segment_ids": ids, "implementation": self.implementation}


def _rounds(mask: Mask, length: int, size: int, scale: float | None, implementation: str | None) -> tuple[Rounds, ...]:
    """As far as the mask looks; rounds in which the same is seen are one loop."""

    def masked(seen: Mask | None) -> _Masked | None:
        return None if seen is None else _Masked(seen, scale, implementation)

    rounds = [Rounds(0, 0, own := masked(piece(mask, length, 0, 0)), own)]
    for distance in range(1, size):
        earlier = masked(piece(mask, length, distance * length, 0))
        later = masked(piece(mask, length, 0, (size - distance) * length))
        last = rounds[-1]
        if distance > 1 and (last.earlier, last.later) == (earlier, later):
            rounds[-1] = Rounds(last.first, distance, earlier, later)
        else:
            rounds.append(Rounds(distance, distance, earlier, later))
    while len(rounds) > 1 and rounds[-1].earlier is rounds[-1].later is None:
        rounds.pop()
    return tuple(rounds)
