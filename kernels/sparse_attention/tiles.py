"""From a mask to the tiles to work on: the pairs of a block of queries and one of keys with something visible.

What is known when the program is traced makes NumPy constants of exactly those tiles. What is not, a traced map or
segment ids, is looked up for the tiles the rest of the mask allows, when the program runs.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.sparse_attention.form import Form
from kernels.sparse_attention.mask import Mask, check_divides, grid, map_bits, maps

LIVE, WHOLE = 1, 2  # bits 0 and 1; from bit 2 on (`mask.FIRST_MAP`) those of the maps


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """A list of S tiles for every batch row and head, or one for all: Bl is 1 or B, Gl is 1 or G."""

    row: jax.Array
    """[Bl, Gl, S] int32: the block of queries. In the list made for queries ascending, each at least once."""
    column: jax.Array
    """[Bl, Gl, S] int32: the block of keys, in that list ascending within a row. In the list made for keys the same
    with columns first."""
    bits: jax.Array
    """[Bl, Gl, S] int32: LIVE; WHOLE, every pair is visible and no mask needed; then a bit for every map of the mask.
    Tiles that are not live fill up: a row (column) with nothing visible has one, and the end of a list, which repeats
    the last tile's place, where others are longer."""


def tiles(
    form: Form, mask: Mask, q_ids: jax.Array | None = None, k_ids: jax.Array | None = None
) -> tuple[Tiles, Tiles]:
    """The tiles of a mask with something visible, sorted by query for out and d_q, and by key for d_k and d_v.

    Args:
      form: sizes; its predicate is that of the mask.
      mask: whose maps of `Blocks`, if it has any, may be traced; their sizes are multiples of the form's blocks.
      q_ids, k_ids: [B, time_q] and [B, time_k] as given, not padded, or None.

    Raises:
      ValueError: a block crosses the border of a map's.
    """
    check_divides("tiles", mask, form.block_q, form.block_k)
    pairs = allowed(form, mask)
    return _listed(form, mask, pairs, q_ids, k_ids), _listed(form, mask, pairs.T, q_ids, k_ids, by_key=True)


def allowed(form: Form, mask: Mask) -> np.ndarray:
    """[nq, nk] bool: the tiles in which anything may be visible, for any head, by what is known when tracing."""
    known = form.predicate if any(leaf.traced for leaf in maps(mask)) else mask
    some = np.asarray(known.bounds(*grid(form.time_q, form.time_k, form.block_q, form.block_k))[0])
    return np.any(some, axis=tuple(range(some.ndim - 2)))


def _listed(
    form: Form,
    mask: Mask,
    pairs: np.ndarray,
    q_ids: jax.Array | None,
    k_ids: jax.Array | None,
    by_key: bool = False,
) -> Tiles:
    """Those of the allowed tiles, [nq, nk] bool or by key its transpose, in which something is visible."""
    pairs = pairs.copy()
    pairs[~pairs.any(axis=1), 0] = True  # a tile to say that there is none
    major, minor = np.nonzero(pairs)
    row, column = (minor, major) if by_key else (major, minor)
    (t0, t1), (j0, j1) = grid(form.time_q, form.time_k, form.block_q, form.block_k)
    t, j = (t0[row, 0], t1[row, 0]), (j0[column], j1[column])

    live, whole = mask.bounds(t, j)
    bits = map_bits(mask, t[0], j[0])
    whole = whole & (t[1] - t[0] == form.block_q - 1) & (j[1] - j[0] == form.block_k - 1)
    if q_ids is not None and k_ids is not None:
        (q_low, q_high), (k_low, k_high) = _ranges(q_ids, form.block_q), _ranges(k_ids, form.block_k)
        q_low, q_high, k_low, k_high = q_low[..., row], q_high[..., row], k_low[..., column], k_high[..., column]
        live = live & (q_low <= k_high) & (k_low <= q_high)
        whole = whole & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)

    known = isinstance(live, np.ndarray)
    module: ModuleType = np if known else jnp
    bits = module.where(live, bits | LIVE | module.where(whole, WHOLE, 0), 0)
    live, bits = (x.reshape((1,) * (3 - x.ndim) + x.shape) for x in (live, bits))
    order, bits = _live_first(module, major, live, bits)
    return Tiles(*(module.asarray(x, np.int32) for x in (module.take(row, order), module.take(column, order), bits)))


def _live_first(module: ModuleType, major: np.ndarray, live: Any, bits: Any) -> tuple[Any, Any]:
    """[Bl, Gl, S] each: where in the list of allowed tiles those to keep are, in its order, and their bits.

    Kept are live ones, and the first of a row without. Where the number is known, S becomes the largest of all lists.
    """
    first = np.searchsorted(major, major)
    last = np.searchsorted(major, major, side="right") - 1
    before = module.cumsum(live, axis=-1) - live
    lives_in_row = before[..., last] + live[..., last] - before[..., first]
    kept = live | ((first == np.arange(len(major))) & (lives_in_row == 0))
    count = module.sum(kept, axis=-1, keepdims=True)
    size = int(count.max()) if module is np else len(major)
    place = np.arange(size)
    order = module.argsort(~kept, axis=-1, stable=True)
    order = module.take_along_axis(order, module.minimum(place, count - 1), axis=-1)
    return order, module.where(place < count, module.take_along_axis(bits, order, axis=-1), 0)


def _ranges(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """[B, T] → the lowest and the highest id of each block, [B, 1, T / block] rounded up."""
    time = ids.shape[1]
    blocks = jnp.pad(ids, ((0, 0), (0, -time % block)), mode="edge").reshape(ids.shape[0], 1, -1, block)
    return jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)
