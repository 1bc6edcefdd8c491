"""What the forms of block selection share beside the arrays.

Canonical arguments: q [B, T, H, K], k_compressed [B, N, G, K], begins [B, T] int32 (where each token's segment begins).
A block is `block_size` tokens and `ratio` strides. Compressed key i is of phase i % ratio in block i // ratio: laid out
phase by phase, the scores of blocks are sums of whole rows of compressed keys' probabilities.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Form:
    scale: float
    block_size: int
    stride: int
    compression_block: int
    selected: int
    """How many blocks a query gets."""
    initial: int
    local: int
    start: int = 0
    """The time of the first query; keys are those of all times."""

    @property
    def ratio(self) -> int:
        return self.block_size // self.stride

    def blocks(self, time: int) -> int:
        return -(-time // self.block_size)

    def shares(self) -> list[tuple[int, int, int]]:
        """(shift, phase, weight): block j's score holds weight times the probability of that phase in block j - shift.

        The weights of native sparse attention's equation 9: how many strides the compressed block and block j share.
        """
        covered = self.compression_block // self.stride
        weights: dict[int, int] = {}
        for m in range(self.ratio):
            for n in range(covered):
                place = self.ratio - 1 - m - n  # from the first compressed key of the block
                weights[place] = weights.get(place, 0) + 1
        return [(-(place // self.ratio), place % self.ratio, weight) for place, weight in sorted(weights.items())]

    def visible(self, compressed: jax.Array, time: jax.Array, begins: jax.Array) -> jax.Array:
        """Whether a compressed block has ended by the query's time and lies in its segment; integers that broadcast."""
        start = compressed * self.stride
        return (start + self.compression_block <= time + 1) & (start >= begins)


def compressed_blocks(time: int, block_size: int, stride: int) -> int:
    """How many whole blocks of tokens, one every stride, `time` tokens hold."""
    return max((time - block_size) // stride + 1, 0)


def phase_major(form: Form, k_compressed: jax.Array, blocks: int) -> jax.Array:
    """[B, N, G, K] → [B, G, ratio, blocks, K], filled up with zeros."""
    batch, compressed, groups, width = k_compressed.shape
    filling = blocks * form.ratio - compressed
    k = jnp.pad(k_compressed, ((0, 0), (0, filling), (0, 0), (0, 0)))
    return k.reshape(batch, blocks, form.ratio, groups, width).transpose(0, 3, 2, 1, 4)


def rank(
    score: jax.Array, block: jax.Array, time: jax.Array, begins: jax.Array, *, block_size: int, initial: int, local: int
) -> jax.Array:
    """The score with forced blocks at inf, and those after the query or before its segment at -inf."""
    # Times are not negative: a plain division, as the signs of a floored one do not compile ahead for a TPU.
    first, current = (lax.div(x, jnp.asarray(block_size, x.dtype)) for x in (begins, time))
    forced = (block < first + initial) | (block > current - local)
    allowed = (block >= first) & (block <= current)
    return jnp.where(allowed, jnp.where(forced, jnp.inf, score), -jnp.inf)


def best(ranked: jax.Array, most: int) -> jax.Array:
    """[..., J] ranks → [..., most] int32, the blocks of the highest ranks, ascending; -1 at the end for those of -inf.

    Of equal ranks the lowest block.
    """
    highest, ids = lax.top_k(ranked, min(most, ranked.shape[-1]))
    return ascending(jnp.where(highest > -jnp.inf, ids, -1), most)


def ascending(ids: jax.Array, most: int) -> jax.Array:
    """[..., at most `most`] ids, -1 for none → [..., most] int32, sorted, those of -1 at the end."""
    none = jnp.iinfo(jnp.int32).max
    ids = jnp.where(ids < 0, none, ids).astype(jnp.int32)
    ids = jnp.pad(ids, [(0, 0)] * (ids.ndim - 1) + [(0, most - ids.shape[-1])], constant_values=none)
    ids = jnp.sort(ids, axis=-1)
    return jnp.where(ids == none, -1, ids)
