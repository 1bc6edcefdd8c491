"""Which queries meet which block: choices sorted by block, cut into tiles of queries that share one.

A tile is one dense product of queries with the keys of their block: a query is read once for each of its choices, where
reading keys for queries would move a whole block each. Mixtures of experts are grouped like this, and selected
attention in FSA (2508.18224). No two choices share a slot of a tile: the results of tiles are gathered by slot, never
scattered, and every sum has one order.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

PACKED = 2**31  # below it a block and a place fit one int32


@partial(jax.tree_util.register_dataclass, data_fields=["block", "query", "slot", "live"], meta_fields=[])
@dataclass(frozen=True)
class Routes:
    """How a stretch of s queries meets N blocks in S tiles of m slots."""

    block: jax.Array
    """[S] int32, ascending: the block of each tile, N for tiles that are not live."""
    query: jax.Array
    """[S, m] int32: the query in each slot, counted from the start of the stretch; s in empty slots."""
    slot: jax.Array
    """[s, n] int32: the slot of each choice among S × m; that of a choice of nothing, or of a block once more, is the
    first one of the first tile that is not live."""
    live: jax.Array
    """[] int32: how many tiles hold a query, fewer than S; they come first."""


def route(blocks: jax.Array, count: int, slots: int, multiple: int = 1) -> Routes:
    """Blocks [s, n] int32 chosen by each query, -1 for none → tiles of `slots` slots, so many as divide by `multiple`.

    `count` is N, the number of blocks. S is enough whatever is chosen.
    """
    queries, choices = blocks.shape
    size = blocks.size
    tiles = -(-(size // slots + min(count, size) + 1) // multiple) * multiple
    block, choice = _sorted(jnp.where(blocks < 0, count, blocks).reshape(size), count)
    query = choice // choices
    place = jnp.arange(size, dtype=jnp.int32)
    again = (place > 0) & (block == jnp.roll(block, 1)) & (query == jnp.roll(query, 1))

    start = jnp.searchsorted(block, jnp.arange(count + 1, dtype=jnp.int32)).astype(jnp.int32)
    needed = -(-jnp.diff(start) // slots)
    first_tile = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(needed, dtype=jnp.int32)])
    live = first_tile[count]

    tile = jnp.arange(tiles, dtype=jnp.int32)
    tile_block = jnp.searchsorted(first_tile[1:], tile, side="right").astype(jnp.int32)
    from_place = start[tile_block] + (tile - first_tile[tile_block]) * slots
    end = jnp.append(start[1:], start[count])  # of block N, which stands for none, nothing is put into tiles
    held = from_place[:, None] + jnp.arange(slots, dtype=jnp.int32)
    tile_query = jnp.where(again, queries, query).at[held].get(mode="clip")
    tile_query = jnp.where(held < end[tile_block, None], tile_query, queries)

    slot = first_tile[block] * slots + place - start[block]
    slot = jnp.where(again | (block == count), live * slots, slot)
    slot = jnp.zeros_like(slot).at[choice].set(slot, unique_indices=True)
    return Routes(tile_block, tile_query, slot.reshape(queries, choices), live)


def _sorted(block: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Blocks (at most `count`) in ascending order and the place each had; of equal ones the first comes first."""
    place = jnp.arange(block.size, dtype=jnp.int32)
    if (count + 1) * block.size > PACKED:
        block, place = lax.sort((block, place), num_keys=1, is_stable=True)
        return block, place
    both = lax.sort(block * block.size + place, is_stable=False)  # one number sorts several times faster than two
    return both // block.size, both % block.size
