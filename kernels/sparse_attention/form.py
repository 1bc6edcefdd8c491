"""What the forms of sparse attention share beside the arrays.

Canonical arguments, time padded with zeros to whole blocks: q [B, Tq, H, K], k [B, Tk, G, K],
v [B, Tk, G, V] with G dividing H, q_ids [B, Tq] and k_ids [B, Tk] int32 or both None, and the two lists of tiles.
"""

from dataclasses import dataclass
from typing import Any

from kernels.sparse_attention.mask import Mask


@dataclass(frozen=True)
class Form:
    scale: float
    predicate: Mask
    """The mask without arrays (`mask.predicate`)."""
    block_q: int
    block_k: int
    time_q: int
    """Queries and keys without the padding."""
    time_k: int
    segments: bool
    """Whether there are q_ids and k_ids, which have to be equal too where a query sees a key."""
    together: int = 1
    """How many tiles of a row the XLA form works on at once."""

    def visible(self, t: Any, j: Any, bits: Any) -> Any:
        """Whether query t sees key j but for their ids, in a tile with these bits; arrays that broadcast.

        Queries that are padding see nothing: it keeps what they would read away from the gradients of keys.
        """
        seen = self.predicate.visible(t, j, bits)
        if self.time_q % self.block_q:
            seen &= t < self.time_q
        if self.time_k % self.block_k:
            seen &= j < self.time_k
        return seen
